"""Talks to any OpenAI-compatible server: its models, tokenizer and streamed completions. Knows no load, no screen."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal, NamedTuple

import msgspec

from llmserve.tools.http_client import ClientError, Clock, Connection, HttpClient, read_all
from llmserve.tools.sse import ServerSentEvent, SseDecoder

DEFAULT_URL = "http://127.0.0.1:8000/v1"
Endpoint = Literal["chat", "completions"]
PATHS: dict[Endpoint, str] = {"chat": "/chat/completions", "completions": "/completions"}


class PromptTokensDetails(msgspec.Struct):
    """Of the prompt's tokens, those the server took from its prefix cache."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """The server's own count of tokens."""

    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: PromptTokensDetails | None = None

    @property
    def cached_tokens(self) -> int | None:
        """None where the server does not say."""
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else None


class Delta(msgspec.Struct):
    """The news in a chat chunk. Servers disagree on the name of the reasoning field."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class Choice(msgspec.Struct):
    """One choice of a chunk: `delta` in a chat, `text` in a completion."""

    delta: Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    """A streamed chunk, as far as these tools read it; every other field is skipped without being built."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None

    @property
    def text(self) -> str:
        """What this chunk adds to the answer."""
        if not self.choices:
            return ""
        choice = self.choices[0]
        return (choice.delta.content if choice.delta else choice.text) or ""

    @property
    def reasoning(self) -> str:
        """What this chunk adds to the reasoning before the answer, where the server keeps the two apart."""
        delta = self.choices[0].delta if self.choices else None
        return (delta.reasoning or delta.reasoning_content or "") if delta else ""

    @property
    def brings_tokens(self) -> bool:
        """Whether text of any kind, reasoning included, came with this chunk: a role or a usage chunk brings none."""
        for choice in self.choices:
            if choice.text:
                return True
            delta = choice.delta
            if delta is not None and (delta.content or delta.reasoning or delta.reasoning_content):
                return True
        return False

    @property
    def finish_reason(self) -> str | None:
        """Set on the last chunk of an answer."""
        return self.choices[0].finish_reason if self.choices else None


class TimedChunk(NamedTuple):
    """A chunk and when its last byte arrived, in seconds of the client's clock."""

    time_s: float
    chunk: Chunk


class ModelCard(msgspec.Struct):
    """An entry of `/v1/models`. `max_model_len` is an extension that vLLM and llmserve give."""

    id: str
    max_model_len: int | None = None


class _ModelList(msgspec.Struct):
    data: list[ModelCard]


class _TokenizeAnswer(msgspec.Struct):
    count: int


