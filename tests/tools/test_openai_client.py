"""The OpenAI client: what it makes of good, cut, broken and refused streams."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest

from llmserve.tools.http_client import ClientError
from llmserve.tools.openai_client import (
    Chunk,
    OpenAIClient,
    TimedChunk,
    api_key_from_environment,
    choose_model,
    encode_request,
    error_message,
)


async def collect(url: str, endpoint: Any = "chat", api_key: str | None = None) -> list[TimedChunk]:
    client = OpenAIClient(url, api_key)
    try:
        async with client.stream(endpoint, encode_request(endpoint, "m", "hi", max_tokens=3)) as stream:
            return [timed for batch in stream_batches([batch async for batch in stream]) for timed in batch]
    finally:
        client.close()


def stream_batches(batches: list[list[TimedChunk]]) -> list[list[TimedChunk]]:
    assert all(batches), "an empty batch means nothing"
    return batches


@pytest.mark.parametrize("cut", [0, 1, 7, 64])
def test_an_answer_is_read_however_it_was_cut(fake_server: Any, cut: int) -> None:
    fake_server.push_events(fake_server.chat_events(["Hé", "llo ", "wörld"], 9, 4), cut=cut)
    chunks = asyncio.run(collect(fake_server.url))
    assert "".join(chunk.text for _, chunk in chunks) == "Hello wörld".replace("e", "é")
    assert [chunk.brings_tokens for _, chunk in chunks] == [False, True, True, True, False, False]
    assert [chunk.finish_reason for _, chunk in chunks] == [None] * 4 + ["stop", None]
    usage = chunks[-1].chunk.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (9, 3, 4)
    times = [time_s for time_s, _ in chunks]
    assert times == sorted(times)


def test_a_completion_is_read(fake_server: Any) -> None:
    chunks = asyncio.run(collect(fake_server.url, "completions"))
    assert "".join(chunk.text for _, chunk in chunks) == "w0 w1 w2 "
    assert chunks[-1].chunk.usage is not None
    assert chunks[-1].chunk.usage.cached_tokens is None


def test_reasoning_counts_as_tokens_under_either_name() -> None:
    decoder = msgspec.json.Decoder(Chunk)
    for name in ("reasoning", "reasoning_content"):
        chunk = decoder.decode(json.dumps({"choices": [{"delta": {name: "hm"}}]}))
        assert chunk.brings_tokens
        assert (chunk.text, chunk.reasoning) == ("", "hm")


def test_done_is_not_needed_after_a_finish_reason(fake_server: Any) -> None:
    fake_server.push_events(fake_server.chat_events(["a"])[:-1])
    assert len(asyncio.run(collect(fake_server.url))) == 4


@pytest.mark.parametrize(
    ("payload", "kind", "message"),
    [
        (b'data: {"error": {"message": "engine died", "code": 500}}\n\n', "stream_error", "engine died"),
        (b'event: error\ndata: {"message": "gone"}\n\n', "stream_error", "gone"),
        (b"event: error\ndata: plain words\n\n", "stream_error", "plain words"),
        (b"data: {not json}\n\n", "protocol", "not json"),
        (b'data: {"choices": 5}\n\n', "protocol", "choices"),
    ],
)
def test_an_error_in_mid_stream_is_raised(fake_server: Any, payload: bytes, kind: str, message: str) -> None:
    fake_server.push_events([*fake_server.chat_events(["a"])[:2], payload, fake_server.sse(b"[DONE]")])
    with pytest.raises(ClientError, match=message) as error:
        asyncio.run(collect(fake_server.url))
    assert error.value.kind == kind


@pytest.mark.parametrize(("then", "end"), [("close", False), ("reset", False), ("close", True)])
def test_a_stream_that_dies_is_raised(fake_server: Any, then: str, end: bool) -> None:
    fake_server.push_events(fake_server.chat_events(["a", "b"])[:3], then=then, end=end)
    with pytest.raises(ClientError) as error:
        asyncio.run(collect(fake_server.url))
    assert error.value.kind == "disconnected"


def test_a_refusal_is_raised_with_its_message(fake_server: Any) -> None:
    fake_server.push(fake_server.http(429, b'{"error": {"message": "the queue is full", "type": "x"}}'))
    with pytest.raises(ClientError, match="HTTP 429: the queue is full") as error:
        asyncio.run(collect(fake_server.url))
    assert error.value.kind == "http_429"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "m"}}', "m"),
        (b'{"error": "m"}', "m"),
        (b'{"detail": "m"}', "{'detail': 'm'}"),
        (b"<html>m</html>", "<html>m</html>"),
        (b"", "no message"),
        (b'{"error": {"code": 5}}', "{'code': 5}"),
    ],
)
def test_error_message(body: bytes, message: str) -> None:
    assert error_message(body) == message


def test_what_is_sent(fake_server: Any) -> None:
    asyncio.run(collect(fake_server.url, api_key="secret"))
    (seen,) = fake_server.completions
    assert (seen.method, seen.path) == ("POST", "/v1/chat/completions")
    assert seen.headers["authorization"] == "Bearer secret"
    assert seen.headers["host"] == fake_server.url.split("/")[2]
    assert seen.headers["content-type"] == "application/json"
    assert seen.body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_encode_request_leaves_out_what_is_not_asked_for() -> None:
    body = json.loads(encode_request("completions", "m", "p", temperature=0.0, ignore_eos=True))
    assert body["prompt"] == "p"
    assert (body["temperature"], body["ignore_eos"]) == (0.0, True)
    assert set(json.loads(encode_request("chat", "m", "p"))) == {"model", "messages", "stream", "stream_options"}


@pytest.mark.parametrize("form", ["http://{}", "http://{}/", "http://{}/v1", "http://{}/v1/", "{}", "{}/v1"])
def test_the_address_may_be_given_with_v1_and_without(fake_server: Any, form: str) -> None:
    chunks = asyncio.run(collect(form.format(fake_server.url.split("/")[2])))
    assert chunks
    assert [seen.path for seen in fake_server.completions] == ["/v1/chat/completions"]


def test_models_and_tokenize(fake_server: Any) -> None:
    async def main() -> None:
        client = OpenAIClient(fake_server.url)
        assert await choose_model(client, None) == "fake-model"
        assert await choose_model(client, "mine") == "mine"
        assert await client.count_tokens("chat", "m", "a b c") is None
        fake_server.count_tokens = lambda text, is_chat: len(text.split()) + 10 * is_chat
        assert await client.count_tokens("chat", "m", "a b c") == 13
        assert await client.count_tokens("completions", "m", "a b c") == 3
        fake_server.models = []
        with pytest.raises(ClientError, match="no model"):
            await choose_model(client, None)
        client.close()

    asyncio.run(main())


def test_api_key_comes_from_the_flag_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMSERVE_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "openai")
    assert api_key_from_environment(None) == "openai"
    monkeypatch.setenv("LLMSERVE_API_KEY", "ours")
    assert api_key_from_environment(None) == "ours"
    assert api_key_from_environment("flag") == "flag"
