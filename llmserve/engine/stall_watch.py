"""When an engine is hung: the judgement, in times alone. Knows no process, and of the engine only what it is told.

A working engine sends a message a step, an idle one a heartbeat a second, both from the thread that does the work: so
silence is what there is to judge. It is held against the work in hand: a step may be long because it is large, or
because kernels are compiled in it, and a load because the disk is slow.
"""

from __future__ import annotations

from llmserve.engine.launch import HEARTBEAT_S

FIRST_STEP_FACTOR = 6.0  # a first step loads libraries and compiles kernels
LOAD_FACTOR = 30.0  # between two messages of an engine that loads
_LONGEST_STEP_FACTOR = 4.0
_HEARTBEATS = 3.0  # may be late: without work there is nothing else to be heard
_HELD_UP_S = 0.5  # a check that comes so late says more of this process than of the engine


class StallWatch:
    """For one engine process. All times are seconds of one monotonic clock."""

    def __init__(self, timeout_s: float, now: float, first_factor: float = FIRST_STEP_FACTOR) -> None:
        """`first_factor` times `timeout_s` is how long the first step may take."""
        self.due_s = now + timeout_s  # when to `check` next
        self._timeout_s = timeout_s
        self._first_factor = first_factor
        self._last_sign_s = now
        self._has_work = False
        self._num_steps = 0
        self._longest_step_s = 0.0

    def work(self, now: float) -> None:
        """There is something to do. Only the first after a pause counts: more work does not excuse a step's delay."""
        if not self._has_work:
            self._has_work = True
            self._last_sign_s = now

    def step(self, now: float, work_left: bool) -> None:
        """A step has ended."""
        if self._has_work:
            self._longest_step_s = max(self._longest_step_s, now - self._last_sign_s)
        self._num_steps += 1
        self._last_sign_s = now
        self._has_work = work_left

    def heartbeat(self, now: float, work_left: bool) -> None:
        """A sign of life without a step: all that an engine without work has to give, and too little of one with.

        What work it had may have been taken back before a step of it began: then no step is due for it.
        """
        if not work_left:
            self._has_work = False
            self._last_sign_s = now

    def progress(self, now: float) -> None:
        """A load goes on; any number of these is no step."""
        self._last_sign_s = max(self._last_sign_s, now)

    def check(self, now: float, is_stopped: bool) -> float | None:
        """Seconds of silence if it is hung, else None, and `due_s` says when to ask again.

        `is_stopped`: by a signal, so that no large step can be the reason for its silence.
        """
        if now - self.due_s > _HELD_UP_S:
            # this process, or the whole machine, has been held up: signs may have come that nobody has read yet
            self.progress(now - self._timeout_s / 2)
        silent_s, allowed_s = now - self._last_sign_s, self._allowed_s(is_stopped)
        if silent_s >= allowed_s:
            return silent_s
        self.due_s = now + min(allowed_s - silent_s, self._timeout_s)  # it may be stopped meanwhile
        return None

    def _allowed_s(self, is_stopped: bool) -> float:
        if not self._has_work:
            return max(self._timeout_s, _HEARTBEATS * HEARTBEAT_S)
        if is_stopped:
            return self._timeout_s
        if not self._num_steps:
            return self._first_factor * self._timeout_s
        return max(self._timeout_s, _LONGEST_STEP_FACTOR * self._longest_step_s)
