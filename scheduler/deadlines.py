"""When which request's answer is no longer wanted. Knows no queue and no clock."""

from __future__ import annotations

import heapq

_SLACK = 64  # void entries that are not worth the sweeping


class Deadlines:
    """By request id. Times are seconds of whatever clock the caller reads; a request without one is not here."""

    def __init__(self) -> None:
        self._due_s: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []  # those of requests that have left are void

    def __len__(self) -> int:
        return len(self._due_s)

    def add(self, request_id: str, due_s: float) -> None:
        """It is wanted until then."""
        self._due_s[request_id] = due_s
        heapq.heappush(self._heap, (due_s, request_id))

    def forget(self, request_id: str) -> None:
        """It has ended, or has no deadline."""
        if self._due_s.pop(request_id, None) is not None and len(self._heap) > 2 * len(self._due_s) + _SLACK:
            self._heap = [(due_s, name) for name, due_s in self._due_s.items()]
            heapq.heapify(self._heap)

    def take_overdue(self, now_s: float) -> list[str]:
        """Those whose time is over, the earliest first; they are forgotten."""
        overdue = []
        heap = self._heap
        while heap and heap[0][0] <= now_s:
            due_s, request_id = heapq.heappop(heap)
            if self._due_s.get(request_id) == due_s:
                del self._due_s[request_id]
                overdue.append(request_id)
        return overdue
