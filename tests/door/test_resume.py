"""A client loses its connection and comes back: what it gets, and when it is too late."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from llmserve.api.body_memory import BodyMemory
from llmserve.api.door import Door
from llmserve.api.gatekeeper import Gatekeeper
from llmserve.api.resume import AsItStands, ResumableStreams, event_ids
from llmserve.api.settings import ApiSettings
from llmserve.api.stream import EventStreamResponse
from llmserve.backends.generation import GenerationDelta
from llmserve.errors import QueueFullError, StreamGoneError
from llmserve.request_context import CURRENT_REQUEST, RequestContext, Tenant
from tests.door.conftest import GuardedServer, ServeGuarded

STREAM = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "stream_options": {"include_usage": True}}
ANSWER = "The quick brown fox jumps over the lazy dog."


@pytest.fixture
def served(serve_guarded: ServeGuarded) -> GuardedServer:
    server = serve_guarded(settings=ApiSettings(resume_window_s=30.0))
    server.script.answer = ANSWER
    return server


def ids(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"^id: (\d+)$", text, re.MULTILINE)]


def datas(text: str) -> list[str]:
    """The events' data, without what differs between two requests."""
    return [re.sub(r'"(id|created)":("[^"]*"|\d+),', "", data) for data in re.findall(r"^data: (.*)$", text, re.M)]


def test_every_event_has_an_id_where_streams_may_be_continued(
    served: GuardedServer, serve_guarded: ServeGuarded
) -> None:
    with served.client() as client:
        text = client.post("/v1/chat/completions", json=STREAM).text
    assert ids(text) == list(range(1, text.count("\n\n") + 1))
    assert text.endswith("data: [DONE]\n\n")
    plain = serve_guarded()
    plain.script.answer = ANSWER
    with plain.client() as client:
        without = client.post("/v1/chat/completions", json=STREAM).text
    assert "id: " not in without
    assert datas(without) == datas(text)


@pytest.mark.parametrize("lost_after", [1, 2, 9, 30])
def test_a_lost_client_goes_on_where_it_was(served: GuardedServer, lost_after: int) -> None:
    with served.client() as client:
        whole = client.post("/v1/chat/completions", json=STREAM).text
    served.script.hold_after = 30  # the model waits in the middle of the answer
    key = {"Idempotency-Key": f"key-{lost_after}"}
    with served.client() as client, client.stream("POST", "/v1/chat/completions", json=STREAM, headers=key) as first:
        seen = ""
        for line in first.iter_lines():
            seen += line + "\n"
            if ids(seen)[-1:] == [lost_after] and not line:
                break
    held = served.script.held.get(timeout=10)
    assert served.script.aborted.empty()  # its client is gone, and it is not
    held.release()
    with served.client() as client:
        rest = client.post("/v1/chat/completions", json=STREAM, headers=key | {"Last-Event-ID": str(lost_after)}).text
    assert ids(rest)[0] == lost_after + 1
    assert datas(seen + rest) == datas(whole)
    assert len(served.script.specs) == 2  # it was generated once (and the other one before)


def test_what_has_ended_is_read_again_with_the_same_key(served: GuardedServer) -> None:
    key = {"Idempotency-Key": "again"}
    with served.client() as client:
        first = client.post("/v1/chat/completions", json=STREAM, headers=key).text
        assert client.post("/v1/chat/completions", json=STREAM, headers=key).text == first
        last = ids(first)[-1]
        end = client.post("/v1/chat/completions", json=STREAM, headers=key | {"Last-Event-ID": str(last - 1)})
        assert datas(end.text) == ["[DONE]"]


@pytest.mark.parametrize(
    ("headers", "body", "status", "code"),
    [
        ({"Last-Event-ID": "3", "Idempotency-Key": "never"}, {}, 410, "stream_not_found"),
        ({"Last-Event-ID": "x", "Idempotency-Key": "known"}, {}, 400, "invalid_request"),
        ({"Last-Event-ID": "999", "Idempotency-Key": "known"}, {}, 410, "stream_not_found"),
        ({"Idempotency-Key": "known"}, {"temperature": 0.5}, 409, "idempotency_key_reused"),
        ({"Idempotency-Key": "k" * 256}, {}, 400, "invalid_request"),
    ],
)
def test_what_cannot_be_continued_is_said(
    served: GuardedServer, headers: dict[str, str], body: dict[str, Any], status: int, code: str
) -> None:
    with served.client() as client:
        assert client.post("/v1/chat/completions", json=STREAM, headers={"Idempotency-Key": "known"}).is_success
        refused = client.post("/v1/chat/completions", json=STREAM | body, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)


