"""A served LLM: token ids to the engine, text back. Knows no HTTP and no sockets.

Here is the truth about every request in flight: its prompt, its parameters, its tokens so far. Detokenising, stop
strings and metrics happen here, in the server process, as one step's message comes in.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from llmserve.backends.generation import GenerationSpec, SamplingDefaults
from llmserve.backends.sequence import LLMGeneration, SequenceState
from llmserve.config import EngineConfig, ServerConfig
from llmserve.engine.client import ENGINE_COMMAND, EngineClient, EngineState
from llmserve.errors import LLMServeError, NotReadyError, QueueFullError
from llmserve.messages import (
    AbortRequests,
    EngineReady,
    EngineRequest,
    EngineStats,
    LoadProgress,
    MemoryPlan,
    StepOutputs,
)
from llmserve.metrics import Metrics
from llmserve.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class LLM:
    """One language model, its tokenizer and its engine process. Implements `TextGenerator`."""

    def __init__(
        self,
        name: str,
        root: str,
        config: EngineConfig,
        tokenizer: Tokenizer,
        sampling_defaults: SamplingDefaults,
        metrics: Metrics,
        server: ServerConfig,
        engine_command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self.name = name
        self.root = root
        self.created = int(time.time())
        self.max_model_len = config.max_model_len or 0  # known for good once the engine has planned
        self.max_logprobs = config.max_logprobs
        self.vocab_size = tokenizer.vocab_size
        self.honours_priority = config.scheduling_policy == "priority"
        self.tokenizer = tokenizer
        self.sampling_defaults = sampling_defaults
        self.metrics = metrics.model(name)
        self.engine = EngineClient(
            config, self._on_step, self.metrics.observe_step, self._on_dead, server.log_level, engine_command
        )
        self._prefix_caching = config.enable_prefix_caching
        self._stall_timeout_s = server.stall_timeout_s
        self._max_sequences = config.max_queued_seqs
        self._sequences: dict[str, SequenceState] = {}

    async def start(
        self,
        on_plan: Callable[[MemoryPlan], None] | None = None,
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> EngineReady:
        """Loads the model. Raises what keeps it from running."""
        ready = await self.engine.start(on_plan, on_progress)
        self.max_model_len = ready.plan.max_model_len
        plan = ready.plan
        self.vocab_size = min(self.tokenizer.vocab_size, plan.vocab_size)
        self.max_logprobs = min(self.max_logprobs, plan.vocab_size)
        self.metrics.set_cache_config(plan.block_size, plan.num_blocks, plan.dtype, self._prefix_caching)
        return ready

    async def shutdown(self, drain: bool = True, timeout_s: float = 30.0) -> None:
        """Ends the engine; requests still in flight are finished first if `drain`."""
        await self.engine.shutdown(drain, timeout_s)

    def is_ready(self) -> bool:
        """Loaded, and taking requests."""
        return self.engine.state is EngineState.READY

    def is_live(self) -> bool:
        """False if the engine is dead, or has work and its steps do not advance, or is idle and has gone silent."""
        if self.engine.state in (EngineState.DEAD, EngineState.STARTING):
            return self.engine.state is EngineState.STARTING
        since = self.engine.last_step_s if self._sequences else self.engine.last_message_s
        waited = min(time.monotonic() - since, self._longest_wait_s())
        return waited < self._stall_timeout_s

    def generate(self, request_id: str, spec: GenerationSpec) -> LLMGeneration:
        """Starts `spec.n` sequences. Raises NotReadyError while the engine is loading, draining or dead."""
        if not self.is_ready():
            raise NotReadyError(f"The model {self.name!r} is {self.engine.state.value}; try again later.")
        if len(self._sequences) + spec.n > self._max_sequences:
            raise QueueFullError(
                f"{len(self._sequences)} sequences are in flight, and with this request's {spec.n} there would be more "
                f"than {self._max_sequences}. Try again later."
            )
        arrival_s = time.monotonic()
        generation = LLMGeneration(request_id, spec, self, arrival_s)
        for sequence in generation.sequences:
            self._sequences[sequence.id] = sequence
            self.engine.send(
                EngineRequest(
                    request_id=sequence.id,
                    prompt_token_ids=spec.prompt_token_ids,
                    params=sequence.params,
                    arrival_s=arrival_s,
                    priority=spec.priority,
                    cache_salt=spec.cache_salt,
                )
            )
        self.metrics.observe_request_started(len(spec.prompt_token_ids), spec.n, spec.sampling.max_tokens)
        return generation

    def finish(self, sequences: list[SequenceState], abort: bool) -> None:
        """Forgets sequences; `abort` tells the engine, which may still be working on them."""
        known = [sequence.id for sequence in sequences if self._sequences.pop(sequence.id, None) is not None]
        if known and abort and self.engine.state in (EngineState.READY, EngineState.DRAINING):
            self.engine.send(AbortRequests(known))

    def _on_step(self, step: StepOutputs) -> None:
        now = time.monotonic()
        self.metrics.observe_step(step.stats)
        for output in step.outputs:
            # one that is not known has been aborted, or has met a stop string, while the step ran
            if (sequence := self._sequences.get(output.request_id)) is not None:
                sequence.receive(output, now)

    def _on_dead(self, error: LLMServeError) -> None:
        for sequence in list(self._sequences.values()):
            sequence.generation.fail(error)
        self._sequences.clear()
        self.metrics.observe_step(EngineStats(0, 0, 0, 0))  # a dead engine runs nothing and holds nothing

    def _longest_wait_s(self) -> float:
        """How long the oldest request has been here: a step cannot be late for longer than there is work."""
        if not self._sequences:
            return float("inf")
        first = next(iter(self._sequences.values()))
        return time.monotonic() - first.timing.arrival_s
