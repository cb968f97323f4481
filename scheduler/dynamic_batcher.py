"""Which waiting requests of a general model run together, and when. Knows no model, no tensors, no tasks and no clock.

The order and the limits are Triton's. Three things differ, and each is what its users ask for: a request that finds an
instance idle goes at once, so that the queue delay is paid only under load; a request of another shape is stepped
over, not the end of the batch (unless answers must keep their order); time-outs are told to the caller as a time to
wake at, so that they fire when they are due.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from enum import StrEnum

from llmserve.errors import QueueFullError
from llmserve.scheduler.priority_level import PriorityLevel, QueuedRequest
from llmserve.scheduler.queue_policy import BatcherConfig

_LOOKAHEAD = 4  # times max_batch_size: so many requests are looked at for a batch, however long the queue


class BatchReason(StrEnum):
    """Why a batch has the size it has."""

    NOT_BATCHED = "the model does not batch: one request at a time"
    FULL = "max_batch_size is reached"
    NO_ROOM = "the next request would pass max_batch_size"
    TOKEN_BUDGET = "the next request would pass max_batch_tokens"
    PREFERRED = "a preferred batch size is reached"
    IDLE = "an instance was idle: the request did not wait"
    QUEUE_EMPTY = "nothing else was waiting"
    OTHER_SHAPE = "the requests still waiting have other shapes"
    DELAY_PAST = "the oldest request has waited max_queue_delay_microseconds"


@dataclass(slots=True)
class Batch:
    """Requests to execute together, in the order of the queue."""

    requests: list[QueuedRequest]
    rows: int
    reason: BatchReason
    num_left: int = 0  # requests still waiting


class DynamicBatcher:
    """`add` and `remove` requests, `expire` what is overdue, and take `next_batch` while an instance is free.

    All times are seconds of whatever clock the caller reads; they only ever grow.
    """

    def __init__(self, config: BatcherConfig) -> None:
        self._config = config
        self._levels = [PriorityLevel(policy) for policy in config.policies()]
        self._queued: dict[int, QueuedRequest] = {}
        self._deadlines: list[tuple[float, int]] = []  # a heap; may name requests that have left
        self._held_until_s: float | None = None

    def __len__(self) -> int:
        return len(self._queued)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._queued

    @property
    def num_queued_by_level(self) -> list[int]:
        """Waiting requests of each priority level, the highest first."""
        return [len(level) for level in self._levels]

    def add(self, request: QueuedRequest, now_s: float, instance_idle: bool) -> None:
        """Queues a request. Raises QueueFullError if its level may hold no more."""
        request.level = self._config.level_of(request.priority)
        level = self._levels[request.level]
        if level.is_full:
            raise QueueFullError("Exceeds maximum queue size")
        request.arrival_s = now_s
        request.found_idle = instance_idle and not self._queued
        if timeout_s := level.policy.timeout_s(request.timeout_s):
            request.due_s = now_s + timeout_s
            heapq.heappush(self._deadlines, (request.due_s, request.id))
        self._queued[request.id] = request
        level.add(request)

    def put_back(self, requests: list[QueuedRequest]) -> None:
        """Requests of a batch that was never executed: each is the next of its level again, in their order, and has
        the time that is left of its own."""
        for request in reversed(requests):
            if request.due_s:
                heapq.heappush(self._deadlines, (request.due_s, request.id))  # a second time, it may be
            self._queued[request.id] = request
            self._levels[request.level].add_first(request)

    def remove(self, request_id: int) -> bool:
        """Forgets a request whose client has gone; False if it does not wait here (any more)."""
        request = self._queued.get(request_id)
        if request is None:
            return False
        self._take(request)
        return True

    def drain(self) -> list[QueuedRequest]:
        """Takes every waiting request out, in order."""
        requests = [request for level in self._levels for request in level]
        for request in requests:
            self._take(request)
        return requests

    def expire(self, now_s: float) -> list[QueuedRequest]:
        """Takes out, and returns, the requests to be rejected by now; delays those whose policy says so."""
        rejected: list[QueuedRequest] = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            request = self._queued.get(heapq.heappop(self._deadlines)[1])
            if request is None or not request.due_s:
                continue
            request.due_s = 0.0
            level = self._levels[request.level]
            if level.policy.delay_expired:
                level.delay(request)
            else:
                self._take(request)
                rejected.append(request)
        return rejected

    def next_batch(self, now_s: float) -> Batch | None:
        """The requests to execute now on an instance that is free; None if there are none, or they wait for company."""
        self._held_until_s = None
        if not self._queued:
            return None
        batch = self._gather()
        if batch.reason in (BatchReason.QUEUE_EMPTY, BatchReason.OTHER_SHAPE) and self._holds(batch, now_s):
            return None
        for request in batch.requests:
            self._take(request)
        batch.num_left = len(self._queued)
        return batch

    def next_event_s(self, instance_free: bool) -> float | None:
        """When `expire` or, if an instance is free, `next_batch` has something to say; None: not before an `add`."""
        while self._deadlines and self._deadlines[0][1] not in self._queued:
            heapq.heappop(self._deadlines)
        due_s = self._deadlines[0][0] if self._deadlines else None
        held_s = self._held_until_s if instance_free else None
        return due_s if held_s is None or (due_s is not None and due_s < held_s) else held_s

    def _take(self, request: QueuedRequest) -> None:
        del self._queued[request.id]
        self._levels[request.level].remove(request)
        if len(self._deadlines) > 2 * len(self._queued) + 64:  # mostly requests that have left
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._queued]
            heapq.heapify(self._deadlines)

    def _gather(self) -> Batch:
        """The largest batch that begins with the first request in order, cut at a preferred size if one is met."""
        max_rows, max_tokens = self._config.max_batch_size, self._config.max_batch_tokens or math.inf
        chosen: list[QueuedRequest] = []
        rows = num_preferred = rows_preferred = num_seen = 0
        reason = BatchReason.QUEUE_EMPTY
        for request in (request for level in self._levels for request in level):
            if not chosen and not max_rows:
                return Batch([request], request.rows, BatchReason.NOT_BATCHED)
            num_seen += 1
            if chosen and (request.shape_key != chosen[0].shape_key or num_seen > _LOOKAHEAD * max_rows):
                reason = BatchReason.OTHER_SHAPE
                if self._config.preserve_ordering or num_seen > _LOOKAHEAD * max_rows:
                    break
                continue
            if chosen and rows + request.rows > max_rows:
                reason = BatchReason.NO_ROOM
                break
            if chosen and (rows + request.rows) * request.tokens_per_row > max_tokens:
                reason = BatchReason.TOKEN_BUDGET
                break
            chosen.append(request)
            rows += request.rows
            if rows in self._config.preferred_batch_sizes:
                num_preferred, rows_preferred = len(chosen), rows
            if rows >= max_rows:
                return Batch(chosen, rows, BatchReason.FULL)
        if num_preferred:
            return Batch(chosen[:num_preferred], rows_preferred, BatchReason.PREFERRED)
        return Batch(chosen, rows, reason)

    def _holds(self, batch: Batch, now_s: float) -> bool:
        """Whether a batch that could still grow waits; if it does not, its reason says why."""
        if batch.requests[0].found_idle:
            batch.reason = BatchReason.IDLE
        elif self._config.max_queue_delay_s:
            until_s = min(request.arrival_s for request in batch.requests) + self._config.max_queue_delay_s
            if now_s < until_s:
                self._held_until_s = until_s
                return True
            batch.reason = BatchReason.DELAY_PAST
        return False
