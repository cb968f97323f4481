"""One HTTP exchange of the v2 skin, in plain ASGI: its headers, its body within limits, its answer. Knows no route."""

from __future__ import annotations

import asyncio
import gzip
import math
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

import msgspec
from starlette.types import Message, Receive, Scope, Send

from llmserve.api.http_protocol import MAX_LENGTH_DIGITS
from llmserve.api.v2_errors import MalformedRequestError, error_kind, error_text
from llmserve.api.v2_settings import V2HttpSettings
from llmserve.errors import (
    InferenceError,
    InvalidRequestError,
    LLMServeError,
    QueueFullError,
    RequestTooLargeError,
)

JSON = b"application/json"
OCTETS = b"application/octet-stream"
_GZIP_WINDOW = 16 + zlib.MAX_WBITS
_JOIN_BELOW_BYTES = 65536  # up to here a copy is cheaper than one more write to the socket
_WATCH_AFTER_S = 0.05  # quicker requests are over before anyone would notice that their client has gone

Part = bytes | bytearray | memoryview


@dataclass(slots=True)
class HttpAnswer:
    """What goes back, in one piece."""

    body: bytes = b""
    status: int = 200
    content_type: bytes = JSON
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    parts: Sequence[Part] = ()  # follow `body`


class ClientGoneError(Exception):
    """The client closed the connection; what it had asked for is cancelled."""


