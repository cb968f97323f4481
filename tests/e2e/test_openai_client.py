"""The official client against the real thing: chat, completions, streams, the prefix cache, several models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

MESSAGES: Any = [{"role": "user", "content": "Name three colours."}]


def test_the_plan_is_printed_before_loading(server: Any) -> None:
    assert "KV cache" in server.output
    assert "weights" in server.output
    assert server.output.index("KV cache") < server.output.index("Ready in")


def test_a_stream_says_what_the_whole_answer_says(server: Any) -> None:
    client = server.client()
    ask = {"model": "smollm2-135m-instruct", "messages": MESSAGES, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert text.strip()
    finish = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert finish == [whole.choices[0].finish_reason]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_next_turn_of_a_chat_finds_the_one_before_in_the_cache(server: Any) -> None:
    client = server.client()
    turn: Any = [{"role": "user", "content": "Tell me about the river Thames, in a few sentences please."}]
    first = client.chat.completions.create(model="smollm2-135m-instruct", messages=turn, temperature=0, max_tokens=60)
    turn += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And how long is it?"},
    ]
    second = client.chat.completions.create(model="smollm2-135m-instruct", messages=turn, temperature=0, max_tokens=5)
    # all full blocks of the first turn, its answer included, but for what the template changes around the answer's end
    assert second.usage.prompt_tokens_details.cached_tokens >= (first.usage.total_tokens - 2) // 16 * 16 - 16


def test_a_seed_makes_a_sampled_answer_repeatable_beside_strangers(server: Any) -> None:
    async def ask(client: openai.AsyncOpenAI, seed: int) -> list[str]:
        answer = await client.chat.completions.create(
            model="smollm2-135m-instruct", messages=MESSAGES, temperature=1.0, seed=seed, max_tokens=24, n=2
        )
        return [choice.message.content or "" for choice in answer.choices]

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60) as client:
            alone = await ask(client, 7)
            crowd = await asyncio.gather(*(ask(client, seed) for seed in (1, 2, 7, 3, 4)))
            assert crowd[2] == alone
            assert alone[0] != alone[1]
            assert len({tuple(texts) for texts in crowd}) == 5

    asyncio.run(run())


def test_completions_echo_and_score_a_prompt(server: Any) -> None:
    answer = server.client().completions.create(
        model="smollm2-135m-instruct",
        prompt="The capital of France is",
        max_tokens=1,
        temperature=0,
        echo=True,
        logprobs=2,
    )
    choice = answer.choices[0]
    assert choice.text.startswith("The capital of France is")
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
    assert "".join(choice.logprobs.tokens) == choice.text


def test_a_stop_string_never_shows(server: Any) -> None:
    ask = {"model": "smollm2-135m-instruct", "prompt": "1, 2, 3, 4, 5, 6,", "temperature": 0, "max_tokens": 40}
    free = server.client().completions.create(**ask).choices[0].text
    stop = free[10:14]
    chunks = server.client().completions.create(**ask, stop=[stop], stream=True)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == free[: free.index(stop)]


def test_a_prompt_beyond_the_context_is_refused_with_both_lengths(server: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="8192"):
        server.client().completions.create(model="smollm2-135m-instruct", prompt=[5] * 9000)


def test_health_and_metrics_after_work(server: Any) -> None:
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/ready").status_code == 200
    assert server.metric("vllm:generation_tokens_total") == server.metric("llmserve:generation_tokens_total") > 0


def test_two_models_each_with_its_own_engine(start_server: Callable[..., Any], smollm2_path: Path) -> None:
    gguf = next(smollm2_path.glob("*.gguf"))
    two = start_server(
        str(smollm2_path), str(gguf), "--served-model-name", "folder", "file", "--kv-cache-memory", "64MiB"
    )
    assert two.url, two.output
    client = two.client()
    assert [model.id for model in client.models.list()] == ["folder", "file"]
    assert len(two.engines()) == 2
    for name in ("folder", "file"):
        answer = client.completions.create(model=name, prompt="Gravity is", max_tokens=4, temperature=0)
        assert answer.model == name
        assert answer.choices[0].text.startswith(" a")
    with pytest.raises(openai.NotFoundError, match="folder"):
        client.completions.create(model="neither", prompt="x")
    assert two.stop() == 0
