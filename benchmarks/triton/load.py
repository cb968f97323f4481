"""A load generator that costs next to nothing: requests made once, answers looked at no further than to their end.

Knows HTTP/1.1 as the two servers speak it (a length, or chunks), and nothing of what the bodies mean.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import cast

_HEAD_END = b"\r\n\r\n"
_LENGTH = b"\r\ncontent-length:"
_LAST_CHUNK = b"0\r\n\r\n"
_EVENT = b"data: "


@dataclass
class Counts:
    """What came back."""

    answers: int = 0
    events: int = 0
    waits_s: list[float] = field(default_factory=list)
    last_answer: bytes = b""


def post(path: str, body: bytes, *headers: str) -> bytes:
    """The bytes of a request."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


class _Client(asyncio.Protocol):
    """One connection: asks again when it has its answer, until told to stop."""

    def __init__(self, request: bytes, counts: Counts, until: int) -> None:
        self.done = asyncio.get_running_loop().create_future()
        self._request = request
        self._counts = counts
        self._until = until  # answers of all clients together
        self._received = b""
        self._end = -1  # bytes of the answer; -1 while its head has not come, -2 if it comes in chunks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._end == -1:
            head = self._received.find(_HEAD_END)
            if head < 0:
                return
            lower = self._received[:head].lower()
            at = lower.find(_LENGTH)
            self._end = -2 if at < 0 else head + 4 + int(lower[at + len(_LENGTH) :].split(b"\r\n", 1)[0])
        if len(self._received) == self._end or (self._end == -2 and self._received.endswith(_LAST_CHUNK)):
            self._answered()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"the server closed the connection: {error}"))

    def _ask(self) -> None:
        self._received, self._end = b"", -1
        self._asked_s = time.perf_counter()
        self._transport.write(self._request)

    def _answered(self) -> None:
        counts = self._counts
        counts.waits_s.append(time.perf_counter() - self._asked_s)
        counts.answers += 1
        if self._end == -2:
            counts.events += self._received.count(_EVENT)
        counts.last_answer = self._received
        if counts.answers < self._until:
            self._ask()
        elif not self.done.done():
            self.done.set_result(None)
            self._transport.close()


async def flood(port: int, request: bytes, concurrency: int, num_requests: int) -> Counts:
    """A closed loop of `concurrency` connections. Raises ConnectionError; the caller looks at the last answer."""
    counts = Counts()
    loop = asyncio.get_running_loop()
    clients = [
        await loop.create_connection(lambda: _Client(request, counts, num_requests), "127.0.0.1", port)
        for _ in range(concurrency)
    ]
    await asyncio.gather(*(client.done for _, client in clients))
    return counts