class HttpCall:
    """A request while it is being answered. `model`, `version`, ... are what its path says."""

    __slots__ = (
        "_watches",
        "headers",
        "method",
        "model",
        "receive",
        "region",
        "repository",
        "send",
        "settings",
        "started",
        "status",
        "version",
    )

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, settings: V2HttpSettings, watches: DisconnectWatches
    ) -> None:
        self._watches = watches
        self.method: str = scope["method"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.receive = receive
        self.send = send
        self.settings = settings
        self.model = ""
        self.version = ""
        self.repository = ""
        self.region = ""
        self.started = False  # whether the answer's status has been sent
        self.status = 500

    async def read_body(self) -> bytes:
        """All of it, decompressed. Raises RequestTooLargeError, InvalidRequestError, InferenceError."""
        limit = self.settings.max_body_bytes
        encoding = self.headers.get(b"content-encoding", b"")
        if encoding and encoding not in (b"identity", b"gzip", b"deflate"):
            raise InferenceError("Unsupported compression type", InferenceError.UNSUPPORTED)
        declared = self.headers.get(b"content-length", b"")
        if declared.isdigit() and len(declared) <= MAX_LENGTH_DIGITS:  # one of more is mostly zeros
            check_size(int(declared), limit)
        message = await self._receive_body()
        body: bytes = message.get("body", b"")
        if message.get("more_body"):
            chunks = [body]
            size = len(body)
            while message.get("more_body"):
                message = await self._receive_body()
                chunk = message.get("body", b"")
                size += len(chunk)
                check_size(size, limit)
                chunks.append(chunk)
            body = b"".join(chunks)
        check_size(len(body), limit)
        if encoding in (b"gzip", b"deflate"):
            return await asyncio.to_thread(_decompress, body, limit)
        return body

    async def _receive_body(self) -> Message:
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        return message

    async def answer(self, answer: HttpAnswer) -> None:
        """Sends it."""
        parts = answer.parts
        body = answer.body
        length = len(body)
        if parts:
            length += sum(memoryview(part).nbytes for part in parts)
            if length <= _JOIN_BELOW_BYTES:
                body, parts = b"".join((body, *parts)), ()
        headers = [(b"content-type", answer.content_type), (b"content-length", b"%d" % length), *answer.headers]
        await self.start(answer.status, headers)
        for part in parts:
            await self.send({"type": "http.response.body", "body": body, "more_body": True})
            body = memoryview(part).cast("B")  # type: ignore[assignment]
        await self.send({"type": "http.response.body", "body": body})

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Sends the status and the headers; the body follows."""
        self.started, self.status = True, status
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def compress(self, body: bytes, parts: Sequence[Part]) -> tuple[bytes, bytes]:
        """(encoding, compressed body) by what the client accepts; an empty encoding means: send it as it is."""
        encoding = preferred_encoding(self.headers.get(b"accept-encoding", b""))
        if not encoding:
            return b"", body
        whole = b"".join((body, *parts))
        if len(whole) <= _JOIN_BELOW_BYTES:
            return encoding, _compress(whole, encoding)
        return encoding, await asyncio.to_thread(_compress, whole, encoding)

    def watch(self) -> DisconnectWatch:
        """Cancels what runs inside when the client goes. The body must have been read."""
        return self._watches.watch(self.receive)


class DisconnectWatch:
    """Cancels the task inside it once the client has gone. `begin` is called when a request has taken long enough."""

    __slots__ = ("_gone", "_receive", "_task", "_watcher", "begin_s")

    def __init__(self, receive: Receive, task: asyncio.Task[object], begin_s: float) -> None:
        self.begin_s = begin_s
        self._receive: Receive | None = receive
        self._task: asyncio.Task[object] | None = task
        self._gone = False
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task, self._receive = self._task, None, None  # the list of watches must not keep them
        if self._watcher is not None:
            self._watcher.cancel()
            assert task is not None
            if self._gone and kind is asyncio.CancelledError and not task.uncancel():
                raise ClientGoneError from error

    @property
    def over(self) -> bool:
        """Nothing is left to watch."""
        return self._task is None

    def begin(self) -> None:
        """From here on its client's going is noticed."""
        assert self._receive is not None
        assert self._task is not None
        self._watcher = asyncio.create_task(self._watch(self._receive, self._task), name="disconnect watch")

    async def _watch(self, receive: Receive, task: asyncio.Task[object]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        task.cancel()


class DisconnectWatches:
    """Those of all requests: one timer for them together, as most are over before it would fire."""

    def __init__(self) -> None:
        self._waiting: deque[DisconnectWatch] = deque()  # in the order in which they begin
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, receive: Receive) -> DisconnectWatch:
        """For what the current task does next; the request's body must have been read."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        assert task is not None
        watch = DisconnectWatch(receive, task, loop.time() + _WATCH_AFTER_S)
        self._waiting.append(watch)
        if self._timer is None:
            self._timer = loop.call_later(_WATCH_AFTER_S, self._begin_due, loop)
        return watch

    def _begin_due(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now_s = loop.time()
        while self._waiting:
            first = self._waiting[0]
            if not first.over:
                if first.begin_s > now_s:
                    self._timer = loop.call_at(first.begin_s, self._begin_due, loop)
                    return
                first.begin()
            self._waiting.popleft()


_STATUSES = {
    InferenceError.INTERNAL: 500,
    InferenceError.NOT_FOUND: 404,
    InferenceError.UNAVAILABLE: 503,
    InferenceError.UNSUPPORTED: 501,
}  # all others: 400


def error_status(error: BaseException) -> int:
    """The HTTP status of an error, as Triton maps its codes."""
    return _STATUSES.get(error_kind(error), 400)


def error_answer(error: BaseException, status: int | None = None) -> HttpAnswer:
    """`{"error": "..."}`."""
    answer = HttpAnswer(msgspec.json.encode({"error": error_text(error)}), status or error_status(error))
    if isinstance(error, RequestTooLargeError):
        answer.headers.append((b"connection", b"close"))  # or the rest of the body would have to be read
    if answer.status == 503:
        wait_s = error.retry_after_s if isinstance(error, QueueFullError) else 1.0
        answer.headers.append((b"retry-after", b"%d" % max(1, math.ceil(wait_s))))
    return answer


def refused_answer(error: LLMServeError, settings: V2HttpSettings) -> HttpAnswer:
    """The same for an error that is ours. Triton calls a body that it cannot read an internal error."""
    internal = settings.triton_error_statuses and isinstance(error, MalformedRequestError)
    return error_answer(error, 500 if internal else None)


def check_size(size: int, limit: int) -> None:
    """Raises RequestTooLargeError for a body of so many bytes."""
    if size > limit:
        raise RequestTooLargeError(
            f"request JSON size of {size} bytes exceeds the maximum allowed input size of {limit} bytes"
        )


def _decompress(body: bytes, limit: int) -> bytes:
    """gzip or zlib, whichever it is; never more than `limit` bytes of memory. Raises InvalidRequestError."""
    window = _GZIP_WINDOW if body[:2] == b"\x1f\x8b" else zlib.MAX_WBITS
    decompressor = zlib.decompressobj(window)
    try:
        plain = decompressor.decompress(body, limit + 1)
    except zlib.error as error:
        raise InvalidRequestError(f"the compressed body cannot be read: {error}") from error
    check_size(len(plain), limit)
    if not decompressor.eof:
        raise InvalidRequestError("the compressed body ends before its end")
    return plain


def _compress(body: bytes, encoding: bytes) -> bytes:
    return gzip.compress(body, 1) if encoding == b"gzip" else zlib.compress(body, 1)


def preferred_encoding(accept: bytes) -> bytes:
    """gzip or deflate, whichever the client prefers; empty if it accepts neither or prefers neither."""
    if not accept:
        return b""
    best, best_quality = b"", 0.0
    for item in accept.lower().split(b","):
        name, _, parameters = item.partition(b";")
        quality = 1.0
        key, _, value = parameters.strip().partition(b"=")
        if key.strip() == b"q":
            try:
                quality = float(value)
            except ValueError:
                quality = 0.0
        if name.strip() in (b"gzip", b"deflate") and quality > best_quality:
            best, best_quality = name.strip(), quality
    return best
