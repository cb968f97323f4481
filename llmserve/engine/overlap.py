"""The token loop a step ahead of the tokens: step k + 1 is scheduled and launched while step k runs on its device.

Does no I/O; owns no socket, no thread and no clock. What it needs beyond `core` is a runner that launches a step
without waiting for it, and `TokensInFlight`, which lets the scheduler count tokens that nobody knows yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from llmserve.engine.core import EngineCore, Runner
from llmserve.messages import EngineStats, StepOutputs
from llmserve.scheduler.budget import TokenBudget
from llmserve.scheduler.lookahead import SettledDrafter, TokensInFlight
from llmserve.scheduler.output import SchedulerOutput
from llmserve.scheduler.scheduler import Scheduler
from llmserve.worker.output import ModelRunnerOutput


class LaunchedStep(Protocol):
    """A step on its way."""

    @property
    def holds_up_next(self) -> bool:
        """Whether no step may be scheduled behind it before its result is taken: it had drafts, or the host has a part
        in choosing its tokens."""
        ...

    def result(self) -> ModelRunnerOutput:
        """Waits for it. Called once, in the order of the launches."""
        ...


class LaunchingRunner(Runner, Protocol):
    """A runner that need not be waited for. What is launched runs in the order of the launches."""

    def launch(self, output: SchedulerOutput) -> LaunchedStep: ...


@dataclass(frozen=True, slots=True)
class _InFlight:
    scheduled: SchedulerOutput
    step: LaunchedStep
    stats: EngineStats
    started_s: float


class OverlappedCore(EngineCore):
    """An `EngineCore` whose turn launches one step and brings the tokens of the one before.

    A request's end is known a step late. What the step in flight computes for it is dropped, and its blocks are free at
    once, because whoever gets them writes after that step.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        budget: TokenBudget,
        runner: LaunchingRunner,
        clock: Callable[[], float],
        drafter: SettledDrafter | None = None,
    ) -> None:
        super().__init__(scheduler, budget, runner, clock, drafter)
        self._launcher = runner
        self._settled_drafter = drafter
        self._tokens = TokensInFlight(scheduler)
        self._in_flight: _InFlight | None = None
        self._settled_s = 0.0  # when the last step's tokens came

    def has_work(self) -> bool:
        return self._in_flight is not None or super().has_work()

    def _turn(self, started_s: float) -> StepOutputs:
        """Brings the tokens of the step in flight, and launches the next one: before they come or, if need be,
        after."""
        if self._in_flight is None:
            self._in_flight = self._launch(is_settled=True)
        before = self._in_flight
        if before is None:  # nothing was left to compute
            return StepOutputs(step=self.num_steps, time_s=started_s, outputs=[], stats=self.stats())
        if self._must_settle(before):
            outputs = self._settle(before)
            self._in_flight = self._launch(is_settled=True) if self._scheduler.has_work() else None
        else:
            self._in_flight = self._launch(is_settled=False)
            outputs = self._settle(before)
        return outputs

    def _must_settle(self, before: _InFlight) -> bool:
        wants_tokens = self._settled_drafter is not None and self._settled_drafter.should_settle()
        return before.step.holds_up_next or wants_tokens

    def _launch(self, *, is_settled: bool) -> _InFlight | None:
        if self._settled_drafter is not None:
            self._settled_drafter.is_settled = is_settled
        started_s = self._clock()
        scheduled = self._scheduler.schedule(started_s)
        stats = self._scheduler.stats()
        step = self._launcher.launch(scheduled)
        if not scheduled.num_scheduled_tokens:  # those that run await their last token
            return None
        self._tokens.promise(scheduled)
        return _InFlight(scheduled, step, stats, started_s)

    def _settle(self, step: _InFlight) -> StepOutputs:
        computed = step.step.result()
        outputs = self._tokens.settle(step.scheduled, computed.sampled)
        now = self._scheduler.stats()
        stats = step.stats
        stats.num_running, stats.num_waiting = now.num_running, now.num_waiting
        stats.num_free_blocks = now.num_free_blocks
        started_s = max(step.started_s, self._settled_s)  # before that the device had another step to do
        finished = self._finish(step.scheduled, computed, outputs, stats, started_s)
        self._settled_s = finished.time_s
        return finished