class CompletionStream:
    """The chunks of one answer, in batches: all that have arrived are handed out together."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sse = SseDecoder()
        self._decoder = msgspec.json.Decoder(Chunk)
        self._finished = False  # a finish reason came
        self._done = False  # `[DONE]` came

    async def __aiter__(self) -> AsyncIterator[list[TimedChunk]]:
        """Raises ClientError: "stream_error" (the server said so), "protocol", or "disconnected" before the finish."""
        while pieces := await self._connection.read():
            batch: list[TimedChunk] = []
            for time_s, data in pieces:
                for event in self._sse.feed(data):
                    if event.data == b"[DONE]":
                        self._done = True
                        continue
                    batch.append(TimedChunk(time_s, self._decode(event)))
            if batch:
                yield batch
        if not (self._done or self._finished):
            raise ClientError("disconnected", "The stream ended without a finish reason and without [DONE].")

    def _decode(self, event: ServerSentEvent) -> Chunk:
        try:
            chunk = self._decoder.decode(event.data)
        except msgspec.DecodeError as error:
            if event.event == b"error":
                raise ClientError("stream_error", event.data.decode(errors="replace")) from None
            raise ClientError(
                "protocol", f"A chunk is not what OpenAI's API sends: {error}: {event.data[:200]!r}"
            ) from None
        if chunk.error is not None or event.event == b"error":
            raise ClientError("stream_error", error_message(event.data))
        if chunk.finish_reason is not None:
            self._finished = True
        return chunk


class OpenAIClient:
    """One server. `url` is what the `openai` package calls base_url; without a path it is taken to end with `/v1`."""

    def __init__(self, url: str = DEFAULT_URL, api_key: str | None = None, clock: Clock = time.perf_counter) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = HttpClient(url, headers, clock)
        self._base = self._http.url.path or "/v1"
        self.clock = clock

    def close(self) -> None:
        """Closes idle connections."""
        self._http.close()

    async def models(self) -> list[ModelCard]:
        """What the server serves. Raises ClientError."""
        status, body = await self._http.fetch("GET", f"{self._base}/models")
        _raise_for_status(status, body)
        try:
            return msgspec.json.decode(body, type=_ModelList).data
        except msgspec.DecodeError as error:
            raise ClientError("protocol", f"{self._base}/models is not a list of models: {error}") from None

    async def count_tokens(self, endpoint: Endpoint, model: str, text: str) -> int | None:
        """How many tokens of prompt `text` becomes, template and special tokens included.

        Asks `/tokenize`, which vLLM, SGLang and llmserve have beside `/v1`; None where a server has none.
        """
        request: dict[str, Any] = {"model": model}
        if endpoint == "chat":
            request["messages"] = [{"role": "user", "content": text}]
            request["add_generation_prompt"] = True
        else:
            request["prompt"] = text
        path = f"{self._base.removesuffix('/v1')}/tokenize"
        status, body = await self._http.fetch("POST", path, msgspec.json.encode(request))
        if status != 200:
            return None
        try:
            return msgspec.json.decode(body, type=_TokenizeAnswer).count
        except msgspec.DecodeError:
            return None

    @asynccontextmanager
    async def stream(self, endpoint: Endpoint, body: bytes) -> AsyncIterator[CompletionStream]:
        """Posts `body` (JSON, with `"stream": true`). Leaving the context early aborts the request at the server.

        Raises ClientError; `kind` is "http_<status>" when the server refuses.
        """
        async with self._http.stream("POST", self._base + PATHS[endpoint], body) as connection:
            if connection.status != 200:
                _raise_for_status(connection.status, await read_all(connection))
            yield CompletionStream(connection)


def encode_request(
    endpoint: Endpoint,
    model: str,
    prompt: str | list[dict[str, str]],
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    ignore_eos: bool = False,
) -> bytes:
    """The body of a streamed request that asks for usage. What is None or False is left out: the server decides.

    `prompt` is a text, or, for "chat" only, the messages so far.
    """
    request: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if endpoint == "completions":
        request["prompt"] = prompt
    else:
        request["messages"] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if max_tokens is not None:
        request["max_tokens"] = max_tokens
    if temperature is not None:
        request["temperature"] = temperature
    if ignore_eos:
        request["ignore_eos"] = True
    return msgspec.json.encode(request)


def error_message(body: bytes) -> str:
    """The message in an error body: OpenAI's form, `{"error": "..."}`, or whatever text there is."""
    try:
        content = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body[:500].decode(errors="replace").strip() or "no message"
    error = content.get("error", content) if isinstance(content, dict) else content
    if isinstance(error, dict):
        error = error.get("message") or error
    return str(error)


def api_key_from_environment(argument: str | None) -> str | None:
    """`--api-key` if given, else `LLMSERVE_API_KEY`, else `OPENAI_API_KEY`."""
    return argument or os.environ.get("LLMSERVE_API_KEY") or os.environ.get("OPENAI_API_KEY") or None


async def choose_model(client: OpenAIClient, wanted: str | None) -> str:
    """`wanted`, or the first model of the server. Raises ClientError if it serves none."""
    if wanted:
        return wanted
    models = await client.models()
    if not models:
        raise ClientError("no_model", "The server serves no model.")
    return models[0].id


def _raise_for_status(status: int, body: bytes) -> None:
    if status != 200:
        raise ClientError(f"http_{status}", f"HTTP {status}: {error_message(body)}")
