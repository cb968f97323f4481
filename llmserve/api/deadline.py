"""The end of a request's time, which may be set while it runs, or never. Knows no request.

What `asyncio.timeout` does; but one that is never set, as most are not, costs next to nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType


class Deadline:
    """Cancels the task inside it when its time comes; leaving it then raises TimeoutError. Not if `is_met` then says
    that what had to be done has been."""

    __slots__ = ("_cancelling", "_is_met", "_task", "_timer", "passed")

    def __init__(self, is_met: Callable[[], bool] = lambda: False) -> None:
        self.passed = False
        self._is_met = is_met
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0  # requests to cancel the task that are not ours
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancelling = self._task.cancelling()

    def move(self, when_s: float) -> None:
        """To a time of the event loop's clock; earlier or later than before."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(when_s, self._pass)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if self._timer is not None:
            self._timer.cancel()
        if self.passed:
            assert task is not None
            if task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
                raise TimeoutError from error

    def _pass(self) -> None:
        assert self._task is not None
        if not self._is_met():
            self.passed = True
            self._task.cancel()
