"""The requests of one priority level, in the order they will be served. Knows no batches and no clock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import chain

from llmserve.scheduler.queue_policy import QueuePolicy


@dataclass(slots=True)
class QueuedRequest:
    """What a batcher knows of a request: how large it is and what it may share a batch with.

    `shape_key` is equal for requests that may be batched: the shapes of their inputs and which optional ones there are.
    """

    id: int
    rows: int = 1
    shape_key: Hashable = None
    tokens_per_row: int = 0  # the length its rows are padded to; equal for equal shape keys
    priority: int = 0  # 0: the default level; 1 is the highest
    timeout_s: float = 0.0  # 0: the policy's own
    # set when it is queued
    level: int = 0
    arrival_s: float = 0.0
    due_s: float = 0.0  # when its time runs out; 0: never, or it has
    found_idle: bool = False  # nothing was queued and an instance was free when it came: it never pays the delay


class PriorityLevel:
    """Those in time first come first served, behind them those whose time ran out under a DELAY policy."""

    __slots__ = ("_delayed", "_in_time", "policy")

    def __init__(self, policy: QueuePolicy) -> None:
        self.policy = policy
        # ordered dictionaries: any request can be taken out in O(1), and a linked list has no holes at its head
        self._in_time: OrderedDict[int, QueuedRequest] = OrderedDict()
        self._delayed: OrderedDict[int, QueuedRequest] = OrderedDict()

    def __len__(self) -> int:
        return len(self._in_time) + len(self._delayed)

    def __iter__(self) -> Iterator[QueuedRequest]:
        if self._delayed:
            return chain(self._in_time.values(), self._delayed.values())
        return iter(self._in_time.values())

    @property
    def is_full(self) -> bool:
        """No request can be added."""
        return 0 < self.policy.max_queue_size <= len(self)

    def add(self, request: QueuedRequest) -> None:
        """Puts a request last among those in time."""
        self._in_time[request.id] = request

    def add_first(self, request: QueuedRequest) -> None:
        """Puts a request before all others."""
        self._in_time[request.id] = request
        self._in_time.move_to_end(request.id, last=False)

    def remove(self, request: QueuedRequest) -> None:
        """Takes a request out; it must be here."""
        if self._in_time.pop(request.id, None) is None:
            del self._delayed[request.id]

    def delay(self, request: QueuedRequest) -> None:
        """Its time has run out: it goes behind all others."""
        self._delayed[request.id] = self._in_time.pop(request.id)
