"""Streams that outlive their connection: a client that was lost continues after the last event it has seen.

The generation runs in a task of its own and writes its events, each with an id, into a bounded buffer; connections read
from there. Knows no shape of event but that an empty line ends each.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Self

from llmserve.api.stream import EventEncoder
from llmserve.backends.generation import Generation
from llmserve.errors import InvalidRequestError, LLMServeError, QueueFullError, StreamConflictError, StreamGoneError
from llmserve.request_context import current_request

_END = b"\n\n"
_MAX_KEY_CHARS = 255


def event_ids(enabled: bool) -> Iterator[bytes]:
    """What stands before each event: `id: 1`, `id: 2`, ... or nothing."""
    return map(b"id: %d\n".__mod__, itertools.count(1)) if enabled else itertools.repeat(b"")


class ResumableStream:
    """One generation's events. The newest connection reads them; without one, it is given up after the window."""

    def __init__(self, fingerprint: bytes, max_bytes: int, window_s: float, on_gone: Callable[[], None]) -> None:
        self.fingerprint = fingerprint
        self._max_bytes = max_bytes
        self._window_s = window_s
        self._on_gone = on_gone
        self._chunks: deque[tuple[int, bytes]] = deque()  # (id of the last event in it, events)
        self._num_bytes = 0
        self._num_events = 0
        self._num_dropped = 0  # events that are no longer there
        self._has_ended = False
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._reader: StreamReader | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, start: Callable[[], Generation], encoder: EventEncoder[Any]) -> None:
        """Runs the generation from here on, whoever listens."""
        self._task = asyncio.create_task(self._run(start, encoder), name="resumable stream")

    def attach(self, after: int) -> StreamReader:
        """A connection that has seen the events up to `after`. Raises StreamGoneError if some it needs are gone."""
        if after < self._num_dropped or after > self._num_events:
            raise StreamGoneError(
                f"The events after {after} are not there: the stream has {self._num_dropped + 1} to {self._num_events}."
            )
        if self._reader is not None:
            self._reader.displaced = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._reader = StreamReader(self, after)
        self._news.set()
        return self._reader

    def detach(self, reader: StreamReader) -> None:
        """A connection is over; if no other has come, the window opens."""
        if self._reader is reader:
            self._reader = None
            self._timer = asyncio.get_running_loop().call_later(self._window_s, self.close)

    def close(self) -> None:
        """Aborts what still runs, and forgets the rest."""
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
        self._chunks.clear()
        self._on_gone()

    @property
    def is_over(self) -> bool:
        """Whether what there is goes to its end; no error follows."""
        return self._has_ended and self._error is None

    async def next(self, reader: StreamReader) -> bytes:
        """The events behind those that `reader` has; empty at the end. Raises what the generation raised."""
        while True:
            if reader.displaced:
                return b""
            if reader.after < self._num_dropped:  # what is left would have a hole in it
                raise self._error or StreamGoneError("Events that had not been read were dropped.")
            if reader.after < self._num_events:
                return self._take(reader)
            if self._error is not None:
                raise self._error
            if self._has_ended:
                return b""
            self._news.clear()
            await self._news.wait()

    def _take(self, reader: StreamReader) -> bytes:
        """All there is, joined; an event that came in the middle of a chunk is cut out of it."""
        parts = []
        seen = self._num_dropped
        for last, events in self._chunks:
            if seen >= reader.after:
                parts.append(events)
            elif last > reader.after:
                parts.append(_END.join(events.split(_END)[reader.after - seen :]))
            seen = last
        reader.after = self._num_events
        return b"".join(parts)

    async def _run(self, start: Callable[[], Generation], encoder: EventEncoder[Any]) -> None:
        deadline_s = current_request().deadline_s
        when = None if deadline_s is None else deadline_s - time.monotonic() + asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(when):
                opening = encoder.opening()
                async with start() as generation:
                    async for deltas in generation:
                        if events := encoder.encode(deltas):
                            self._append(opening + events)
                            opening = b""
                self._append(opening + encoder.closing())
        except (LLMServeError, TimeoutError) as error:
            self._error = error
        except Exception as error:
            self._error = error  # its readers would wait for the rest of it
            raise
        finally:
            self._has_ended = True
            if not self._num_events:
                self._on_gone()  # nothing was said: whoever asks again is no latecomer, and is let in or refused anew
            self._news.set()

    def _append(self, events: bytes) -> None:
        """Drops the oldest beyond the bound; if those were still to be read, the stream is given up."""
        self._num_events += events.count(_END)
        self._chunks.append((self._num_events, events))
        self._num_bytes += len(events)
        while self._num_bytes > self._max_bytes and len(self._chunks) > 1:
            last, dropped = self._chunks.popleft()
            self._num_bytes -= len(dropped)
            self._num_dropped = last
        if self._reader is not None and self._reader.after < self._num_dropped:
            raise StreamGoneError("The client reads too slowly: events it had not read were dropped.")
        self._news.set()


