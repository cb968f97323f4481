"""One HTTP connection with limits in time and number, which uvicorn's has not. Knows no route.

Who sends too slowly, or reads too slowly, is let go: a stream is never buffered for a client that does not read it. The
timers are started by what is not complete yet (headers, a body, a full socket): a request that comes in one piece, or a
token, costs none of them anything.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio.events import TimerHandle
from dataclasses import dataclass
from typing import Any

import msgspec
from uvicorn.config import Config
from uvicorn.server import ServerState

from llmserve.api.http_protocol import DirectHandler, HttpProtocol
from llmserve.http_metrics import HttpMetrics

logger = logging.getLogger(__name__)

_MAX_PIPELINED = 256  # requests that wait behind another on their connection: some 2 KiB each, whoever sends them


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Seconds, bytes and counts; 0 is no limit."""

    max_connections: int = 0
    header_timeout_s: float = 10.0  # from the connection, or a request's first byte, to the end of its headers
    body_timeout_s: float = 120.0  # from there to the end of its body
    send_timeout_s: float = 30.0  # a full socket may take so long until there is room again
    max_header_bytes: int = 65536


class LimitedConnections:
    """Makes the connections of one server: what uvicorn takes for a protocol class."""

    def __init__(self, limits: ConnectionLimits, metrics: HttpMetrics, direct: DirectHandler | None = None) -> None:
        self.limits = limits
        self.metrics = metrics
        self._direct = direct

    def __call__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> LimitedConnection:
        return LimitedConnection(config, server_state, app_state, _loop, self.limits, self.metrics, self._direct)


class LimitedConnection(HttpProtocol):
    """Answers 408 to who does not send, 431 to endless headers, 503 to one connection too many; drops who does not
    read."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None,
        limits: ConnectionLimits,
        metrics: HttpMetrics,
        direct: DirectHandler | None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop, direct)
        self._limits = limits
        self._metrics = metrics
        self._reading: TimerHandle | None = None
        self._writing: TimerHandle | None = None
        self._num_header_bytes = 0
        self._in_headers = False
        self._in_body = False
        self._is_only_headers = False  # what is being parsed: no other request's bytes are in it
        self._num_idle_bytes = 0  # within a body, since its last byte: chunk headers and trailers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection; one too many is told so, and closed."""
        super().connection_made(transport)
        self._metrics.num_connections += 1
        limit = self._limits.max_connections
        if limit and len(self.connections) > limit:
            self._refuse(503, f"There are {limit} connections already. Try again later.", "too_many_connections")
            return
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """No timer outlives it."""
        self._metrics.num_connections -= 1
        self._stop_reading()
        self._stop_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Counts what comes before the end of the headers: the parser would take them without end. What is incomplete
        then has its time from here."""
        if self.transport.is_closing():
            return
        self._is_only_headers = not self._in_body
        if self._in_body:
            self._num_idle_bytes += len(data)  # none of them, if a byte of the body is among them
        super().data_received(data)
        if self._in_headers and self._is_only_headers:
            self._num_header_bytes += len(data)
        if self._in_headers and self._num_header_bytes > self._limits.max_header_bytes:
            limit = self._limits.max_header_bytes
            self._refuse(431, f"The request's headers are larger than the limit of {limit} bytes.", "headers_too_large")
        elif self._in_body and self._num_idle_bytes > self._limits.max_header_bytes:
            self._refuse_body(431, "The request's trailers are too large.", "headers_too_large")
        elif (self._in_headers or self._in_body) and self._reading is None and not self.transport.is_closing():
            if self._in_headers:
                self._await_headers()
            else:
                self._await_body()

    def send_400_response(self, msg: str) -> None:
        """In the shape of every other error."""
        self._refuse(400, "This is no HTTP request.", "bad_request")

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self._num_header_bytes = 0
        self._in_headers = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """One behind the body is a trailer, which nobody reads: it neither joins the headers nor is it kept."""
        if not self._in_body:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._num_idle_bytes = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        """The body follows."""
        self._in_headers, self._in_body = False, True
        self._num_idle_bytes = 0
        self._stop_reading()
        if len(self.pipeline) >= _MAX_PIPELINED:
            self._refuse_pipelined()
        else:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """All is here."""
        self._in_body = self._is_only_headers = False
        self._stop_reading()
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The socket is full: whoever sends waits from here on."""
        super().pause_writing()
        if self._limits.send_timeout_s and self._writing is None:
            self._writing = self.loop.call_later(self._limits.send_timeout_s, self._reader_late)

    def resume_writing(self) -> None:
        """There is room again."""
        self._stop_writing()
        super().resume_writing()

    def _await_headers(self) -> None:
        if self._limits.header_timeout_s:
            self._reading = self.loop.call_later(self._limits.header_timeout_s, self._headers_late)

    def _await_body(self) -> None:
        if self._limits.body_timeout_s:
            self._reading = self.loop.call_later(self._limits.body_timeout_s, self._body_late)

    def _headers_late(self) -> None:
        self._reading = None
        limit_s = self._limits.header_timeout_s
        self._refuse(408, f"The request's headers were not complete within {limit_s:g} s.", "request_timeout")

    def _body_late(self) -> None:
        self._reading = None
        limit_s = self._limits.body_timeout_s
        self._refuse_body(408, f"The request's body was not complete within {limit_s:g} s.", "request_timeout")

    def _reader_late(self) -> None:
        self._writing = None
        self._metrics.refuse("slow_reader")
        logger.info("a client did not read for %g s: its connection is closed", self._limits.send_timeout_s)
        self.transport.abort()  # closing would wait for it to read

    def _refuse_pipelined(self) -> None:
        if not self.transport.is_closing():  # the parser goes on to the end of what has been received
            self._metrics.refuse("too_many_pipelined")
        self._leave()
        self.transport.abort()

    def _refuse_body(self, status: int, message: str, code: str) -> None:
        if self.cycle is not None and self.cycle.response_started:
            self._metrics.refuse(code)
            self.transport.close()  # it has been answered without its body
        else:
            self._refuse(status, message, code)

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answers past the application, and closes."""
        self._metrics.refuse(code)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        error = {"message": message, "type": kind, "param": None, "code": code}
        body = msgspec.json.encode({"error": error})
        phrases = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}
        head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % (
            status,
            phrases.get(status, b"Service Unavailable"),
            len(body),
        )
        if status == 503:
            head += b"retry-after: 1\r\n"
        self._stop_reading()
        self.transport.write(head + b"\r\n" + body)
        self.transport.close()

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _stop_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
