"""One HTTP connection: uvicorn's, and beside its way to the ASGI application a short one. Knows no route.

uvicorn makes a scope, a cycle, an event, a task and two writes of every request; a small inference costs less. One that
a `DirectHandler` takes is handed over when its body is complete, in the call that read it from the socket, and its
answer is one write. Whatever is out of the ordinary goes the way of ASGI: a large body or one of unknown length, a
request that comes before the one before it is answered, a client that does not read, HTTP/1.0.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

Part = bytes | bytearray | memoryview
HeaderList = Sequence[tuple[bytes, bytes]]
_SMALL_BYTES = 65536  # of a body; up to here a copy is cheaper than one more write to the socket
MAX_LENGTH_DIGITS = 20  # of a length; the parser takes any number of leading zeros, and int() does not


class DirectHandler(Protocol):
    """Who answers on the short way. It must not raise."""

    def accepts(self, method: bytes, url: bytes, headers: dict[bytes, bytes]) -> bool:
        """Whether it takes a request that looks so: asked before there is a body."""
        ...

    def serve(self, exchange: DirectExchange) -> None:
        """Answers a request, now or later, unless its client goes; it may have gone before all was here."""
        ...


class _NoEvent:
    """Nobody waits for a request that is complete."""

    def set(self) -> None:
        """Nothing."""


class DirectExchange:
    """A complete request and the way back to its client. For uvicorn it is the connection's cycle."""

    __slots__ = (
        "_connection",
        "body",
        "disconnected",
        "headers",
        "keep_alive",
        "more_body",
        "on_gone",
        "response_complete",
        "response_started",
        "url",
    )

    message_event = _NoEvent()

    def __init__(self, connection: HttpProtocol, headers: dict[bytes, bytes]) -> None:
        self._connection = connection
        self.url = connection.url
        self.headers = headers  # names in lower case
        self.body = b""
        self.on_gone: Callable[[], None] | None = None  # called if the client goes before it is answered
        self.keep_alive = connection.parser.should_keep_alive()
        self.more_body = True
        self.disconnected = self.response_started = self.response_complete = False

    def answer(self, status: int, headers: HeaderList, body: Part, parts: Sequence[Part] = ()) -> None:
        """Sends the whole answer, `parts` after `body`; once. Nothing if the client has gone."""
        if not self.disconnected:
            self.on_gone = None
            self.response_started = self.response_complete = True
            self._connection.answer(self, status, headers, body, parts)

    def leave(self) -> None:
        """The client has gone."""
        self.disconnected = True
        if self.on_gone is not None:
            self.on_gone()


class HttpProtocol(HttpToolsProtocol):
    """`direct`: who answers on the short way, if anybody."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None,
        direct: DirectHandler | None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._direct = direct
        self._answering: RequestResponseCycle | None = None  # by the application
        self._exchange: DirectExchange | None = None  # what is being read or answered on the short way
        self._defaults: HeaderList = ()
        self._default_lines = b""

    def connection_lost(self, exc: Exception | None) -> None:
        """Whoever is still answering gets to know."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.leave()
            if exchange.more_body and self._direct is not None:
                self._direct.serve(exchange)
        self._leave()
        super().connection_lost(exc)

    def eof_received(self) -> None:
        """The client sends no more, and is taken to have gone: the connection is closed, as by nginx (its 499) and
        uvicorn. `close` and `shutdown(SHUT_WR)` send the same FIN. Only a failing write could tell them apart, and a
        generation that nobody reads would run to its end, on a GPU that others wait for, before there is one to fail.
        HTTP allows a client to wait for its answer so half-closed; few do, and one that must (`nc -N`) keeps its side
        open until it has read the answer."""

    def data_received(self, data: bytes) -> None:
        """As uvicorn's, but for a request that asks for another protocol, as some clients do with every request for the
        sake of HTTP/2: there is none here, so it is one like any other. Its parser would stop before its body, and take
        that for the next request: one that a proxy in front of us has not seen."""
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        try:
            while rest:
                try:
                    self.parser.feed_data(rest)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    rest = rest[upgrade.args[0] :]
                    self._decline_upgrade()
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):  # the latter from CONNECT
            self.send_400_response("Invalid HTTP request received.")

    def on_headers_complete(self) -> None:
        """Which way the request goes."""
        self._unset_keepalive_if_required()  # the request before may have been answered since these bytes came
        if self.parser.should_upgrade():
            return  # it will be here again
        headers = dict(self.headers)
        if not self._is_direct(headers):
            super().on_headers_complete()
            return
        exchange = self._exchange = DirectExchange(self, headers)
        self.cycle = exchange  # type: ignore[assignment]  # all that uvicorn's protocol asks of one is there

    def on_body(self, body: bytes) -> None:
        """A piece of the body; mostly all of it."""
        exchange = self._exchange
        if exchange is not None and exchange.more_body:
            exchange.body += body
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is answered once all of it is here."""
        if self.parser.should_upgrade():
            return
        exchange = self._exchange
        if exchange is None or not exchange.more_body:
            super().on_message_complete()
            return
        assert self._direct is not None
        exchange.more_body = False
        self._direct.serve(exchange)

    def answer(
        self, exchange: DirectExchange, status: int, headers: HeaderList, body: Part, parts: Sequence[Part]
    ) -> None:
        """`DirectExchange.answer`."""
        self._exchange = None
        length = len(body) + sum(memoryview(part).nbytes for part in parts) if parts else len(body)
        lines: list[Part] = [STATUS_LINE[status], self._default_head()]
        lines += [b"%b: %b\r\n" % header for header in headers]
        if not exchange.keep_alive:
            lines.append(b"connection: close\r\n")
        lines += (b"content-length: %d\r\n\r\n" % length, body)
        if length <= _SMALL_BYTES:
            self.transport.write(b"".join((*lines, *parts)))
        else:
            self.transport.write(b"".join(lines))
            for part in parts:
                self.transport.write(part)
        if not exchange.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """uvicorn's (since 0.45), which remembers the request that came last, not the one that is being answered."""
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def _leave(self) -> None:
        """Nobody is there any more for the request that is being answered, nor for those that wait behind it."""
        self.pipeline.clear()
        cycle = self._answering
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()

    def _decline_upgrade(self) -> None:
        """Reads the head again as that of a request which asks for nothing. Raises HttpParserUpgrade for CONNECT."""
        parser = self.parser
        lines = [b"%b %b HTTP/%b" % (parser.get_method(), self.url, parser.get_http_version().encode())]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has its first
        self.parser.feed_data(b"\r\n".join((*lines, b"", b"")))

    def _is_direct(self, headers: dict[bytes, bytes]) -> bool:
        """Whether a request goes the short way."""
        direct, parser = self._direct, self.parser
        length = headers.get(b"content-length", b"")
        return (
            direct is not None
            and (self.cycle is None or self.cycle.response_complete)
            and length.isdigit()
            and len(length) <= MAX_LENGTH_DIGITS
            and int(length) <= _SMALL_BYTES
            and not self.flow.write_paused
            and parser.get_http_version() == "1.1"
            and direct.accepts(parser.get_method(), self.url, headers)
        )

    def _default_head(self) -> bytes:
        """The lines that every answer has; uvicorn makes them anew each second."""
        if self._defaults is not self.server_state.default_headers:
            self._defaults = self.server_state.default_headers
            self._default_lines = b"".join(b"%s: %s\r\n" % header for header in self._defaults)
        return self._default_lines