class StreamReader:
    """One connection's view: what `EventStreamResponse` sends, as it stands."""

    def __init__(self, stream: ResumableStream, after: int) -> None:
        self.after = after
        self.displaced = False  # a newer connection has come
        self._stream = stream

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stream.detach(self)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while events := await self._stream.next(self):
            if self._stream.is_over:
                current_request().is_complete = True
            yield events


class AsItStands:
    """The encoder of a stream whose events are encoded already."""

    def opening(self) -> bytes:
        """Nothing."""
        return b""

    def encode(self, deltas: bytes) -> bytes:
        """The same."""
        return deltas

    def closing(self) -> bytes:
        """Nothing."""
        return b""


class ResumableStreams:
    """All of a server, by tenant and idempotency key. `window_s` 0: there are none, and events have no ids."""

    def __init__(self, window_s: float, max_streams: int = 1024, max_bytes: int = 2**20) -> None:
        self.window_s = window_s
        self._max_streams = max_streams
        self._max_bytes = max_bytes
        self._streams: dict[tuple[str, str], ResumableStream] = {}

    def open(
        self,
        key: str,
        last_event_id: str | None,
        body: bytes,
        start: Callable[[], Generation],
        encoder: EventEncoder[Any],
    ) -> StreamReader:
        """Continues the stream of that key, or starts it.

        Raises StreamGoneError, StreamConflictError, InvalidRequestError, QueueFullError.
        """
        after = _event_id(last_event_id)
        if not key.isprintable() or len(key) > _MAX_KEY_CHARS:
            raise InvalidRequestError(f"Idempotency-Key must be at most {_MAX_KEY_CHARS} printable characters.")
        place = (current_request().tenant.name, key)
        fingerprint = hashlib.sha256(body).digest()
        stream = self._streams.get(place)
        if stream is None:
            if after:
                raise StreamGoneError("There is no stream of this Idempotency-Key to continue. Ask from the start.")
            self._check_room()
            stream = ResumableStream(fingerprint, self._max_bytes, self.window_s, lambda: self._forget(place, stream))
            self._streams[place] = stream
            stream.start(start, encoder)
        elif stream.fingerprint != fingerprint:
            raise StreamConflictError("The Idempotency-Key belongs to another request. Use a new one.")
        return stream.attach(after)

    def _check_room(self) -> None:
        """Raises QueueFullError. Streams outlast their requests, so no tenant may keep all there can be."""
        tenant = current_request().tenant
        if len(self._streams) >= self._max_streams:
            raise QueueFullError(f"{self._max_streams} streams wait for their clients already. Try again later.")
        own, share = sum(name == tenant.name for name, _ in self._streams), max(tenant.share * self._max_streams, 1)
        if own >= share:
            raise QueueFullError(
                f"{own} streams of the key {tenant.name!r} wait for their clients: its share. Try again later."
            )

    def _forget(self, place: tuple[str, str], stream: ResumableStream | None) -> None:
        """Another stream may have taken its place meanwhile."""
        if self._streams.get(place) is stream:
            del self._streams[place]


def _event_id(text: str | None) -> int:
    """Of `Last-Event-ID`; 0 is none yet. Raises InvalidRequestError."""
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise InvalidRequestError("Last-Event-ID must be an id of this stream's events: a number.", "Last-Event-ID")
    return int(text)
