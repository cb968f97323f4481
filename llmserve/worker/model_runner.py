"""Runs one device: holds the model and its KV cache, turns a SchedulerOutput into tokens. Decides nothing."""

from __future__ import annotations

import numpy as np
import torch

from llmserve.kernels.ops import AttentionMetadata, KVCache, Ops
from llmserve.messages import MemoryPlan, TokenLogprobs
from llmserve.models.llama import LlamaModel
from llmserve.scheduler.output import SchedulerOutput
from llmserve.worker.input_batch import InputBatch, IntArray, StepInputs
from llmserve.worker.output import ModelRunnerOutput
from llmserve.worker.sampler import Sampler, prompt_logprobs

_PROMPT_LOGITS_ROWS = 64  # rows of the vocabulary's size held at once while scoring a prompt


class ModelRunner:
    """`execute` is one step: gather inputs, run the model, sample."""

    def __init__(self, model: LlamaModel, ops: Ops, plan: MemoryPlan, dtype: torch.dtype, device: torch.device) -> None:
        """Allocates the KV cache the plan names; `dtype` is that of its entries."""
        self.model = model
        self.device = device
        self.batch = InputBatch(plan.max_num_seqs, plan.max_model_len, plan.block_size)
        self.sampler = Sampler(ops, self.batch, model.config.vocab_size, device)
        spec = model.kv_cache_spec(plan.block_size, dtype)
        self.kv_caches: list[KVCache] = [
            ops.allocate_kv_cache(spec, plan.num_blocks, device) for _ in range(model.num_layers)
        ]
        self._prompt_scores: dict[str, list[TokenLogprobs | None]] = {}  # of the requests that want their prompt scored

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Computes the scheduled tokens; samples for the sequences that have reached their end."""
        self.batch.apply(output)
        self.sampler.apply(output)
        for request_id in output.finished_ids:
            self._prompt_scores.pop(request_id, None)
        for new in output.new_requests:
            if new.params.prompt_logprobs is not None:
                self._prompt_scores[new.request_id] = [None]
        if not output.num_scheduled_tokens:
            return ModelRunnerOutput()
        inputs = self.batch.gather(output)
        token_ids = torch.from_numpy(inputs.token_ids).to(self.device)
        hidden = self.model.forward(token_ids, self._attention_metadata(inputs), self.kv_caches)
        result = ModelRunnerOutput()
        self._score_prompts(hidden, inputs, result)
        self._sample(hidden, inputs, result)
        return result

    def _sample(self, hidden: torch.Tensor, inputs: StepInputs, result: ModelRunnerOutput) -> None:
        if not len(inputs.sample_rows):
            self.batch.advance(inputs, np.empty(0, dtype=np.int64))
            return
        logits = self.model.compute_logits(hidden[torch.from_numpy(inputs.sample_rows).to(self.device)])
        drawn = self.sampler.sample(logits, inputs)
        num_kept = self.batch.advance(inputs, drawn.token_ids).tolist()
        token_ids = drawn.token_ids.tolist()
        start = 0
        for request_id, num_drawn, kept in zip(inputs.request_ids, inputs.num_samples.tolist(), num_kept, strict=True):
            if kept:
                result.sampled[request_id] = token_ids[start : start + kept]
                if start in drawn.logprobs:
                    result.logprobs[request_id] = [drawn.logprobs[index] for index in range(start, start + kept)]
            start += num_drawn

    def _score_prompts(self, hidden: torch.Tensor, inputs: StepInputs, result: ModelRunnerOutput) -> None:
        """Log-probabilities of prompt tokens, chunk by chunk; handed over when the prompt's end is reached."""
        if not self._prompt_scores:
            return
        for index, request_id in enumerate(inputs.request_ids):
            scores = self._prompt_scores.get(request_id)
            first, stop = int(inputs.query_start[index]), int(inputs.query_start[index + 1])
            end = int(inputs.seq_lens[index])
            start = end - (stop - first)
            prompt = self.batch.prompt_token_ids(int(inputs.rows[index]))
            if scores is None or start >= len(prompt):
                continue
            if start == 0:
                scores[:] = [None]  # a preempted prompt is scored afresh
            num_top = self.batch.params[request_id].prompt_logprobs or 0
            following = prompt[start + 1 : end + 1].tolist()
            for at in range(0, len(following), _PROMPT_LOGITS_ROWS):
                chunk = following[at : at + _PROMPT_LOGITS_ROWS]
                logits = self.model.compute_logits(hidden[first + at : first + at + len(chunk)])
                scores.extend(prompt_logprobs(logits, chunk, num_top))
            if end >= len(prompt):
                result.prompt_logprobs[request_id] = scores

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
            max_query_len=int(np.diff(inputs.query_start).max()),
            max_seq_len=max_seq_len,
        )

    def _int32(self, values: IntArray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(self.device)
