"""Runs a GPU: steps are launched, not waited for, and the tokens of one feed the next on the device. Decides nothing.

A step is one copy to the device (what the host knows of it), a graph of the forward pass, a graph of the draws, and one
copy back; large steps run the same work without graphs. `worker/model_runner.py` is the same for a device that computes
while the host waits.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from llmserve.config import EngineConfig
from llmserve.kernels.ops import AttentionMetadata, KVCache, Ops
from llmserve.kernels.step_ops import StepOps
from llmserve.messages import MemoryPlan
from llmserve.models.llama import LlamaModel
from llmserve.scheduler.drafts import MAX_STEP_DRAFTS
from llmserve.scheduler.output import SchedulerOutput
from llmserve.worker.cuda_graphs import CudaGraphs, smallest_fitting, step_shapes
from llmserve.worker.device import Device, Event
from llmserve.worker.device_rows import DeviceRows, SamplingMode, Staged, StepShape
from llmserve.worker.host_blocks import HostBlocks
from llmserve.worker.input_batch import Draws, InputBatch, IntArray, StepInputs
from llmserve.worker.model_runner import report_tokens
from llmserve.worker.output import ModelRunnerOutput
from llmserve.worker.prompt_scorer import PromptScorer
from llmserve.worker.sampler import Sampler, SamplerOutput

logger = logging.getLogger(__name__)

ADJUSTED = SamplingMode(all_greedy=False, filtered=True, adjusted=True)  # takes all kinds of draws
SAMPLING_MODES = (SamplingMode(True, False), SamplingMode(False, False), SamplingMode(False, True), ADJUSTED)
DrawKey = tuple[int, SamplingMode]
_FEW_TOKENS = 64
MAX_GRAPH_SIZE = 512  # tokens: what is larger takes longer than its launches


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSettings:
    """Which steps are graphs: none above `max_size` tokens (0: none at all); captured at start, or when first
    needed."""

    max_size: int = MAX_GRAPH_SIZE
    lazily: bool = False

    @classmethod
    def of(cls, config: EngineConfig) -> GraphSettings:
        """What the settings say."""
        return cls(max_size=0 if config.enforce_eager else MAX_GRAPH_SIZE, lazily=config.cuda_graph_capture == "lazy")


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedStep:
    """A step on its way."""

    runner: GPUModelRunner
    inputs: StepInputs
    event: Event
    draws: Draws | None  # promised to the host's rows; None: the host has a part in what becomes of them
    drawn: torch.Tensor | None  # int64 [r], pinned; None: they are still to be drawn, from logits
    is_scored: bool  # some prompt wants log-probabilities

    @property
    def holds_up_next(self) -> bool:
        """Whether no step may be scheduled behind it before its result is taken."""
        return self.draws is None

    def result(self) -> ModelRunnerOutput:
        """Waits, and brings the host's rows up to what was drawn."""
        self.event.wait()
        return self.runner.settle(self)


class NothingLaunched:
    """A step without tokens."""

    holds_up_next = False

    def result(self) -> ModelRunnerOutput:
        return ModelRunnerOutput()


