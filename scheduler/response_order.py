"""Answers in the order of their requests (`preserve_ordering`), whichever finishes first. Knows ids only."""

from __future__ import annotations

from collections import OrderedDict


class ResponseOrder:
    """`begin` each request in order; `finish` tells which answers may go out now."""

    def __init__(self) -> None:
        self._is_finished: OrderedDict[int, bool] = OrderedDict()

    def __len__(self) -> int:
        return len(self._is_finished)

    def begin(self, request_id: int) -> None:
        """The request comes after all that have begun before it."""
        self._is_finished[request_id] = False

    def finish(self, request_id: int) -> list[int]:
        """The requests, in order, that nothing older holds back any more. One that has not begun is ignored."""
        if request_id not in self._is_finished:
            return []
        self._is_finished[request_id] = True
        released: list[int] = []
        while self._is_finished and self._is_finished[oldest := next(iter(self._is_finished))]:
            del self._is_finished[oldest]
            released.append(oldest)
        return released
