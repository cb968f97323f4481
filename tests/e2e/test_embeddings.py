"""Chat, embeddings and rerank by default in one server: the clients people have, the real weights, a killed process."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cohere
import httpx
import numpy as np
import openai
import pytest
from langchain_openai import OpenAIEmbeddings

MODEL, CHAT = "all-minilm-l6-v2", "smollm2-135m-instruct"
ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["The cat sits on the mat.", "The feline rests on a rug.", "Stocks fell sharply on Monday."]
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def reference() -> Any:
    """sentence-transformers over the same folder."""
    from sentence_transformers import SentenceTransformer

    from llmserve.repository import embedded

    return SentenceTransformer(str(embedded.fetch(MODEL)), device="cpu")


def rows(answer: Any) -> Array:
    return np.array([entry.embedding for entry in answer.data])


def test_openais_client_gets_what_sentence_transformers_gives(server: Any, reference: Any) -> None:
    client = server.client()
    answer = client.embeddings.create(model=MODEL, input=TEXTS)  # as base64, which the client asks for by itself
    expected = reference.encode(TEXTS, normalize_embeddings=True)
    assert (rows(answer) * expected).sum(-1).min() > 0.999
    assert answer.usage.prompt_tokens == 27
    numbers = rows(client.embeddings.create(model=MODEL, input=TEXTS, encoding_format="float"))
    assert np.array_equal(numbers.astype(np.float32), rows(answer).astype(np.float32))
    short = rows(client.embeddings.create(model=MODEL, input=TEXTS[0], dimensions=64))[0]
    assert np.linalg.norm(short) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(openai.BadRequestError, match="at most 256"):
        client.embeddings.create(model=MODEL, input="word " * 400)
    with pytest.raises(openai.BadRequestError, match="is a chat model"):
        client.embeddings.create(model=CHAT, input="x")
    with pytest.raises(openai.BadRequestError, match="generates no text"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}])


def test_a_text_has_the_same_bits_whoever_else_asks(server: Any) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60) as client:

            async def ask(texts: list[str]) -> Array:
                return rows(await client.embeddings.create(model=MODEL, input=texts))

            alone = np.concatenate([await ask([text]) for text in TEXTS])
            crowd = await asyncio.gather(*(ask([*TEXTS, f"number {i}", TEXTS[i % 3]]) for i in range(12)))
            for i, several in enumerate(crowd):
                assert np.array_equal(several[:3], alone)
                assert np.array_equal(several[4], alone[i % 3])

    asyncio.run(run())


def test_coheres_client_embeds_and_reranks(server: Any) -> None:
    client = cohere.ClientV2(api_key="none", base_url=server.url)
    answer = client.embed(
        model=MODEL, texts=TEXTS, input_type="search_document", embedding_types=["float", "int8", "ubinary", "base64"]
    )
    vectors = np.array(answer.embeddings.float_)
    assert vectors.shape == (3, 384)
    assert np.array(answer.embeddings.ubinary).tolist() == np.packbits(vectors >= 0, axis=-1).tolist()
    assert np.abs(np.array(answer.embeddings.int8)).max(-1).tolist() == [127] * 3
    assert answer.embeddings.base64 is not None
    ranked = client.rerank(model=MODEL, query="Where is the cat?", documents=TEXTS, top_n=2)
    assert [result.index for result in ranked.results] == [0, 1]
    assert ranked.results[0].relevance_score > ranked.results[1].relevance_score
    assert ranked.meta is not None


def test_langchain_embeds(server: Any) -> None:
    embeddings = OpenAIEmbeddings(
        model=MODEL, base_url=f"{server.url}/v1", api_key="none", check_embedding_ctx_length=False
    )
    documents = np.array(embeddings.embed_documents(TEXTS))
    query = np.array(embeddings.embed_query("Where is the cat?"))
    assert (documents @ query).argmax() == 0


def test_a_chat_model_reranks_by_query_likelihood(server: Any) -> None:
    documents = ["Bread is baked from flour.", "Paris is the capital of France.", "The Nile flows through Egypt."]
    body = {"model": CHAT, "query": "What is the capital of France?", "documents": documents}
    answer = httpx.post(f"{server.url}/rerank", json=body, timeout=60).json()
    assert answer["method"] == "query-likelihood"
    assert answer["results"][0]["index"] == 1
    assert all(0 < result["relevance_score"] < 1 for result in answer["results"])
    alone = httpx.post(f"{server.url}/rerank", json={**body, "documents": documents[1:2]}, timeout=60).json()
    assert alone["results"][0]["relevance_score"] == answer["results"][0]["relevance_score"]
    default = httpx.post(f"{server.url}/rerank", json={**body, "model": None}, timeout=60).json()
    assert (default["model"], default["method"], default["results"][0]["index"]) == (MODEL, "cosine", 1)


def documentation(count: int) -> tuple[list[str], list[str]]:
    """The summary lines of functions of the standard library, and what their documentation says below them."""
    import argparse
    import asyncio.base_events
    import collections
    import heapq
    import logging
    import shutil
    import socket
    import tarfile
    import threading
    import zipfile

    pairs: dict[str, str] = {}
    for module in (
        argparse,
        asyncio.base_events,
        collections,
        heapq,
        logging,
        shutil,
        socket,
        tarfile,
        threading,
        zipfile,
    ):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                summary, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
                if len(rest.split()) >= 8 and 3 <= len(summary.split()) <= 20 and rest not in pairs.values():
                    pairs.setdefault(summary, " ".join(rest.split()[:60]))
    return list(pairs)[:count], list(pairs.values())[:count]


def test_retrieval_recalls_what_sentence_transformers_recalls(server: Any, reference: Any) -> None:
    queries, documents = documentation(80)
    assert len(queries) >= 60
    client = server.client()

    def recall_at_5(asked: Array, offered: Array) -> float:
        best = np.argsort(-(asked @ offered.T), axis=1)[:, :5]
        return float(np.mean([i in row for i, row in enumerate(best)]))

    ours = recall_at_5(*(rows(client.embeddings.create(model=MODEL, input=texts)) for texts in (queries, documents)))
    theirs = recall_at_5(*(reference.encode(texts, normalize_embeddings=True) for texts in (queries, documents)))
    assert theirs > 0.5
    assert abs(ours - theirs) <= 2.5 / len(queries)  # the default weights have fewer bits: two may change sides


def test_a_model_process_that_is_killed_in_mid_batch_costs_no_answer(server: Any) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60, max_retries=0) as client:
            texts = [f"Text number {i} about {word}." for i in range(64) for word in ("cats", "stocks", "bread")]
            expected = rows(await client.embeddings.create(model=MODEL, input=texts))
            (process,) = server.model_processes()
            process.suspend()
            asked = asyncio.create_task(client.embeddings.create(model=MODEL, input=texts))
            async with httpx.AsyncClient() as http:
                while "te_queue_size" in (text := (await http.get(f"{server.url}/metrics")).text):
                    (line,) = [line for line in text.splitlines() if line.startswith("te_texts_total")]
                    if float(line.split()[-1]) >= 2 * len(texts):
                        break
            process.kill()
            assert np.array_equal(rows(await asked), expected)

    asyncio.run(run())


def test_the_example_answers_from_the_right_text(server: Any) -> None:
    command = [sys.executable, str(ROOT / "examples" / "rag.py"), server.url]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.splitlines()
    assert said[0] == "The library lends each reader up to twelve books for three weeks."
    assert "twelve" in " ".join(said[1:]).lower() or "12" in " ".join(said[1:])


def test_the_default_starts_without_embeddings_where_they_are_not_wanted(
    start_server: Callable[..., Any], smollm2_path: Path
) -> None:
    server = start_server("--kv-cache-memory", "64MiB", "--embedding-model", "none")
    assert server.model_processes() == []
    answer = httpx.post(f"{server.url}/v1/embeddings", json={"input": "x"})
    assert answer.status_code == 400
    assert "--embedding-model" in answer.json()["error"]["message"]
    assert json.loads(httpx.get(f"{server.url}/v1/models").text)["data"][0]["id"] == CHAT
    server.stop()
