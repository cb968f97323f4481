"""How much memory the bodies of requests take, of all connections together. Knows no route.

The largest body and the number of connections bound it only by their product, which is more than any machine has.
"""

from __future__ import annotations

from starlette.types import Message, Receive

from llmserve.errors import QueueFullError

_SMALL_BYTES = 65536  # so much of a body is always taken: it is the large ones that fill the memory


class BodyMemory:
    """Bytes of bodies whose requests are not over."""

    def __init__(self, limit_bytes: int) -> None:
        self.num_bytes = 0
        self.limit_bytes = limit_bytes

    def body_of(self, receive: Receive) -> CountedBody:
        """Of one request. It is to be closed when the request is over."""
        return CountedBody(self, receive)


class CountedBody:
    """Counts what has been received, not what is announced: nobody takes room by a header alone."""

    def __init__(self, memory: BodyMemory, receive: Receive) -> None:
        self._memory = memory
        self._receive = receive
        self._num_bytes = 0

    async def receive(self) -> Message:
        """ASGI's `receive`. Raises QueueFullError if a large body finds no room; one that is there keeps its own."""
        message = await self._receive()
        num_bytes = len(message.get("body", b""))
        if num_bytes:
            self._num_bytes += num_bytes
            self._memory.num_bytes += num_bytes
            if self._num_bytes > _SMALL_BYTES and self._memory.num_bytes > self._memory.limit_bytes:
                raise QueueFullError(
                    f"The bodies of the requests in flight take more than {self._memory.limit_bytes} bytes "
                    "(max_body_memory). Try again later, or send less at once."
                )
        return message

    def close(self) -> None:
        """The request is over, and its body with it."""
        self._memory.num_bytes -= self._num_bytes
        self._num_bytes = 0
