"""Why the last batches of a model had the size they had: what `explain` shows. Decides nothing."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from llmserve.scheduler.dynamic_batcher import Batch

NUM_EXPLAINED = 64


@dataclass(slots=True)
class BatchRecord:
    """One batch."""

    time_s: float  # wall clock, since 1970
    instance: str
    requests: int
    rows: int
    reason: str
    waited_ms: float  # the oldest of its requests, in the queue
    left_waiting: int


class BatchLog:
    """The last of them."""

    def __init__(self) -> None:
        self._records: deque[tuple[float, str, Batch, int]] = deque(maxlen=NUM_EXPLAINED)

    def add(self, batch: Batch, instance: str, waited_ns: int) -> None:
        """A batch that an instance gets now."""
        self._records.append((time.time(), instance, batch, waited_ns))

    def entries(self) -> list[dict[str, Any]]:
        """As plain JSON values, the newest first."""
        return [asdict(_record(*entry)) for entry in reversed(self._records)]


def _record(time_s: float, instance: str, batch: Batch, waited_ns: int) -> BatchRecord:
    num_requests = len(batch.requests)
    return BatchRecord(time_s, instance, num_requests, batch.rows, batch.reason.value, waited_ns * 1e-6, batch.num_left)
