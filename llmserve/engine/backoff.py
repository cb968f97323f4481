"""How long to wait before another engine is started: its starts judged, in counts alone. Knows no process.

What cannot run must not be tried as fast as the machine allows, so the pauses between starts that come to nothing
double. But a death that says nothing about the model, because somebody ended the engine from outside, says nothing
about the next start either, and streams wait for it: such deaths are *accidents*, and double nothing.
"""

from __future__ import annotations

from llmserve.pause import pause

_MAX_DOUBLINGS = 32  # far beyond any limit, and still a float


class Backoff:
    """Over all engines of one model."""

    def __init__(self, min_s: float, max_s: float) -> None:
        self.num_failures = 0  # starts in a row that came to nothing; no accidents
        self._min_s = min_s
        self._max_s = max_s
        self._num_accidents = 0
        self._has_worked = False

    def started(self) -> None:
        """An engine is being started; it has still to show that it works."""
        self._has_worked = False

    def worked(self) -> None:
        """It has made a step, or said that it has nothing to do."""
        self._has_worked = True
        self.num_failures = self._num_accidents = 0

    def ended(self, *, by_accident: bool) -> None:
        """It is no more."""
        if self._has_worked:
            return
        if by_accident:
            self._num_accidents += 1
        else:
            self.num_failures += 1

    @property
    def pause_s(self) -> float:
        """Before the next start: none if the last engine had worked."""
        if self.num_failures:
            return min(self._min_s * 2.0 ** min(self.num_failures - 1, _MAX_DOUBLINGS), self._max_s)
        return self._min_s if self._num_accidents else 0.0

    async def wait(self) -> None:
        """The pause."""
        await pause(self.pause_s)
