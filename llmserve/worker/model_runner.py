"""Runs one device: holds the model and its KV cache, turns a SchedulerOutput into tokens. Decides nothing."""

from __future__ import annotations

import numpy as np
import torch

from llmserve.kernels.ops import AttentionMetadata, KVCache, Ops
from llmserve.messages import MemoryPlan
from llmserve.models.llama import LlamaModel
from llmserve.scheduler.output import SchedulerOutput
from llmserve.worker.input_batch import InputBatch, IntArray, StepInputs
from llmserve.worker.output import ModelRunnerOutput
from llmserve.worker.prompt_scorer import PromptScorer
from llmserve.worker.sampler import Sampler, SamplerOutput


class ModelRunner:
    """`execute` is one step: gather inputs, run the model, sample."""

    def __init__(self, model: LlamaModel, ops: Ops, plan: MemoryPlan, dtype: torch.dtype, device: torch.device) -> None:
        """Allocates the KV cache the plan names; `dtype` is that of its entries."""
        self.model = model
        self.plan = plan
        self.device = device
        self.batch = InputBatch(plan.max_num_seqs, plan.max_model_len, plan.block_size)
        self.sampler = Sampler(ops, self.batch, model.config.vocab_size, device)
        spec = model.kv_cache_spec(plan.block_size, dtype)
        self.kv_caches: list[KVCache] = [
            ops.allocate_kv_cache(spec, plan.num_blocks, device) for _ in range(model.num_layers)
        ]
        self._prompts = PromptScorer(model, ops, self.batch)

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Computes the scheduled tokens; samples for the sequences that have reached their end."""
        self.batch.apply(output)
        self.sampler.apply(output)
        self._prompts.apply(output)
        if not output.num_scheduled_tokens:
            return ModelRunnerOutput()
        inputs = self.batch.gather(output)
        token_ids = torch.from_numpy(inputs.token_ids).to(self.device)
        hidden = self.model.forward(token_ids, self._attention_metadata(inputs), self.kv_caches)
        result = ModelRunnerOutput(prompt_logprobs=self._prompts.score(hidden, inputs))
        self._sample(hidden, inputs, result)
        return result

    def _sample(self, hidden: torch.Tensor, inputs: StepInputs, result: ModelRunnerOutput) -> None:
        if not len(inputs.sample_rows):
            self.batch.advance(inputs, np.empty(0, dtype=np.int64))
            return
        logits = self.model.compute_logits(hidden[torch.from_numpy(inputs.sample_rows).to(self.device)])
        drawn = self.sampler.sample(logits, inputs)
        report_tokens(inputs, drawn, self.batch.advance(inputs, drawn.token_ids), result)

    def _attention_metadata(self, inputs: StepInputs) -> AttentionMetadata:
        max_seq_len = int(inputs.seq_lens.max())
        max_blocks = -(-max_seq_len // self.batch.block_size)
        block_table = self.batch.block_table[inputs.rows, :max_blocks]
        return AttentionMetadata(
            query_start_loc=self._int32(inputs.query_start),
            seq_lens=self._int32(inputs.seq_lens),
            block_table=torch.from_numpy(block_table).to(self.device),
            slot_mapping=torch.from_numpy(inputs.slot_mapping).to(self.device),
            positions=torch.from_numpy(inputs.positions).to(self.device),
            max_seq_len=max_seq_len,
        )

    def _int32(self, values: IntArray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(self.device)


def report_tokens(inputs: StepInputs, drawn: SamplerOutput, num_kept: IntArray, result: ModelRunnerOutput) -> None:
    """Of the tokens drawn, those that each sequence keeps (`num_kept` [s])."""
    token_ids = drawn.token_ids.tolist()
    start = 0
    for request_id, num_drawn, kept in zip(
        inputs.request_ids, inputs.num_samples.tolist(), num_kept.tolist(), strict=True
    ):
        if kept:
            result.sampled[request_id] = token_ids[start : start + kept]
            if start in drawn.logprobs:
                result.logprobs[request_id] = [drawn.logprobs[index] for index in range(start, start + kept)]
        start += num_drawn
