"""Keeps one model's engine running, and its requests going on whatever becomes of it. Knows no HTTP and no text.

An engine process may be killed, hang or fail at any moment. The requests, and their tokens so far, are here: the engine
is replaced, and gets them as if it had generated those tokens itself. A token is a function of the tokens before it,
the seed and the position, so nobody who reads them can tell.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable

from llmserve.config import EngineConfig
from llmserve.engine.backoff import Backoff
from llmserve.engine.client import EngineClient, EngineState
from llmserve.engine.in_flight import InFlightRequests
from llmserve.engine.launch import died_of_its_step, was_ended_from_outside
from llmserve.engine.processes import EngineProcesses
from llmserve.engine.stall_guard import StallGuard
from llmserve.engine.supervision import EngineEvents, Nobody, Phase, SupervisionSettings
from llmserve.errors import EngineDeadError, LLMServeError
from llmserve.messages import (
    AbortRequests,
    EngineReady,
    EngineRequest,
    EngineStats,
    LoadProgress,
    MemoryPlan,
    StepOutputs,
)
from llmserve.metrics import ModelMetrics

logger = logging.getLogger(__name__)

_MAX_EXPLAINED_FAILURES = 3  # starts that the engine itself says cannot work: then nobody is kept waiting any longer


class EngineSupervisor:
    """Started once, shut down once; in between there is an engine, or there will be one."""

    def __init__(
        self,
        name: str,
        config: EngineConfig,
        events: EngineEvents,
        metrics: ModelMetrics,
        settings: SupervisionSettings,
        processes: EngineProcesses,
        log_level: str = "info",
    ) -> None:
        self.phase = Phase.LOADING
        self.num_engines = 0  # that have been started
        self._name = name
        self._config = config
        self._events = events
        self._metrics = metrics
        self._settings = settings
        self._log_level = log_level
        self._processes = processes
        self._requests = InFlightRequests()
        self._engine: EngineClient | None = None
        self._guard: StallGuard | None = None
        self._died = asyncio.Event()
        self._death: LLMServeError | None = None
        self._problem = ""
        self._draining = False
        self._drained = asyncio.Event()
        self._backoff = Backoff(settings.min_backoff_s, settings.max_backoff_s)
        self._task: asyncio.Task[None] | None = None

    # What the rest of the server asks.

    @property
    def pid(self) -> int | None:
        """The process of the engine there is now."""
        return self._engine.pid if self._engine is not None else None

    @property
    def takes_requests(self) -> bool:
        """Whether a request would be run: now, or as soon as the engine is back."""
        return self.phase in (Phase.READY, Phase.RESTARTING) and not self._draining

    @property
    def is_ready(self) -> bool:
        """Whether a request would be run now."""
        return self.phase is Phase.READY and not self._draining

    @property
    def is_live(self) -> bool:
        """False once the engine cannot be brought back; one that hangs is replaced, and not waited for."""
        return self.phase not in (Phase.FAILED, Phase.STOPPED)

    @property
    def reason(self) -> str:
        """Why it is not ready; empty when it is."""
        if self.is_ready:
            return ""
        state = "draining" if self._draining else str(self.phase)
        return f"{state}: {self._problem}" if self._problem else state

    # Its life.

    async def start(
        self,
        on_plan: Callable[[MemoryPlan], None] | None = None,
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> EngineReady:
        """Returns when the first engine takes requests. Raises what the engine says is wrong; one that is killed while
        it loads is started again."""
        while True:
            try:
                ready = await self._start_engine(on_plan, on_progress)
                break
            except EngineDeadError as error:
                self._start_failed(error)
                if self._backoff.num_failures >= _MAX_EXPLAINED_FAILURES:
                    self.phase = Phase.FAILED
                    raise
                await self._backoff.wait()
            except LLMServeError as error:
                self.phase, self._problem = Phase.FAILED, error.message
                raise
        plan = ready.plan
        self._config = dataclasses.replace(  # another engine must have room for what this one has promised
            self._config,
            kv_cache_memory=plan.kv_cache_bytes,
            max_model_len=plan.max_model_len,
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
        )
        self._engine_is_up()
        self._task = asyncio.create_task(self._keep_running(), name=f"supervise {self._name}")
        self._task.add_done_callback(self._on_task_done)
        return ready

    async def drain(self, timeout_s: float) -> bool:
        """Takes no more requests; returns when those in flight have finished, in another engine if need be, or when
        the time is over: False."""
        self._draining = True
        if not self._requests:
            return True
        self._drained.clear()
        try:
            await asyncio.wait_for(self._drained.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def shutdown(self, timeout_s: float) -> None:
        """Ends the engine, which gets `timeout_s` seconds for it; what is still in flight fails. Safe to call twice."""
        self._draining = True
        self.phase = Phase.STOPPED
        if self._guard is not None:
            self._guard.end()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._engine is not None:
            await self._engine.shutdown(drain=False, timeout_s=timeout_s)
        if self._requests:
            logger.warning("%s: %d requests are cut off", self._name, len(self._requests))
        self._fail(self._requests.ids(), EngineDeadError(f"The model {self._name!r} has been stopped."))
        # they refer to us: who is done with a model need not wait for the garbage collector to be rid of it
        self._engine = self._guard = self._task = self._death = None
        self._events = Nobody()

    # Requests.

    def add(self, request: EngineRequest) -> None:
        """Takes a request; while there is no engine it waits for one. Its id must not be in flight."""
        assert request.request_id not in self._requests
        self._requests.add(request)
        self._send_unsent()

    def abort(self, request_ids: Iterable[str]) -> None:
        """They are wanted no longer. Unknown ids are ignored: they have just finished."""
        self._drop(self._requests.forget(request_ids))
        self._after_change()

    def pause(self, request_ids: Iterable[str]) -> None:
        """Nobody takes their tokens: they give up seat and blocks until `unpause`."""
        self._drop(self._requests.pause(request_ids))

    def unpause(self, request_ids: Iterable[str]) -> None:
        """They go on where they were."""
        self._requests.unpause(request_ids)
        self._after_change()

    def _drop(self, names: list[str]) -> None:
        if names and self._engine is not None and self._engine.state is EngineState.READY:
            self._engine.send(AbortRequests(names))

    def _send_unsent(self) -> None:
        engine, guard = self._engine, self._guard
        if self.phase is not Phase.READY or engine is None or guard is None or engine.state is not EngineState.READY:
            return
        for request in self._requests.take_unsent():
            engine.send(request)
            guard.work()

    def _after_change(self) -> None:
        if self._requests.has_unsent:
            self._send_unsent()  # the next suspect, if it is about those
        if not self._requests:
            self._drained.set()

    def _fail(self, request_ids: list[str], error: LLMServeError) -> None:
        self._requests.forget(request_ids)
        if request_ids:
            self._events.on_failed(request_ids, error)
        self._after_change()

    # What the engine says.

    def _on_step(self, step: StepOutputs) -> None:
        self._requests.record(step)
        step.stats.num_waiting += self._requests.num_held
        if self._guard is not None:
            self._guard.step(self._requests.has_sent)
        self._backoff.worked()
        self._events.on_step(step)
        self._after_change()

    def _on_idle(self, stats: EngineStats) -> None:
        if self._guard is not None:
            self._guard.heartbeat(self._requests.has_sent)
        self._backoff.worked()
        stats.num_waiting += self._requests.num_held
        self._events.on_idle(stats)

    def _on_dead(self, error: LLMServeError) -> None:
        self._death = error
        self._died.set()

    # Replacing it.

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        """A fault of ours must not pass for an engine that is about to be back."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed", task.get_name(), exc_info=error)
            self._problem = f"its supervisor failed: {error}"
            self._give_up()

    async def _keep_running(self) -> None:
        while True:
            await self._died.wait()
            self._died.clear()
            died_s = time.monotonic()
            await self._bury()
            give_up = asyncio.get_running_loop().call_later(self._settings.restart_timeout_s, self._give_up)
            try:
                await self._replace()
            finally:
                give_up.cancel()
            recovery_s = time.monotonic() - died_s
            self._metrics.observe_engine_restart(recovery_s, len(self._requests))
            logger.warning(
                "%s: the engine is back after %.2f s (process %d); %d requests go on behind %d tokens",
                *(self._name, recovery_s, self.pid, len(self._requests), self._requests.num_tokens),
            )
            self._engine_is_up()

    async def _bury(self) -> None:
        """The engine has died: judges who may be at fault, and lets go of everything it had."""
        engine, guard, error = self._engine, self._guard, self._death
        assert engine is not None
        assert guard is not None
        assert error is not None
        guard.end()
        self.phase, self._problem = Phase.RESTARTING, error.message
        await engine.shutdown(drain=False, timeout_s=0.0)
        self._judge_end(engine, guard)
        for_certain = died_of_its_step(engine.exit_status or 0)
        executing = [] if guard.was_stopped else engine.executing
        logger.error(
            "%s: %s %d requests were in flight, %d of them in the step in progress. Starting another engine.",
            *(self._name, error.message, len(self._requests), len(executing)),
        )
        convicted = self._requests.engine_died(executing, for_certain=for_certain)
        for request_id in convicted:
            self._metrics.requests_isolated += 1
            logger.error("%s: request %s has ended its engine again and again: it fails alone", self._name, request_id)
            text = f"This request ended the engine every time it was tried, alone too: {error.message}"
            self._fail([request_id], EngineDeadError(text))
        # a dead engine runs nothing and holds nothing
        self._events.on_idle(EngineStats(0, len(self._requests), 0, 0))

    async def _replace(self) -> None:
        """Until an engine takes requests: at once if the last one worked, else after a pause."""
        num_explained = 0
        while True:
            if self._backoff.pause_s:
                self._processes.prepare(is_awaited=True)
                await self._backoff.wait()
            try:
                await self._start_engine()
                return
            except LLMServeError as error:
                self._start_failed(error)
                num_explained += not isinstance(error, EngineDeadError)
                if num_explained == _MAX_EXPLAINED_FAILURES:
                    self._give_up()

    async def _start_engine(
        self,
        on_plan: Callable[[MemoryPlan], None] | None = None,
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> EngineReady:
        """One attempt. Raises LLMServeError; nothing is left of it then."""
        self._engine = engine = EngineClient(
            self._config, self._on_step, self._on_idle, self._on_dead, self._log_level, self._processes
        )
        self.num_engines += 1
        self._backoff.started()
        self._guard = guard = StallGuard(engine, self._settings.stall_timeout_s, self._metrics)
        try:
            ready = await engine.start(on_plan, on_progress)
            guard.loaded()
            return ready
        except LLMServeError:
            guard.end()
            await engine.shutdown(drain=False, timeout_s=0.0)
            self._judge_end(engine, guard)
            raise

    def _judge_end(self, engine: EngineClient, guard: StallGuard) -> None:
        """What it says about the next start. A kernel that is short of memory kills as a person does: so it counts for
        nothing only of a model that has run before, and only for as long as somebody may be waiting."""
        from_outside = guard.was_stopped or (not guard.was_hung and was_ended_from_outside(engine.exit_status))
        self._backoff.ended(by_accident=from_outside and self.phase is Phase.RESTARTING)

    def _engine_is_up(self) -> None:
        self.phase, self._problem = Phase.READY, ""
        self._send_unsent()
        self._processes.prepare()

    def _start_failed(self, error: LLMServeError) -> None:
        self._problem = error.message
        logger.error("%s: the engine could not be started: %s", self._name, error.message)

    def _give_up(self) -> None:
        """Nobody is kept waiting any longer; the engine is still tried."""
        self.phase = Phase.FAILED
        self._fail(
            self._requests.ids(),
            EngineDeadError(f"The engine of {self._name!r} died and could not be restarted: {self._problem}"),
        )