class GPUModelRunner:
    """`launch` is one step; `execute` is one that is waited for. Steps end in the order of their launches, and at most
    two are on their way at a time."""

    def __init__(
        self,
        model: LlamaModel,
        ops: Ops,
        step_ops: StepOps,
        plan: MemoryPlan,
        dtype: torch.dtype,
        device: Device,
        graphs: GraphSettings,
    ) -> None:
        """Allocates the KV cache the plan names, of `dtype`, and everything else that stays; `warm_up` does the
        rest."""
        self.model = model
        self.plan = plan
        self.batch = InputBatch(plan.max_num_seqs, plan.max_model_len, plan.block_size)
        self.sampler = Sampler(ops, self.batch, model.config.vocab_size, device.torch_device, device.submit)
        self._ops = ops
        self._step_ops = step_ops
        self._device = device
        self._prompts = PromptScorer(model, ops, self.batch)
        max_draws = plan.max_num_seqs + MAX_STEP_DRAFTS
        self._shapes = step_shapes(plan.max_num_seqs, plan.max_num_batched_tokens, graphs.max_size)
        sizes = sorted({shape.num_draws for shape in self._shapes}, reverse=True)
        self._draw_keys: list[DrawKey] = [(size, mode) for size in sizes for mode in SAMPLING_MODES]
        self._lazily = graphs.lazily
        self.num_largest_graphs = 1 + len(SAMPLING_MODES) if self._shapes else 0
        self._rows = DeviceRows(device, self.batch, plan.max_num_batched_tokens, max_draws, null_block=plan.num_blocks)
        at = device.torch_device
        self._draw_hidden = torch.zeros((max_draws, model.config.hidden_size), dtype=model.dtype, device=at)
        self._draw_rows = torch.zeros(max_draws, dtype=torch.int32, device=at)
        self._draw_positions = torch.zeros(max_draws, dtype=torch.int64, device=at)
        self._drawn = torch.zeros(max_draws, dtype=torch.int64, device=at)
        self._drawn_on_host = [device.pinned(max_draws, torch.int64) for _ in range(2)]
        self._hidden: torch.Tensor | None = None  # of a step whose prompts are scored
        self._launched: list[LaunchedStep] = []
        spec = model.kv_cache_spec(plan.block_size, dtype)
        self.kv_caches: list[KVCache] = [  # one block more than the scheduler knows: padding's
            ops.allocate_kv_cache(spec, plan.num_blocks + 1, at) for _ in range(model.num_layers)
        ]
        self._host_blocks = (
            HostBlocks(device, ops, self.kv_caches, plan.num_blocks, plan.num_host_blocks)
            if plan.num_host_blocks
            else None
        )
        self._forward_graphs: CudaGraphs[StepShape] = CudaGraphs(device, self._forward)
        self._draw_graphs: CudaGraphs[DrawKey] = CudaGraphs(device, self._draw)

    @property
    def num_graphs(self) -> int:
        """Captured so far."""
        return len(self._forward_graphs) + len(self._draw_graphs)

    @property
    def num_graph_keys(self) -> int:
        """Graphs in all, captured or not."""
        return len(self._shapes) + len(self._draw_keys)

    @torch.inference_mode()
    def capture_step_by_step(self) -> Iterator[int]:
        """Captures all graphs, the largest of each kind first; says after each how many there are."""
        modes = len(SAMPLING_MODES)
        shapes, draws = self._shapes[::-1], self._draw_keys
        for chosen, keys in ((shapes[:1], draws[:modes]), (shapes[1:], draws[modes:])):
            for shape in chosen:
                self._forward_graphs.capture(shape)
                yield self.num_graphs
            self._device.submit(self._clear_draws)
            for key in keys:
                self._draw_graphs.capture(key)
                yield self.num_graphs

    @torch.inference_mode()
    def run_largest_steps(self) -> None:
        """Steps of padding that take as much memory as any can: most tokens and draws, and one long context shared out
        among programs. What they took stays with the allocator, so no later step has to ask the device for more. And
        every way of drawing, and a step of one token: what runs without a graph is compiled here, not under a
        request."""
        most = StepShape(self.plan.max_num_batched_tokens, self.plan.max_num_seqs, len(self._drawn))
        few = StepShape(min(_FEW_TOKENS, most.num_tokens), 1, 1)
        for shape in (most, few, StepShape(1, 1, 1)):
            self._device.submit(self._rows.clear_staged)
            self._device.submit(functools.partial(self._forward, shape))
            self._device.submit(self._clear_draws)
            for mode in SAMPLING_MODES:
                self._device.submit(functools.partial(self._draw, (shape.num_draws, mode)))

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Before the first request: all graphs, if they are not to wait until they are needed, and all memory.
        `progress` gets graphs captured and graphs in all."""
        started = time.monotonic()
        if not self._lazily:
            for num_captured in self.capture_step_by_step():
                if progress is not None:
                    progress(num_captured, self.num_graph_keys)
        self.run_largest_steps()
        if self._host_blocks is not None:
            self._host_blocks.warm_up(null_block=self.plan.num_blocks)
        self._device.synchronize()
        logger.info(
            "captured %d graphs and ran the largest step in %.1f s", self.num_graphs, time.monotonic() - started
        )

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Computes the scheduled tokens and waits for those that are drawn."""
        return self.launch(output).result()

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> LaunchedStep | NothingLaunched:
        """Starts a step behind those on their way. Their tokens may be unknown, their number not."""
        self.batch.apply(output)
        self.sampler.apply(output)
        self._prompts.apply(output)
        if self._host_blocks is not None:
            self._host_blocks.copy(output)
        if not output.num_scheduled_tokens:
            return NothingLaunched()
        assert len(self._launched) < 2
        assert not any(step.holds_up_next for step in self._launched)
        inputs = self.batch.gather(output)
        is_scored = self._prompts.wants(inputs)
        by_sampler = self.sampler.settles_on_host(inputs.request_ids)
        exact = StepShape(len(inputs.token_ids), len(inputs.rows), len(inputs.sample_rows))
        shape = None if is_scored else smallest_fitting(self._shapes, exact)
        staged = self._rows.stage(output, inputs, shape or exact)
        if staged.num_cells:
            self._device.submit(functools.partial(self._write_rows, staged))
        if shape is not None:
            self._forward_graphs.run(shape)
        else:
            self._device.submit(functools.partial(self._forward, exact, int(inputs.seq_lens.max()), is_scored))
        drawn = self._launch_draws(inputs, shape) if exact.num_draws and not by_sampler else None
        by_host = by_sampler or is_scored or bool(output.draft_token_ids)
        step = LaunchedStep(
            runner=self,
            inputs=inputs,
            event=self._device.record(),
            draws=None if by_host else self.batch.promise(inputs),
            drawn=drawn,
            is_scored=is_scored,
        )
        self._launched.append(step)
        return step

    @torch.inference_mode()
    def settle(self, step: LaunchedStep) -> ModelRunnerOutput:
        """What a step that has ended computed. Called by the step."""
        assert self._launched.pop(0) is step, "steps end in the order of their launches"
        inputs, result = step.inputs, ModelRunnerOutput()
        if step.is_scored:
            assert self._hidden is not None
            result.prompt_logprobs = self._prompts.score(self._hidden, inputs)
            self._hidden = None
        num_draws = len(inputs.sample_rows)
        if step.drawn is not None or not num_draws:
            token_ids = _NO_TOKENS if step.drawn is None else step.drawn.numpy().copy()
            drawn = SamplerOutput(token_ids, {})
        else:
            drawn = self.sampler.sample(self.model.compute_logits(self._draw_hidden[:num_draws]), inputs)
        if step.draws is None:
            num_kept = self.batch.advance(inputs, drawn.token_ids)
        else:
            self.batch.fulfil(step.draws, drawn.token_ids)
            num_kept = inputs.num_samples
        report_tokens(inputs, drawn, num_kept, result)
        return result

    def _launch_draws(self, inputs: StepInputs, shape: StepShape | None) -> torch.Tensor:
        mode, num_draws = self._rows.mode(inputs), len(inputs.sample_rows)
        if self.sampler.tables.are_used(inputs.rows):
            mode = ADJUSTED
        if shape is not None:
            self._draw_graphs.run((shape.num_draws, mode))
        else:
            self._device.submit(functools.partial(self._draw, (num_draws, mode)))
        self._drawn_on_host.reverse()  # the other may be that of a step that was not settled yet
        drawn = self._drawn_on_host[0][:num_draws]
        self._device.copy(drawn, self._drawn[:num_draws])
        return drawn

    def _write_rows(self, staged: Staged) -> None:
        cells, values = self._rows.changes(staged)
        self._step_ops.write_rows(self._rows.rows, cells, values)

    def _forward(self, shape: StepShape, max_seq_len: int | None = None, keep_hidden: bool = False) -> None:
        """The staged step through the model: hidden states of the tokens that draw. Without `max_seq_len` for any
        context, as a graph must be."""
        staged = self._rows.step(shape)
        step = self._step_ops.expand(self._rows.rows, staged, self.plan.block_size)
        meta = AttentionMetadata(
            query_start_loc=staged.query_start,
            seq_lens=step.seq_lens,
            block_table=step.block_table,
            slot_mapping=step.slot_mapping,
            positions=step.positions,
            max_seq_len=max_seq_len or self.plan.max_model_len,
        )
        hidden = self.model.forward(step.token_ids, meta, self.kv_caches)
        num_draws = shape.num_draws
        self._draw_hidden[:num_draws] = hidden.index_select(0, staged.draw_tokens)
        self._draw_rows[:num_draws] = staged.draw_rows
        self._draw_positions[:num_draws] = step.draw_positions
        if keep_hidden:
            self._hidden = hidden

    def _clear_draws(self) -> None:
        """What a pass over padding alone leaves may be no number: nothing is to be drawn from it."""
        self._draw_hidden.zero_()

    def _draw(self, key: DrawKey) -> None:
        """A token for each hidden state that `_forward` left."""
        num_draws, mode = key
        logits = self.model.compute_logits(self._draw_hidden[:num_draws])
        draw_rows = self._draw_rows[:num_draws]
        sampling = self._rows.sampling(draw_rows, self._draw_positions[:num_draws], mode)
        if mode.adjusted:
            sampling = replace(sampling, adjustments=self.sampler.tables.of(draw_rows.long()))
        token_ids = self._ops.sample(logits, sampling)
        self._drawn[:num_draws] = token_ids
        self._rows.keep_last_tokens(draw_rows, token_ids)


_NO_TOKENS: IntArray = np.empty(0, dtype=np.int64)
