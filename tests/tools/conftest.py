"""A scripted server of OpenAI's API over raw sockets: it can answer well, cut anywhere, fail, die and hang."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

MODEL = "fake-model"


@dataclass
class Answer:
    """The bytes of one response, and what comes after them: "keep" the connection, "close", "reset" or "hang"."""

    raw: bytes
    then: str = "keep"
    cut: int = 0  # write in pieces of so many bytes; 0: all at once


@dataclass
class Seen:
    """A request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


def http(status: int, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(body_pieces: list[bytes], *headers: str, end: bool = True) -> bytes:
    head = "\r\n".join(["HTTP/1.1 200 OK", "content-type: text/event-stream", "transfer-encoding: chunked", *headers])
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in body_pieces)
    return head.encode() + b"\r\n\r\n" + pieces + (b"0\r\n\r\n" if end else b"")


def sse(payload: Any) -> bytes:
    return b"data: " + (payload if isinstance(payload, bytes) else json.dumps(payload).encode()) + b"\n\n"


def chat_chunk(content: str | None = None, finish_reason: str | None = None, **delta: str) -> dict[str, Any]:
    if content is not None:
        delta["content"] = content
    return {
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
    }


def text_chunk(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]}


def usage_chunk(prompt_tokens: int, completion_tokens: int, cached_tokens: int | None = None) -> dict[str, Any]:
    usage: dict[str, Any] = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    if cached_tokens is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
    return {"choices": [], "usage": usage}


def chat_events(texts: list[str], prompt_tokens: int = 7, cached_tokens: int | None = 2) -> list[bytes]:
    """A whole answer: role, text, finish, usage, [DONE]."""
    return [
        sse(chat_chunk("", role="assistant")),
        *(sse(chat_chunk(text)) for text in texts),
        sse(chat_chunk(finish_reason="stop")),
        sse(usage_chunk(prompt_tokens, len(texts), cached_tokens)),
        sse(b"[DONE]"),
    ]


@dataclass
class FakeServer:
    """Answers `/v1/models` and `/tokenize` by rule and completions from `answers`, then from `default`."""

    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    answers: deque[Answer] = field(default_factory=deque)
    default: Callable[[Seen], Answer] = field(default_factory=lambda: default_answer)
    count_tokens: Callable[[str, bool], int] | None = None  # (text, is_chat) -> tokens; None: no /tokenize
    num_connections: int = 0
    num_active: int = 0
    max_active: int = 0
    models: list[str] = field(default_factory=lambda: [MODEL])
    hanging: threading.Event = field(default_factory=threading.Event)  # an answer has begun and will not go on
    client_left: threading.Event = field(default_factory=threading.Event)  # while an answer hung

    http = staticmethod(http)
    chunked = staticmethod(chunked)
    sse = staticmethod(sse)
    chat_chunk = staticmethod(chat_chunk)
    text_chunk = staticmethod(text_chunk)
    usage_chunk = staticmethod(usage_chunk)
    chat_events = staticmethod(chat_events)
    answer = Answer

    def push(self, raw: bytes, then: str = "keep", cut: int = 0) -> None:
        """The next completion is answered with `raw`."""
        self.answers.append(Answer(raw, then, cut))

    def push_events(self, events: list[bytes], then: str = "keep", cut: int = 0, end: bool = True) -> None:
        """The next completion is answered with a chunked stream of `events`, whole unless `end` is False."""
        self.push(chunked(events, end=end), then, cut)

    @property
    def completions(self) -> list[Seen]:
        return [seen for seen in self.seen if seen.path.endswith("completions")]

    async def serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while (seen := await read_request(reader)) is not None:
                self.seen.append(seen)
                self.num_active += 1
                self.max_active = max(self.max_active, self.num_active)
                try:
                    answer = self._answer(seen)
                    await asyncio.sleep(0)  # let requests that were sent together meet
                    await write(writer, answer)
                    if answer.then == "hang":
                        self.hanging.set()
                        await reader.read()
                        self.client_left.set()
                finally:
                    self.num_active -= 1
                if answer.then == "reset":
                    writer.transport.abort()
                if answer.then != "keep":
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            self.client_left.set()
        finally:
            writer.close()

    def _answer(self, seen: Seen) -> Answer:
        if seen.path == "/v1/models":
            return json_answer(
                200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}
            )
        if seen.path == "/tokenize":
            if self.count_tokens is None:
                return json_answer(404, {"detail": "Not Found"})
            is_chat = "messages" in seen.body
            text = seen.body["messages"][0]["content"] if is_chat else seen.body["prompt"]
            return json_answer(200, {"count": self.count_tokens(text, is_chat), "tokens": []})
        return self.answers.popleft() if self.answers else self.default(seen)


def json_answer(status: int, content: Any, then: str = "keep") -> Answer:
    return Answer(http(status, json.dumps(content).encode(), "content-type: application/json"), then)


def default_answer(seen: Seen) -> Answer:
    """As many tokens as were asked for; each prompt token is a word."""
    num_tokens = seen.body.get("max_tokens", 3)
    if seen.path.endswith("chat/completions"):
        prompt_tokens = len(seen.body["messages"][-1]["content"].split())
        return Answer(chunked(chat_events([f"w{index} " for index in range(num_tokens)], prompt_tokens)))
    events = [
        sse(text_chunk(f"w{index} ", "length" if index == num_tokens - 1 else None)) for index in range(num_tokens)
    ]
    usage = usage_chunk(len(seen.body["prompt"].split()), num_tokens)
    return Answer(chunked([*events, sse(usage), sse(b"[DONE]")]))


async def read_request(reader: asyncio.StreamReader) -> Seen | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    request_line, *lines = head.decode().rstrip().split("\r\n")
    method, path, _ = request_line.split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Seen(method, path, headers, json.loads(body) if body else {})


async def write(writer: asyncio.StreamWriter, answer: Answer) -> None:
    cut = answer.cut or max(len(answer.raw), 1)
    for start in range(0, len(answer.raw), cut):
        writer.write(answer.raw[start : start + cut])
        await writer.drain()
        await asyncio.sleep(0)


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    """A server in a thread of its own, so that tests may block and start processes that talk to it."""
    server = FakeServer()
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def main() -> None:
        listener = await asyncio.start_server(server.serve_connection, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
        started.set()
        await stop.wait()
        listener.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    assert started.wait(10)
    yield server
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()
