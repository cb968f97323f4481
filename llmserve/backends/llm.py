"""A served LLM: token ids to the engine, text back. Knows no HTTP and no sockets, and not how many engines it took.

Detokenising, stop strings and metrics happen here, in the server process, as one step's message comes in.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from llmserve.backends.admission import Admission, AdmissionLimits
from llmserve.backends.generation import GenerationSpec, SamplingDefaults
from llmserve.backends.sequence import LLMGeneration, SequenceState
from llmserve.config import EngineConfig, ServerConfig
from llmserve.engine.processes import EngineProcesses
from llmserve.engine.supervision import Phase, SupervisionSettings
from llmserve.engine.supervisor import EngineSupervisor
from llmserve.errors import LLMServeError, NotReadyError
from llmserve.messages import EngineReady, EngineRequest, EngineStats, LoadProgress, MemoryPlan, StepOutputs
from llmserve.metrics import Metrics
from llmserve.request_context import current_request
from llmserve.tokenizer import Tokenizer


class LLM:
    """One language model, its tokenizer and its engine. Implements `TextGenerator` and `EngineEvents`."""

    def __init__(
        self,
        name: str,
        root: str,
        config: EngineConfig,
        tokenizer: Tokenizer,
        sampling_defaults: SamplingDefaults,
        metrics: Metrics,
        server: ServerConfig,
        processes: EngineProcesses,
        version: int = 1,
    ) -> None:
        self.name = name
        self.version = version  # counts the times it was loaded
        self.successor: LLM | None = None  # another version with the same tokenizer, for those that come too late
        self.root = root
        self.created = int(time.time())
        self.max_model_len = config.max_model_len or 0  # known for good once the engine has planned
        self.max_logprobs = config.max_logprobs
        self.vocab_size = tokenizer.vocab_size
        self.honours_priority = config.scheduling_policy == "priority"
        self.tokenizer = tokenizer
        self.sampling_defaults = sampling_defaults
        self.metrics = metrics.model(name)
        supervision = SupervisionSettings(
            stall_timeout_s=server.stall_timeout_s, restart_timeout_s=server.restart_timeout_s
        )
        self.engine = EngineSupervisor(name, config, self, self.metrics, supervision, processes, server.log_level)
        self._prefix_caching = config.enable_prefix_caching
        self._admission = Admission(
            AdmissionLimits(
                max_sequences=config.max_queued_seqs,
                max_tokens=config.max_queued_tokens,
                max_queue_time_s=config.max_queue_time_s,
                policy=config.scheduling_policy,
            ),
            lambda delay_s, call: asyncio.get_running_loop().call_later(delay_s, call),
        )
        self._sequences: dict[str, SequenceState] = {}

    async def start(
        self,
        on_plan: Callable[[MemoryPlan], None] | None = None,
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> EngineReady:
        """Loads the model. Raises what keeps it from running."""
        started = self.engine.start(on_plan, on_progress)
        ready, _ = await asyncio.gather(started, asyncio.to_thread(self.tokenizer.warm_up))
        self.max_model_len = ready.plan.max_model_len
        self._admission.max_running = ready.plan.max_num_seqs
        plan = ready.plan
        self.vocab_size = min(self.tokenizer.vocab_size, plan.vocab_size)
        self.max_logprobs = min(self.max_logprobs, plan.vocab_size)
        self.metrics.set_cache_config(plan.block_size, plan.num_blocks, plan.kv_cache_dtype, self._prefix_caching)
        return ready

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests; returns when those in flight have finished, or when the time is over."""
        await self.engine.drain(timeout_s)

    async def retire(self, timeout_s: float) -> None:
        """Takes no more requests; returns when those in flight have finished, or when one engine has had that time for
        them. One that is being replaced has had none: nobody loses an answer because an engine died at the wrong time.
        Without any time (0) nobody is waited for.
        """
        num_engines = self.engine.num_engines
        while not await self.engine.drain(timeout_s):
            had_its_time = self.engine.num_engines == num_engines and self.engine.phase is not Phase.RESTARTING
            if had_its_time or timeout_s <= 0:
                break
            num_engines = self.engine.num_engines

    async def shutdown(self, timeout_s: float) -> None:
        """Ends the engine; requests still in flight fail."""
        await self.engine.shutdown(timeout_s)

    def is_ready(self) -> bool:
        """Loaded, and running requests."""
        return self.engine.is_ready

    def is_live(self) -> bool:
        """False once the engine is gone for good. One that hangs or dies is replaced, and this stays true meanwhile."""
        return self.engine.is_live

    def takes_requests(self) -> bool:
        """Ready, or about to be: what comes while an engine is replaced waits for it."""
        return self.engine.takes_requests

    @property
    def reason(self) -> str:
        """Why it is not ready; empty when it is."""
        return self.engine.reason

    def generate(self, request_id: str, spec: GenerationSpec) -> LLMGeneration:
        """Starts `spec.n` sequences; once this version takes none, in the next. Raises NotReadyError while the engine
        is loading, draining or gone for good; QueueFullError, RateLimitError if they may not join the queue."""
        if not self.takes_requests():
            if self.successor is not None:
                return self.successor.generate(request_id, spec)
            raise NotReadyError(f"The model {self.name!r} takes no requests now. It is {self.reason}")
        context, arrival_s = current_request(), time.monotonic()
        context.model = self.name
        spec = spec.until(context.deadline_s)
        tickets = self._admission.admit(spec, context, arrival_s)
        generation = LLMGeneration(request_id, spec, self, arrival_s, context, tickets)
        for sequence in generation.sequences:
            self._sequences[sequence.id] = sequence
            self.engine.add(
                EngineRequest(
                    request_id=sequence.id,
                    prompt_token_ids=spec.prompt_token_ids,
                    params=sequence.params,
                    arrival_s=arrival_s,
                    priority=spec.priority,
                    tenant=context.tenant.name,
                    weight=context.tenant.weight,
                    cache_salt=spec.cache_salt,
                    deadline_s=spec.deadline_s,
                )
            )
        if spec.deadline_s != context.deadline_s or context.on_deadline is None:
            generation.watch_deadline()  # else the door does, and ends all that the request has started
        self.metrics.observe_request_started(len(spec.prompt_token_ids), spec.n, spec.sampling.max_tokens)
        return generation

    def finish(self, sequences: list[SequenceState], abort: bool) -> None:
        """Forgets sequences; `abort` tells the engine, which may still be working on them."""
        known = [sequence.id for sequence in sequences if self._sequences.pop(sequence.id, None) is not None]
        if known and abort:
            self.engine.abort(known)

    def pause(self, sequences: list[SequenceState]) -> None:
        """Nobody takes their tokens: the engine goes on with others until `unpause`."""
        self.metrics.request_pauses += 1
        self.engine.pause([sequence.id for sequence in sequences])

    def unpause(self, sequences: list[SequenceState]) -> None:
        """They go on where they were."""
        self.engine.unpause([sequence.id for sequence in sequences])

    def on_step(self, step: StepOutputs) -> None:
        """The tokens of one step."""
        now = time.monotonic()
        self.metrics.observe_step(step.stats)
        self._admission.num_engine_waiting = step.stats.num_waiting
        for output in step.outputs:
            # one that is not known has been aborted, or has met a stop string, while the step ran
            if (sequence := self._sequences.get(output.request_id)) is not None:
                sequence.receive(output, now)

    def on_idle(self, stats: EngineStats) -> None:
        """The gauges, while there are no steps."""
        self.metrics.observe_step(stats)
        self._admission.num_engine_waiting = stats.num_waiting

    def on_failed(self, request_ids: list[str], error: LLMServeError) -> None:
        """These sequences cannot go on, nor the requests they belong to."""
        for request_id in request_ids:
            if (sequence := self._sequences.get(request_id)) is not None:
                sequence.generation.fail(error)
