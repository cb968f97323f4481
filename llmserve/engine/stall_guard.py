"""Kills an engine process that hangs: the timer between a `StallWatch` and an `EngineClient`. Replaces nothing."""

from __future__ import annotations

import asyncio
import time

from llmserve.engine.client import EngineClient, EngineState
from llmserve.engine.stall_watch import LOAD_FACTOR, StallWatch
from llmserve.errors import EngineDeadError
from llmserve.metrics import ModelMetrics


class StallGuard:
    """Watches one engine from its start to its end."""

    def __init__(self, engine: EngineClient, timeout_s: float, metrics: ModelMetrics) -> None:
        self.was_stopped = False  # it was stopped by a signal when it was killed: its step is not to blame
        self.was_hung = False  # it was killed, and had not been stopped
        self._engine = engine
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._timer: asyncio.TimerHandle | None = None
        self._watch = StallWatch(timeout_s, time.monotonic(), LOAD_FACTOR)
        self._watch.work(time.monotonic())
        self._check()

    def loaded(self) -> None:
        """From now on steps are expected of it, or heartbeats."""
        self._watch = StallWatch(self._timeout_s, time.monotonic())
        self._check()

    def work(self) -> None:
        """It has been given something to do."""
        self._watch.work(time.monotonic())

    def step(self, work_left: bool) -> None:
        """It has made a step."""
        self._watch.step(time.monotonic(), work_left)

    def heartbeat(self, work_left: bool) -> None:
        """It says that it is idle; `work_left`: it has been given something all the same."""
        self._watch.heartbeat(time.monotonic(), work_left)

    def end(self) -> None:
        """It is no longer of interest."""
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        """Looks, and sets the timer for the next look."""
        self.end()
        engine, watch, now = self._engine, self._watch, time.monotonic()
        if engine.state is EngineState.STARTING:
            watch.progress(engine.last_message_s)
        is_stopped = engine.is_stopped_by_signal()
        silent_s = watch.check(now, is_stopped)
        if silent_s is None:
            self._timer = asyncio.get_running_loop().call_later(watch.due_s - now, self._check)
            return
        self._metrics.engine_stalls += 1
        self.was_stopped, self.was_hung = is_stopped, not is_stopped
        how = "stopped by a signal" if is_stopped else "hung"
        engine.kill(EngineDeadError(f"The engine (process {engine.pid}) was {how}: silent for {silent_s:.1f} s."))
