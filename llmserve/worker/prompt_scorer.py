"""Log-probabilities of prompts, for the requests that ask for them, gathered over a prompt's chunks. Draws nothing."""

from __future__ import annotations

import torch

from llmserve.kernels.ops import Ops
from llmserve.messages import TokenLogprobs
from llmserve.models.llama import LlamaModel
from llmserve.scheduler.output import SchedulerOutput
from llmserve.worker.input_batch import InputBatch, StepInputs
from llmserve.worker.sampler import score_tokens

_LOGITS_ROWS = 64  # rows of the vocabulary's size held at once


class PromptScorer:
    """Keeps the scores of a prompt until its end is reached."""

    def __init__(self, model: LlamaModel, ops: Ops, batch: InputBatch) -> None:
        self._model = model
        self._ops = ops
        self._batch = batch
        self._scores: dict[str, list[TokenLogprobs | None]] = {}

    def apply(self, output: SchedulerOutput) -> None:
        """Meets new requests, forgets finished ones."""
        for request_id in output.finished_ids:
            self._scores.pop(request_id, None)
        for new in output.new_requests:
            if new.params.prompt_logprobs is not None:
                self._scores[new.request_id] = [None]

    def wants(self, inputs: StepInputs) -> bool:
        """Whether anything of this step is to be scored."""
        return any(request_id in self._scores for request_id in inputs.request_ids) if self._scores else False

    def score(self, hidden: torch.Tensor, inputs: StepInputs) -> dict[str, list[TokenLogprobs | None]]:
        """hidden [t, hidden] of the step -> the scores of the prompts whose last chunk was in it."""
        complete: dict[str, list[TokenLogprobs | None]] = {}
        if not self._scores:
            return complete
        for index, request_id in enumerate(inputs.request_ids):
            scores = self._scores.get(request_id)
            first, stop = int(inputs.query_start[index]), int(inputs.query_start[index + 1])
            end = int(inputs.seq_lens[index])
            start = end - (stop - first)
            prompt = self._batch.prompt_token_ids(int(inputs.rows[index]))
            if scores is None or start >= len(prompt):
                continue
            if start == 0:
                scores[:] = [None]  # a preempted prompt is scored afresh
            num_top = self._batch.params[request_id].prompt_logprobs or 0
            following = prompt[start + 1 : end + 1].tolist()
            for at in range(0, len(following), _LOGITS_ROWS):
                chunk = following[at : at + _LOGITS_ROWS]
                logits = self._model.compute_logits(hidden[first + at : first + at + len(chunk)])
                token_ids = torch.tensor(chunk, device=logits.device)
                scores.extend(score_tokens(self._ops, logits, token_ids, [num_top] * len(chunk)))
            if end >= len(prompt):
                complete[request_id] = scores
        return complete