def test_an_error_before_the_first_event_has_its_status(served: GuardedServer) -> None:
    served.script.refuse = QueueFullError("full", 3.0)
    with served.client() as client:
        refused = client.post("/v1/chat/completions", json=STREAM, headers={"Idempotency-Key": "full"})
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "3"


def test_who_was_refused_may_ask_again_with_the_same_key(served: GuardedServer) -> None:
    key = {"Idempotency-Key": "again-and-again"}
    served.script.refuse = QueueFullError("full", 1.0)
    with served.client() as client:
        for _ in range(2):
            assert client.post("/v1/chat/completions", json=STREAM, headers=key).status_code == 429
        served.script.refuse = None
        answer = client.post("/v1/chat/completions", json=STREAM, headers=key)
        assert answer.text.endswith("data: [DONE]\n\n")
        assert client.post("/v1/chat/completions", json=STREAM, headers=key).text == answer.text


def test_a_server_that_keeps_no_streams_says_so(serve_guarded: ServeGuarded) -> None:
    key = {"Idempotency-Key": "k"}
    with serve_guarded().client() as client:
        assert client.post("/v1/chat/completions", json=STREAM, headers=key).is_success
        refused = client.post("/v1/chat/completions", json=STREAM, headers=key | {"Last-Event-ID": "1"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (410, "stream_not_found")
    assert "--resume-window-s" in refused.text


def test_who_does_not_come_back_is_given_up(serve_guarded: ServeGuarded) -> None:
    served = serve_guarded(settings=ApiSettings(resume_window_s=0.05))
    served.script.hold_after = 2
    key = {"Idempotency-Key": "lost"}
    with served.client() as client, client.stream("POST", "/v1/chat/completions", json=STREAM, headers=key) as first:
        next(first.iter_lines())
    assert served.script.aborted.get(timeout=10) == served.script.request_ids[0]
    with served.client() as client:
        gone = client.post("/v1/chat/completions", json=STREAM, headers=key | {"Last-Event-ID": "1"})
    assert gone.status_code == 410


class Endless:
    """A generation that says a line whenever it is asked; one delta at a time."""

    request_id = "endless"
    num_left = 0

    async def __aenter__(self) -> Endless:
        self.num_left += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self.num_left -= 1

    async def __aiter__(self) -> Any:
        while True:
            await asyncio.sleep(0)
            yield []


class Numbered:
    """Events of 100 bytes with ids."""

    def __init__(self) -> None:
        self._ids: Iterator[bytes] = event_ids(True)

    def opening(self) -> bytes:
        return b""

    def encode(self, deltas: list[GenerationDelta]) -> bytes:
        return next(self._ids) + b"data: " + b"x" * 80 + b"\n\n"

    def closing(self) -> bytes:
        return b""


async def fill(max_bytes: int) -> tuple[int, int]:
    """(bytes kept, generations running) when nobody reads for long, then after the window."""
    streams = ResumableStreams(0.2, max_bytes=max_bytes)
    endless = Endless()
    start: Any = lambda: endless  # noqa: E731
    reader = streams.open("k", None, b"body", start, Numbered())
    async with reader:
        async for _ in reader:
            break
    stream = streams._streams["", "k"]
    for _ in range(2000):
        await asyncio.sleep(0)
    kept = stream._num_bytes
    with pytest.raises(StreamGoneError):
        stream.attach(1)
    task = stream._task
    assert task is not None
    await asyncio.wait((task,), timeout=10)  # the window ends it
    assert not streams._streams
    return kept, endless.num_left


def test_the_buffer_is_bounded_and_nothing_is_left() -> None:
    kept, num_left = asyncio.run(fill(5000))
    assert 4000 < kept <= 5000
    assert num_left == 0


class Broken(Numbered):
    """Fails in a way nobody has thought of, behind an event."""

    def encode(self, deltas: list[GenerationDelta]) -> bytes:
        if next(self._ids) == b"id: 2\n":
            raise ZeroDivisionError
        return b"id: 1\ndata: x\n\n"


async def use(encoder: Numbered, max_bytes: int, *, reads_late: bool) -> list[bytes]:
    """All that a reader gets, until the error that ends it."""
    streams = ResumableStreams(0.01, max_bytes=max_bytes)
    start: Any = Endless
    reader = streams.open("k", None, b"body", start, encoder)
    got: list[bytes] = []
    async with reader:
        if reads_late:
            await asyncio.sleep(0.05)
        try:
            async for events in reader:
                got.append(events)
        except (StreamGoneError, ZeroDivisionError):
            return got
    pytest.fail("it ended as if all were well")


def test_a_reader_that_is_too_slow_gets_no_stream_with_a_hole() -> None:
    assert asyncio.run(asyncio.wait_for(use(Numbered(), 2000, reads_late=True), 10)) == []


def test_a_fault_of_ours_ends_the_stream_for_its_readers() -> None:
    assert asyncio.run(asyncio.wait_for(use(Broken(), 2000, reads_late=False), 10)) == [b"id: 1\ndata: x\n\n"]


def test_a_tenant_keeps_its_share_of_the_streams_and_no_more() -> None:
    async def scenario() -> None:
        streams = ResumableStreams(10.0, max_streams=4)
        start: Any = Endless

        def ask(name: str, key: str) -> None:
            CURRENT_REQUEST.set(RequestContext(tenant=Tenant(name=name, share=0.5)))
            streams.open(key, None, b"body", start, Numbered())

        for key in ("1", "2", "2"):
            ask("a", key)
        with pytest.raises(QueueFullError, match="'a'"):
            ask("a", "3")
        ask("b", "1")
        for stream in list(streams._streams.values()):
            stream.close()
        await asyncio.sleep(0)

    asyncio.run(scenario())


def test_a_newer_connection_takes_over(served: GuardedServer) -> None:
    served.script.hold_after = 5
    key = {"Idempotency-Key": "twice"}
    with (
        served.client() as old,
        served.client() as new,
        old.stream("POST", "/v1/chat/completions", json=STREAM, headers=key) as first,
    ):
        lines = first.iter_lines()
        next(lines)
        held = served.script.held.get(timeout=10)
        with new.stream("POST", "/v1/chat/completions", json=STREAM, headers=key) as second:
            newer = second.iter_lines()
            next(newer)
            held.release()
            assert "data: [DONE]" in list(newer)
        assert "data: [DONE]" not in _rest(lines)


def _rest(lines: Iterator[str]) -> list[str]:
    """What still comes, until the connection ends in whatever way."""
    rest: list[str] = []
    with contextlib.suppress(httpx.HTTPError):
        rest.extend(lines)
    return rest


class Brief(Endless):
    """Ends by itself."""

    async def __aiter__(self) -> Any:
        for _ in range(2):
            await asyncio.sleep(0)
            yield []


def test_a_deadline_that_passes_while_the_last_event_is_sent_adds_nothing() -> None:
    sent: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        start: Any = Brief
        reader = ResumableStreams(30.0).open("k", None, b"body", start, Numbered())
        response = EventStreamResponse(
            lambda: reader, AsItStands(), keep_alive_s=15.0, on_disconnect=lambda: None, headers={}
        )
        await response(scope, receive, send)

    async def slow(message: Any) -> None:
        sent.append(message.get("body", b""))
        if b"id: 2" in sent[-1]:
            await asyncio.sleep(0.1)  # a full socket

    async def nothing() -> Any:
        return await asyncio.get_running_loop().create_future()

    door = Door(app, gatekeeper=Gatekeeper(None), body_memory=BodyMemory(1 << 20))
    scope = {"type": "http", "path": "/v1/completions", "headers": [(b"x-request-timeout", b"0.05")], "client": None}
    asyncio.run(door(scope, nothing, slow))
    assert b"".join(sent).count(b"\n\n") == 2
    assert b"error" not in b"".join(sent)
