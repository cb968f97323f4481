"""Sends a generation as Server-Sent Events. Knows neither the events' content nor the model.

sse-starlette's `ServerSentEvent` frames what is rare here (comments, errors), but its `EventSourceResponse` is not used
for the tokens, for three reasons. It costs more CPU a send than the whole token path may (figures:
benchmarks/bench_server.py --responses). It ends every stream the moment SIGTERM arrives, where this server drains; and
its switch for that leaves a task behind that wakes twice a second for the rest of the process's life. And it sends its
headers before the first event exists, so that an error before the first token could no longer be an HTTP status.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

import msgspec
from sse_starlette.event import ServerSentEvent
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmserve.api.disconnect import ClientDisconnectedError, run_until_disconnect
from llmserve.api.errors import error_body
from llmserve.api.http_metrics import DIRECT_SEND
from llmserve.errors import DeadlineExceededError, LLMServeError
from llmserve.request_context import current_request

logger = logging.getLogger(__name__)

_KEEP_ALIVE = bytes(ServerSentEvent(comment="keep-alive", sep="\n").encode())


T_co = TypeVar("T_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)
T = TypeVar("T")


class EventSource(Protocol[T_co]):
    """What there is to send, as it comes: a Generation, or events that are encoded already."""

    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None: ...
    def __aiter__(self) -> AsyncIterator[T_co]: ...


class EventEncoder(Protocol[T_contra]):
    """Turns the news of a generation into framed events (`data: ...` and an empty line)."""

    def opening(self) -> bytes:
        """Events that come before the first token."""
        ...

    def encode(self, deltas: T_contra) -> bytes:
        """One event for each delta that has something to say, joined; empty if none has."""
        ...

    def closing(self) -> bytes:
        """Events after the last token."""
        ...


class EventStreamResponse(Response, Generic[T]):
    """Streams what `start` starts.

    Headers wait for the first token, so that whatever fails before it is answered with its HTTP status; if it takes
    longer than `keep_alive_s`, headers and a comment go out to keep proxies content. An error after that is an event,
    then the end, without `[DONE]`. The generation's context is left as soon as the client is gone.
    """

    def __init__(
        self,
        start: Callable[[], EventSource[T]],
        encoder: EventEncoder[T],
        *,
        keep_alive_s: float,
        on_disconnect: Callable[[], None],
        headers: Mapping[str, str],
    ) -> None:
        # As starlette's StreamingResponse does: without the base's __init__ there is no body, hence no content-length.
        self.status_code = 200
        self.media_type = "text/event-stream"
        self.background = None
        # X-Accel-Buffering: nginx would collect the events otherwise.
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers})
        self._start = start
        self._encoder = encoder
        self._keep_alive_s = keep_alive_s
        self._on_disconnect = on_disconnect
        self._started = False
        self._last_send_s = 0.0
        self._sending = False  # in the middle of a send, or past the last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what the generation raises before its first token; ClientDisconnectedError if nobody listens."""
        loop = asyncio.get_running_loop()
        self._last_send_s = loop.time()
        self._start_send, self._body_send = send, scope.get(DIRECT_SEND, send)

        async def keep_alive() -> float:
            quiet_s = loop.time() - self._last_send_s
            if quiet_s < self._keep_alive_s or self._sending:  # a slow reader holds a send back: nothing is quiet
                return max(self._keep_alive_s - quiet_s, 1.0)
            await self._send(_KEEP_ALIVE)
            return self._keep_alive_s

        try:
            await run_until_disconnect(receive, self._stream(), idle_s=self._keep_alive_s, on_idle=keep_alive)
        except ClientDisconnectedError:
            self._on_disconnect()
            if not self._started:
                raise

    async def _stream(self) -> None:
        encoder = self._encoder
        opening = encoder.opening()
        try:
            async with self._start() as generation:
                async for deltas in generation:
                    if body := encoder.encode(deltas):
                        await self._send(opening + body if opening else body)
                        opening = b""
            last = opening + encoder.closing()
        except Exception as error:
            if not self._started:
                raise
            level = logging.INFO if isinstance(error, DeadlineExceededError) else logging.ERROR
            logger.log(
                level, "A stream failed: %s", error, exc_info=None if isinstance(error, LLMServeError) else error
            )
            last = bytes(ServerSentEvent(msgspec.json.encode(error_body(error)).decode(), sep="\n").encode())
        await self._send(last, more_body=False)

    async def _send(self, body: bytes, *, more_body: bool = True) -> None:
        self._last_send_s = asyncio.get_running_loop().time()
        if not self._started:
            self._started = True
            headers = self.raw_headers
            await self._start_send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        self._sending = True
        if not more_body:
            current_request().is_complete = True
        await self._body_send({"type": "http.response.body", "body": body, "more_body": more_body})
        self._sending = not more_body
