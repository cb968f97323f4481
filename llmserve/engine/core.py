"""The token loop of one LLM: schedule, execute, update. Does no I/O; owns no socket, no thread and no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from llmserve.errors import DeadlineExceededError
from llmserve.messages import EngineRequest, EngineStats, FinishReason, SequenceOutput, StepOutputs
from llmserve.scheduler.budget import TokenBudget
from llmserve.scheduler.deadlines import Deadlines
from llmserve.scheduler.drafts import Drafter
from llmserve.scheduler.output import SchedulerOutput
from llmserve.scheduler.scheduler import Scheduler
from llmserve.worker.output import ModelRunnerOutput


class Runner(Protocol):
    """Whatever computes a step: the model runner of a device, or a null model in benchmarks."""

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput: ...


class EngineCore:
    """Drives a scheduler and a runner. Tests and offline use call `step()` in-process."""

    def __init__(
        self,
        scheduler: Scheduler,
        budget: TokenBudget,
        runner: Runner,
        clock: Callable[[], float],
        drafter: Drafter | None = None,
    ) -> None:
        """`budget` and `drafter` are the scheduler's own: they are told here how long its steps took."""
        self.num_steps = 0
        self._scheduler = scheduler
        self._budget = budget
        self._runner = runner
        self._clock = clock
        self._drafter = drafter
        self._deadlines = Deadlines()

    def add(self, request: EngineRequest) -> None:
        """Queues a request. Raises InvalidRequestError if it could never run here."""
        self._scheduler.add(request)
        if request.deadline_s is not None:
            self._deadlines.add(request.request_id, request.deadline_s)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drops requests, wherever they stand; their blocks are free at once. Unknown ids are ignored."""
        for request_id in self._scheduler.abort(request_ids):
            self._deadlines.forget(request_id)

    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self._scheduler.has_work()

    def stats(self) -> EngineStats:
        """The gauges as they are now, and nothing done."""
        stats = self._scheduler.stats()
        return EngineStats(stats.num_running, stats.num_waiting, stats.num_free_blocks, stats.num_blocks)

    def step(self) -> StepOutputs:
        """One turn of the loop; the tokens of every request that got one, and the end of those that came too late."""
        started_s = self._clock()
        overdue = self._drop_overdue(started_s)
        if overdue and not self.has_work():
            return StepOutputs(step=self.num_steps, time_s=started_s, outputs=overdue, stats=self.stats())
        step = self._turn(started_s)
        step.outputs += overdue
        return step

    def _drop_overdue(self, now_s: float) -> list[SequenceOutput]:
        """Waiting or running, nobody wants them any more: no step is spent on them. Their clients know already, by the
        server's own clock; this is so that a server that is busy does not keep the engine at it."""
        overdue = self._scheduler.abort(self._deadlines.take_overdue(now_s))
        error = (DeadlineExceededError.code, "The request was not answered by its deadline.")
        return [SequenceOutput(request_id, [], FinishReason.ERROR, error=error) for request_id in overdue]

    def _turn(self, started_s: float) -> StepOutputs:
        scheduled = self._scheduler.schedule(started_s)
        computed = self._runner.execute(scheduled)
        outputs = self._scheduler.update(scheduled, computed.sampled)
        return self._finish(scheduled, computed, outputs, self._scheduler.stats(), started_s)

    def _finish(
        self,
        scheduled: SchedulerOutput,
        computed: ModelRunnerOutput,
        outputs: list[SequenceOutput],
        stats: EngineStats,
        started_s: float,
    ) -> StepOutputs:
        """What is said of a step, to the server and to those who learn from how long it took."""
        if computed.logprobs or computed.prompt_logprobs:
            for output in outputs:
                if (logprobs := computed.logprobs.get(output.request_id)) is not None:
                    output.logprobs = logprobs[: len(output.token_ids)]
                output.prompt_logprobs = computed.prompt_logprobs.get(output.request_id)
        if self._deadlines:
            for output in outputs:
                if output.finish_reason is not None:
                    self._deadlines.forget(output.request_id)
        num_decoding = sum(output.finish_reason is None for output in outputs)
        ended_s = self._clock()
        duration_s = ended_s - started_s
        num_seqs = len(scheduled.num_scheduled_tokens)
        # beyond one token a sequence, all lengthens a step like a prompt: recomputed answers too
        num_chunk_tokens = stats.num_step_tokens - num_seqs - stats.num_draft_tokens
        self._budget.observe(stats.num_step_tokens, num_chunk_tokens, num_decoding, duration_s)
        if self._drafter is not None:
            self._drafter.observe(num_seqs, stats.num_step_tokens, stats.num_draft_tokens, duration_s)
        self.num_steps += 1
        return StepOutputs(step=self.num_steps, time_s=ended_s, outputs=outputs, stats=stats)
