"""A small HTTP/1.1 client that stamps every piece of a body when it arrives. Knows nothing of SSE or OpenAI.

A load generator must cost less than what it measures: a general client spends 50-100 us of CPU on each streamed piece.
Here an `asyncio.Protocol` feeds the C parser of `httptools`, and the arrival time is taken as the first thing in
`data_received`, so that a reader who is late (many streams, one thread) does not falsify it.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import NamedTuple, Self, cast
from urllib.parse import urlsplit

import httptools

from llmserve.errors import ConfigError, LLMServeError

Clock = Callable[[], float]


class ClientError(LLMServeError):
    """A request failed. `kind` is what a report counts by: "connect", "disconnected", "protocol", "http_429", ..."""

    code = "client_error"

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def explain_error(error: ClientError, command: str, url: str, flag: str = "--url") -> str:
    """What `llmserve <command>`, which asked at `url` as `flag` says, tells its user: what is wrong and what to do."""
    if isinstance(error.__cause__, ssl.SSLCertVerificationError):
        return f"{error}\nTo trust a certificate of your own: SSL_CERT_FILE=tls.crt llmserve {command} --url {url}"
    if error.kind == "connect":
        return f"No server answers at {url} ({error})\nStart one with `llmserve serve`, or say where it is with {flag}."
    return f"llmserve {command}: {error}"


class Piece(NamedTuple):
    """A part of a body and when it arrived, in seconds of the client's clock."""

    time_s: float
    data: bytes


class Url:
    """A server's base address, split into what a connection and a request line need."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url {url!r} is not an address: give one such as http://127.0.0.1:8000/v1.")
        try:
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"--url {url!r}: {error}.") from None
        self.host = parts.hostname
        self.tls = parts.scheme == "https"
        self.port = port or (443 if self.tls else 80)
        self.netloc = parts.netloc.rpartition("@")[2]
        self.path = parts.path.rstrip("/")


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time. `httptools` calls the `on_...` methods."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._now_s = 0.0
        self.lost: str | None = None  # why it is gone; None while it is up
        self._begin()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[Piece] = []
        self._failure: ClientError | None = None
        self._framed = False  # the body says where it ends; otherwise the end of the connection ends it
        self.received_any = False
        self.headers_complete = False
        self.complete = False
        self.keep_alive = False
        self.status = 0

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._now_s = self._clock()
        self.received_any = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            reason = "What answers there does not speak HTTP/1.1; perhaps it is the port of gRPC."
            self._failure = ClientError("protocol", reason)
            self.close()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = str(exc) if exc else "the server closed the connection"
        if self.headers_complete and not self._framed and exc is None:
            self.complete = True
        self._wake()

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        lowered = name.lower()
        if lowered == b"content-length" or (lowered == b"transfer-encoding" and b"chunked" in value.lower()):
            self._framed = True

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status >= 200:  # 1xx are announcements: the answer is still to come
            self.headers_complete = True
            self.keep_alive = self._framed and self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        self._pieces.append(Piece(self._now_s, body))

    def on_message_complete(self) -> None:
        if self.headers_complete:
            self.complete = True

    # What the client calls.

    def send(self, request: bytes) -> None:
        """Starts an exchange; `request` is the head and the body."""
        assert self._transport is not None
        self._begin()
        self._transport.write(request)

    async def wait_headers(self) -> None:
        """Returns when the status is known. Raises ClientError."""
        while not self.headers_complete:
            await self._wait()

    async def read(self) -> list[Piece]:
        """Returns all pieces that have arrived, waiting for one if need be; an empty list is the end of the body.

        Raises ClientError when the connection ends before the body does, after handing out what came before that.
        """
        while not self._pieces and not self.complete:
            await self._wait()
        pieces, self._pieces = self._pieces, []
        return pieces

    def close(self) -> None:
        """Drops the connection at once; a server that is still answering sees the client go."""
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self.lost is not None:
            if not self.received_any:
                raise ClientError("disconnected", f"No answer came: {self.lost}. If it speaks TLS, ask with https://.")
            raise ClientError("disconnected", f"The answer broke off: {self.lost}.")
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class HttpClient:
    """Sends requests to one server over kept-alive connections, opening as many as there are requests at a time."""

    def __init__(
        self,
        url: str,
        headers: dict[str, str],
        clock: Clock = time.perf_counter,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`tls`: what of an https server is trusted; by default what the system trusts."""
        self.url = Url(url)
        self.clock = clock
        lines = {"Host": self.url.netloc, "User-Agent": "llmserve", "Content-Type": "application/json", **headers}
        if any(set("\r\n") & set(value) for value in lines.values()):
            raise ConfigError("A header value (the API key, for example) may not contain a line break.")
        self._head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._ssl = (tls or ssl.create_default_context()) if self.url.tls else None
        self._idle: deque[Connection] = deque()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections that are kept for later."""
        while self._idle:
            self._idle.pop().close()

    @asynccontextmanager
    async def stream(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[Connection]:
        """Sends a request (`path` is absolute) and yields the connection once the status is known.

        Leaving the context before the body has ended closes the connection, which aborts the request at the server.
        Raises ClientError.
        """
        head = f"{method} {path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n"
        request = head.encode() + body
        connection = await self._exchange(request)
        try:
            yield connection
        finally:
            if connection.complete and connection.keep_alive and connection.lost is None:
                self._idle.append(connection)
            else:
                connection.close()

    async def fetch(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Sends a request and returns the status and the whole body. Raises ClientError."""
        async with self.stream(method, path, body) as connection:
            return connection.status, await read_all(connection)

    async def _exchange(self, request: bytes) -> Connection:
        while True:
            reused = self._pop_idle()
            connection = reused or await self._connect()
            try:
                connection.send(request)
                await connection.wait_headers()
            except ClientError as error:
                connection.close()
                # The server let a kept-alive connection go in the moment we took it up again: that is no failure.
                if reused is None or connection.received_any or error.kind != "disconnected":
                    raise
            except BaseException:
                connection.close()
                raise
            else:
                return connection

    def _pop_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.lost is None:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                lambda: Connection(self.clock), self.url.host, self.url.port, ssl=self._ssl
            )
        except OSError as error:  # ssl.SSLError and socket.gaierror among them
            raise ClientError("connect", f"No connection to {self.url.netloc}: {error}.") from error
        return connection


async def read_all(connection: Connection) -> bytes:
    """The rest of a body. Raises ClientError."""
    parts: list[bytes] = []
    while pieces := await connection.read():
        parts += (piece.data for piece in pieces)
    return b"".join(parts)
