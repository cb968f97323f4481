"""The embedding, rerank, score and classification routes over tiny models, in the shapes of every server that has them.

The scores are compared with transformers', computed here.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification

Post = Callable[..., Any]
EMBED, SCORE, CLASSIFY = "tiny-embed", "tiny-score", "tiny-classify"
QUERY, DOCUMENTS = "the cat", ["stocks fell today", "the cat sat on the mat", "a dog"]


def reference(folder: Path, texts: Sequence[str | tuple[str, str]], kind: Any) -> np.ndarray[Any, Any]:
    """Each text by itself, through transformers: unit vectors (mean pooling) or logits."""
    tokenizer, model = Tokenizer.from_file(str(folder / "tokenizer.json")), kind.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        encoding = tokenizer.encode(*([text] if isinstance(text, str) else text))
        inputs = {"input_ids": torch.tensor([encoding.ids]), "token_type_ids": torch.tensor([encoding.type_ids])}
        with torch.inference_mode():
            output = model(**inputs)
        if kind is AutoModel:
            vector = output.last_hidden_state[0].mean(0)
            rows.append((vector / vector.norm()).numpy())
        else:
            rows.append(output.logits[0].numpy())
    return np.stack(rows)


def vectors_of(answer: Any) -> np.ndarray[Any, Any]:
    return np.array([entry["embedding"] for entry in answer["data"]])


def unit(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_embeddings_are_those_of_the_model(post: Post, embed_folder: Path) -> None:
    answer = post("/v1/embeddings", model=EMBED, input=DOCUMENTS, normalize=True)
    assert np.abs(vectors_of(answer) - reference(embed_folder, DOCUMENTS, AutoModel)).max() < 1e-5
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2]
    assert (answer["object"], answer["model"]) == ("list", EMBED)
    assert answer["usage"] == {"prompt_tokens": 17, "total_tokens": 17}
    assert np.array_equal(
        vectors_of(post("/v1/embeddings", input=DOCUMENTS[1], normalize=True))[0], vectors_of(answer)[1]
    )


def test_every_shape_of_input_says_the_same(post: Post, embed_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(embed_folder / "tokenizer.json"))
    ids = [tokenizer.encode(text).ids for text in DOCUMENTS]
    by_text = vectors_of(post("/v1/embeddings", input=DOCUMENTS))
    assert np.array_equal(vectors_of(post("/v1/embeddings", input=ids)), by_text)
    assert np.array_equal(vectors_of(post("/v1/embeddings", input=ids[2])), by_text[2:])
    assert np.array_equal(vectors_of(post("/embeddings", input=DOCUMENTS[2])), by_text[2:])
    coded = post("/v1/embeddings", input=DOCUMENTS, encoding_format="base64")["data"]
    decoded = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in coded]
    assert np.array_equal(np.stack(decoded), by_text.astype(np.float32))


def test_dimensions_cut_first_and_normalise_then(post: Post) -> None:
    whole = vectors_of(post("/v1/embeddings", input="dog"))
    cut = vectors_of(post("/v1/embeddings", input="dog", dimensions=8, normalize=True))
    assert cut.shape == (1, 8)
    assert np.abs(cut - unit(whole[:, :8])).max() < 1e-6
    assert "32" in post("/v1/embeddings", 400, input="dog", dimensions=33)["error"]["message"]
    bits = post("/v1/embeddings", input="dog", embedding_type="ubinary")["data"][0]["embedding"]
    assert bits == np.packbits(whole[0] >= 0).tolist()
    assert (
        "multiple of 8"
        in post("/v1/embeddings", 400, input="dog", embedding_type="binary", dimensions=7)["error"]["message"]
    )


def test_prompts_go_before_the_text(post: Post) -> None:
    by_hand = vectors_of(post("/v1/embeddings", input="the dog"))
    for asked in ({"prompt_name": "query"}, {"input_type": "search_query"}, {"task": "retrieval.query"}):
        assert np.array_equal(vectors_of(post("/v1/embeddings", input="dog", **asked)), by_hand)
    assert "query" in post("/v1/embeddings", 400, input="dog", prompt_name="nope")["error"]["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"input": []}, "must not be empty"),
        ({"input": ""}, "has at 0 an empty input"),
        ({"input": ["dog", ""]}, "has at 1 an empty input"),
        ({"input": [[]]}, "has at 0 an empty input"),
        ({"input": [1.5]}, "neither a string nor"),
        ({"input": {"a": 1}}, "must be a string"),
        ({"input": ["dog"] * 2049}, "at most 2048"),
        ({"input": [[10**6]]}, "vocabulary ends at"),
        ({"input": "cat " * 40}, "'input' has 42 tokens, but at most 32"),
        ({"input": ["dog", "cat " * 40]}, "'input.1' has 42 tokens"),
        ({"input": "dog", "truncate_prompt_tokens": 33}, "at most 32"),
        ({"input": "dog", "truncate_prompt_tokens": 0}, "nothing would be left"),
        ({"input": "dog", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "dog", "late_chunking": True}, "late_chunking"),
        ({"input": "dog", "endianness": "big"}, "endianness"),
        ({"input": "dog", "inputs": "dog"}, "Did you mean 'input'"),
        ({"input": "dog", "model": SCORE}, "is a reranker; this needs an embedding model. Served here: 'tiny-embed'"),
        ({"input": "dog", "model": CLASSIFY}, "is a classifier"),
        ({}, "'input' is required"),
    ],
)
def test_what_cannot_be_honoured_is_refused_and_named(post: Post, body: dict[str, Any], said: str) -> None:
    error = post("/v1/embeddings", 400, **body)["error"]
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


def test_models_that_are_not_there_and_of_another_kind(post: Post) -> None:
    assert "tiny-embed" in post("/v1/embeddings", 404, input="x", model="gpt-5")["error"]["message"]
    chat = post("/v1/chat/completions", 400, model=EMBED, messages=[{"role": "user", "content": "x"}])
    assert "generates no text: it is for /v1/embeddings" in chat["error"]["message"]
    assert "is a classifier" in post("/rerank", 400, model=CLASSIFY, query="x", documents=["y"])["error"]["message"]
    assert "is an embedding model" in post("/classify", 400, model=EMBED, input="x")["error"]["message"]


def test_texts_are_cut_when_asked(post: Post) -> None:
    long, asked = "cat " * 40, {"truncate_prompt_tokens": -1}
    cut = vectors_of(post("/v1/embeddings", input=long, **asked))
    assert np.array_equal(cut, vectors_of(post("/v1/embeddings", input="cat " * 30)))
    assert np.array_equal(cut, vectors_of(post("/v1/embeddings", input=long, truncate=True)))
    left = post("/v1/embeddings", input="dog dog cat mat", truncate_prompt_tokens=4, truncation_side="left")
    assert np.array_equal(vectors_of(left), vectors_of(post("/v1/embeddings", input="cat mat")))


def test_a_cross_encoder_scores_as_transformers_does(post: Post, score_folder: Path) -> None:
    logits = reference(score_folder, [(QUERY, document) for document in DOCUMENTS], AutoModelForSequenceClassification)
    probabilities = 1 / (1 + np.exp(-logits[:, 0].astype(float)))
    answer = post("/v1/rerank", model=SCORE, query=QUERY, documents=DOCUMENTS)
    assert answer["method"] == "cross-encoder"
    order = np.argsort(-probabilities).tolist()
    assert [result["index"] for result in answer["results"]] == order
    assert [result["document"]["text"] for result in answer["results"]] == [DOCUMENTS[i] for i in order]
    scores = [result["relevance_score"] for result in answer["results"]]
    assert np.abs(np.array(scores) - probabilities[order]).max() < 1e-5
    raw = post("/rerank", query=QUERY, texts=DOCUMENTS, raw_scores=True, model=SCORE)
    assert np.abs(np.array([entry["score"] for entry in raw]) - logits[order, 0]).max() < 1e-4
    pairs = post("/score", text_1=[QUERY] * 3, text_2=DOCUMENTS, model=SCORE)
    assert np.abs(np.array([entry["score"] for entry in pairs["data"]]) - probabilities).max() < 1e-5


def test_rerank_takes_a_reranker_where_there_is_one_and_else_compares_vectors(post: Post, embed_folder: Path) -> None:
    assert post("/rerank", query=QUERY, documents=DOCUMENTS)["model"] == SCORE
    answer = post("/rerank", query=QUERY, documents=DOCUMENTS, model=EMBED)
    assert answer["method"] == "cosine"
    vectors = reference(embed_folder, ["the " + QUERY, *DOCUMENTS], AutoModel)  # the query's prompt is "the "
    cosines = vectors[1:] @ vectors[0]
    got = {result["index"]: result["relevance_score"] for result in answer["results"]}
    assert np.abs(np.array([got[i] for i in range(3)]) - cosines).max() < 1e-5


def test_rerank_answers_in_the_shape_it_was_asked_in(post: Post) -> None:
    ask: dict[str, Any] = {"model": EMBED, "query": QUERY}
    cohere = post("/v2/rerank", **ask, documents=DOCUMENTS, top_n=2)
    assert len(cohere["results"]) == 2
    assert cohere["results"][0].keys() == {"index", "relevance_score"}
    assert cohere["meta"]["api_version"] == {"version": "2"}
    jina = post("/v1/rerank", **ask, documents=[{"text": DOCUMENTS[0]}, DOCUMENTS[1]])
    assert {result["document"]["text"] for result in jina["results"]} == set(DOCUMENTS[:2])
    assert "document" not in post("/v1/rerank", **ask, documents=DOCUMENTS, return_documents=False)["results"][0]
    tei = post("/rerank", **ask, texts=DOCUMENTS, return_text=True)
    assert tei[0].keys() == {"index", "score", "text"}
    assert tei[0]["text"] == DOCUMENTS[tei[0]["index"]]
    voyage = post("/v1/rerank", **ask, documents=DOCUMENTS, top_k=1, return_documents=True)
    assert voyage["data"][0].keys() == {"index", "relevance_score", "document"}
    assert isinstance(voyage["data"][0]["document"], str)
    mixedbread = post("/v1/rerank", **ask, input=DOCUMENTS, top_k=3)
    assert [entry["index"] for entry in mixedbread["data"]] == [entry["index"] for entry in tei]
    assert len(post("/rerank", **ask, documents=DOCUMENTS, top_n=0)["results"]) == 3


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"documents": DOCUMENTS}, "'query' is required"),
        ({"query": QUERY}, "Give the documents once"),
        ({"query": QUERY, "documents": DOCUMENTS, "texts": DOCUMENTS}, "Give the documents once"),
        ({"query": "", "documents": DOCUMENTS}, "'query'"),
        ({"query": QUERY, "documents": []}, "must not be empty"),
        ({"query": QUERY, "documents": ["a", ""]}, "has at 1 an empty text"),
        ({"query": QUERY, "documents": [{"image": "x"}]}, "neither a string nor an object"),
        ({"query": QUERY, "documents": DOCUMENTS, "top_n": 1, "top_k": 1}, "either 'top_n' or 'top_k'"),
        ({"query": QUERY, "documents": DOCUMENTS, "relevant_spans": {}}, "relevant_spans"),
        ({"query": QUERY, "documents": DOCUMENTS, "instruction": "x"}, "takes no 'instruction'"),
        ({"query": QUERY, "documents": ["a", "cat " * 40]}, "'documents.1' has 45 tokens, but at most 32"),
    ],
)
def test_rerank_refuses_what_it_cannot_do(post: Post, body: dict[str, Any], said: str) -> None:
    assert said in post("/rerank", 400, **body)["error"]["message"]


def test_score_pairs_one_with_many_and_many_with_many(post: Post) -> None:
    many = post("/v1/score", model=EMBED, text_1=QUERY, text_2=DOCUMENTS)["data"]
    assert [entry["index"] for entry in many] == [0, 1, 2]
    each = post("/score", model=EMBED, queries=[QUERY] * 3, documents=DOCUMENTS)["data"]
    assert [entry["score"] for entry in each] == [entry["score"] for entry in many]
    assert post("/score", model=EMBED, data_1=QUERY, data_2=DOCUMENTS[0])["data"] == many[:1]
    assert "as many with as many" in post("/score", 400, text_1=["a", "b"], text_2=DOCUMENTS)["error"]["message"]
    assert "two sides" in post("/score", 400, text_1="a", documents="b")["error"]["message"]


def test_classify_and_predict_say_what_transformers_says(post: Post, classify_folder: Path) -> None:
    logits = reference(classify_folder, DOCUMENTS, AutoModelForSequenceClassification).astype(float)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    answer = post("/classify", input=DOCUMENTS)
    assert np.abs(np.array([entry["probs"] for entry in answer["data"]]) - probabilities).max() < 1e-5
    labels = ["bad", "fair", "good"]
    assert [entry["label"] for entry in answer["data"]] == [labels[i] for i in probabilities.argmax(-1)]
    assert answer["data"][0]["num_classes"] == 3
    (first,) = [post("/predict", inputs=DOCUMENTS[0], model=CLASSIFY)]
    assert [entry["label"] for entry in first] == [labels[i] for i in np.argsort(-probabilities[0])]
    rows = post("/predict", inputs=[[text] for text in DOCUMENTS], model=CLASSIFY, raw_scores=True)
    assert [row[0]["score"] for row in rows] == pytest.approx(logits.max(-1).tolist(), abs=1e-4)
    pair = post("/predict", inputs=["the cat", "dog"], model=SCORE)
    assert pair[0]["label"] == "relevance"
    assert post("/predict", inputs=[["the cat", "dog"]], model=SCORE) == [pair]


def test_pooling_gives_what_the_model_makes(post: Post, embed_folder: Path) -> None:
    rows = post("/pooling", model=EMBED, input="the cat", task="token_embed")["data"][0]["data"]
    assert np.array(rows).shape == (4, 32)
    pooled = post("/pooling", model=EMBED, input="the cat", normalize=True)["data"][0]["data"]
    assert np.abs(unit(np.array(rows).mean(0)) - np.array(pooled)).max() < 1e-5
    assert len(post("/pooling", model=CLASSIFY, input="dog")["data"][0]["data"]) == 3
    assert "can classify only" in post("/pooling", 400, model=CLASSIFY, input="dog", task="embed")["error"]["message"]


def test_the_routes_of_text_embeddings_inference(http: httpx.Client, post: Post) -> None:
    vectors = post("/embed", inputs=["the cat", "dog"])
    assert np.array_equal(
        np.array(vectors), vectors_of(post("/v1/embeddings", input=["the cat", "dog"], normalize=True))
    )
    tokens = post("/embed_all", inputs="the cat")
    assert np.array(tokens).shape == (1, 4, 32)
    near = post("/similarity", inputs={"source_sentence": "the cat", "sentences": ["the cat", "dog"]})
    assert near[0] == pytest.approx(1.0)
    assert near[1] == pytest.approx(float(np.array(vectors[0]) @ np.array(vectors[1])), abs=1e-5)
    answer = http.post("/embed", json={"inputs": "the cat"})
    assert answer.headers["x-compute-tokens"] == "4"
    assert answer.headers["x-compute-characters"] == "7"
    assert answer.headers["x-compute-type"] == "cpu"
    times = [f"x-{what}-time" for what in ("compute", "total", "tokenization", "queue", "inference")]
    assert all(answer.headers[name].isdigit() for name in times)
    assert post("/embed", 400, inputs="cat " * 40)["error_type"] == "Validation"
    assert len(post("/embed", inputs="cat " * 40, truncate=True, truncation_direction="Left")) == 1
    assert post("/embed", inputs="cat", normalize=False) != post("/embed", inputs="cat")


def test_cohere_embeddings_in_every_number_format(post: Post) -> None:
    types = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    answer = post("/v2/embed", model=EMBED, input_type="search_document", texts=["dog"], embedding_types=types)
    got = {name: rows[0] for name, rows in answer["embeddings"].items()}
    vector = np.array(got["float"], np.float32)
    assert np.array_equal(np.frombuffer(base64.b64decode(got["base64"]), "<f4"), vector)
    assert got["ubinary"] == np.packbits(vector >= 0).tolist()
    assert got["binary"] == [byte - 128 for byte in got["ubinary"]]
    assert got["uint8"] == [level + 128 for level in got["int8"]]
    assert max(map(abs, got["int8"])) == 127
    quantised = np.array(got["int8"]) / 127 * np.abs(vector).max()
    assert np.abs(quantised - vector).max() <= np.abs(vector).max() / 254 + 1e-6
    assert answer["texts"] == ["dog"]
    assert answer["meta"]["billed_units"] == {"input_tokens": 3}
    by_inputs = post("/v2/embed", model=EMBED, inputs=[{"content": [{"type": "text", "text": "dog"}]}])
    assert by_inputs["embeddings"]["float"][0] == got["float"]
    assert (
        post("/v2/embed", model=EMBED, texts=["cat " * 40])["meta"]["tokens"]["input_tokens"] == 32
    )  # END: its default
    assert "42 tokens" in post("/v2/embed", 400, model=EMBED, texts=["cat " * 40], truncate="NONE")["error"]["message"]
    assert "either 'texts' or 'inputs'" in post("/v2/embed", 400, model=EMBED)["error"]["message"]
    assert "images" in post("/v2/embed", 400, model=EMBED, images=["data:x"])["error"]["message"]


def test_v2_infer_takes_texts_and_token_ids(http: httpx.Client, post: Post, embed_folder: Path) -> None:
    expected = vectors_of(post("/v1/embeddings", input=["the cat", "dog"]))

    def infer(*inputs: dict[str, Any], model: str = EMBED, **parameters: Any) -> Any:
        answer = http.post(f"/v2/models/{model}/infer", json={"inputs": inputs, "parameters": parameters})
        if answer.status_code != 200:
            return answer.json()["error"]
        (output,) = answer.json()["outputs"]
        return np.array(output["data"]).reshape(output["shape"])

    text = {"name": "text", "datatype": "BYTES", "shape": [2, 1], "data": ["the cat", "dog"]}
    assert np.array_equal(infer(text), expected)
    ids = {"name": "input_ids", "datatype": "INT64", "shape": [2, 4], "data": [2, 4, 5, 3, 2, 6, 3, 0]}
    mask = {"name": "attention_mask", "datatype": "INT64", "shape": [2, 4], "data": [1, 1, 1, 1, 1, 1, 1, 0]}
    assert np.array_equal(infer(ids, mask), expected)
    assert infer(text, dimensions=8, normalize=True).shape == (2, 8)
    assert "either the input 'text' or the input 'input_ids'" in infer(text, ids)
    assert "not honoured here" in infer(text, flavour=1)
    pair = {"name": "text_pair", "datatype": "BYTES", "shape": [2, 1], "data": ["dog", "mat"]}
    scores = post("/score", model=SCORE, text_1=["the cat", "dog"], text_2=["dog", "mat"])["data"]
    assert infer(text, pair, model=SCORE).ravel().tolist() == pytest.approx([s["score"] for s in scores], abs=1e-6)
    assert infer(text, model=CLASSIFY).shape == (2, 3)


def test_the_models_stand_in_every_list(http: httpx.Client, post: Post) -> None:
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == [CLASSIFY, EMBED, SCORE]
    assert http.get(f"/v1/models/{EMBED}").json()["max_model_len"] == 32
    index = http.post("/v2/repository/index").json()
    assert [(entry["name"], entry["state"]) for entry in index] == [(n, "READY") for n in (CLASSIFY, EMBED, SCORE)]
    metadata = http.get(f"/v2/models/{EMBED}").json()
    assert metadata["platform"] == "pooling"
    assert metadata["outputs"] == [{"name": "embedding", "datatype": "FP32", "shape": [-1, 32]}]
    before = http.get(f"/v2/models/{EMBED}/stats").json()["model_stats"][0]["inference_count"]
    post("/v1/embeddings", input=["a", "b", "c"])
    assert http.get(f"/v2/models/{EMBED}/stats").json()["model_stats"][0]["inference_count"] == before + 3
    assert http.get("/ready").status_code == 200
    assert http.get(f"/v2/models/{EMBED}/ready").status_code == 200


def test_the_metrics_count_what_happened(http: httpx.Client, post: Post) -> None:
    def metrics() -> dict[str, float]:
        lines = [line for line in http.get("/metrics").text.splitlines() if f'model="{EMBED}"' in line]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    before = metrics()
    post("/v1/embeddings", input="the cat")
    post("/v1/embeddings", input=["dog", "mat"])
    post("/v1/embeddings", 400, input="cat " * 40)
    after = metrics()

    def grown(name: str, **labels: str) -> float:
        listed = ",".join(f'{key}="{value}"' for key, value in sorted({**labels, "model": EMBED}.items()))
        return after[f"{name}{{{listed}}}"] - before.get(f"{name}{{{listed}}}", 0.0)

    assert grown("te_request_count", method="single") == 2
    assert grown("te_request_success", method="single") == 1
    assert grown("te_request_success", method="batch") == 1
    assert grown("te_request_failure", err="invalid_request") == 1
    assert grown("te_texts_total") == 3
    assert grown("te_batch_tokens_total") == 10
    assert grown("te_batch_next_size_sum") == 3
    assert grown("te_request_queue_duration_count") == 2
    assert after[f'te_batch_padding_tokens_total{{model="{EMBED}"}}'] == 0
    assert after[f'te_queue_size{{model="{EMBED}"}}'] == 0


def test_the_openapi_document_names_the_routes(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    for path in ("/v1/embeddings", "/v2/embed", "/v2/rerank", "/predict"):
        assert "requestBody" in document["paths"][path]["post"]
    json.dumps(document)
