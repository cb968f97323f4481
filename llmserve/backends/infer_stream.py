"""One request in flight: what its client iterates over, and what the model's side puts into it. Knows no model."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Protocol

from llmserve.backends.response_window import ACKNOWLEDGED_UNITS, units
from llmserve.errors import LLMServeError
from llmserve.inference import InferRequest, InferResponse

if TYPE_CHECKING:
    from llmserve.backends.instance_pool import Instance
    from llmserve.backends.validation import CheckedRequest


class InferTarget(Protocol):
    """Where the requests go."""

    def submit(self, stream: InferStream) -> None:
        """Takes a request. Raises LLMServeError if it is refused."""
        ...

    def cancel(self, stream: InferStream) -> None:
        """Its client has gone."""
        ...

    def acknowledge(self, stream: InferStream, taken: int) -> None:
        """Its client has taken responses of so many units."""
        ...


class InferStream(AsyncIterator[InferResponse]):
    """Starts at the first `__anext__`. Ending it early, by `aclose` or by cancelling who waits, cancels the request."""

    __slots__ = (
        "_deliver",
        "_ready",
        "_taken",
        "_target",
        "_waiter",
        "arrival_ns",
        "checked",
        "dispatched_ns",
        "done",
        "id",
        "instance",
        "last_ns",
        "num_responses",
        "only_response",
        "request",
        "started",
    )

    def __init__(self, request: InferRequest, target: InferTarget) -> None:
        self.request = request
        self.started = False
        self.done = False  # nothing more will be put in
        self._target = target
        self._ready: deque[InferResponse | LLMServeError] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._deliver: Callable[[InferResponse | LLMServeError], None] | None = None
        self._taken = 0  # units, not acknowledged yet
        # the model's side keeps its notes here
        self.id = 0
        self.arrival_ns = 0
        self.dispatched_ns = 0
        self.last_ns = 0  # when the response before was made
        self.num_responses = 0
        self.only_response: InferResponse | None = None
        self.instance: Instance | None = None
        self.checked: CheckedRequest

    def deliver(self, take: Callable[[InferResponse | LLMServeError], None]) -> None:
        """In place of iterating, without a task: `take` gets every response, and the error that ends the stream.

        Raises LLMServeError if the request is refused.
        """
        self._deliver = take
        self.started = True
        try:
            self._target.submit(self)
        except LLMServeError:
            self._deliver = None
            raise

    async def __anext__(self) -> InferResponse:
        if not self.started:
            self.started = True
            self._target.submit(self)
        while not self._ready:
            if self.done:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                await self.aclose()
                raise
            finally:
                self._waiter = None
        item = self._ready.popleft()
        if isinstance(item, LLMServeError):
            self._ready.clear()
            raise item
        if not self.done:
            self._acknowledge(item)
        return item

    def _acknowledge(self, response: InferResponse) -> None:
        """Its reader has come so far: now and then the model is told, so that it can go on."""
        self._taken += units(sum(len(tensor.data) for tensor in response.outputs))
        if self._taken >= ACKNOWLEDGED_UNITS:
            self._target.acknowledge(self, self._taken)
            self._taken = 0

    async def aclose(self) -> None:
        """Cancels the request if it is not finished."""
        self.close()

    def close(self) -> None:
        """`aclose`, which waits for nothing."""
        self._deliver = None
        self._ready.clear()
        if self.started and not self.done:
            self.done = True
            self._target.cancel(self)
        self.started = self.done = True

    def put(self, item: InferResponse | LLMServeError, final: bool) -> None:
        """The next response, or the error that ends the stream."""
        self.done = final
        if (deliver := self._deliver) is not None:
            if final:
                self._deliver = None  # or this and its reader would hold each other until the garbage collector comes
            deliver(item)
            return
        self._ready.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
