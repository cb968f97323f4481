"""Draws the next token of every row that is due one, and reports log-probabilities where asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from llmserve.kernels.ops import LogitAdjustments, Ops, SamplingTensors
from llmserve.messages import TokenLogprobs
from llmserve.scheduler.output import SchedulerOutput
from llmserve.worker.input_batch import InputBatch, IntArray, StepInputs
from llmserve.worker.logits_processors import AdjustmentTables, BadWords, Submit, bad_sequences

T = TypeVar("T")


@dataclass(slots=True)
class SamplerOutput:
    """`token_ids` [r], and log-probabilities of the rows that asked, by index in r."""

    token_ids: IntArray
    logprobs: dict[int, TokenLogprobs]


class Sampler:
    """Keeps what each request asks of its draws for as long as the request lives."""

    def __init__(
        self, ops: Ops, batch: InputBatch, vocab_size: int, device: torch.device, submit: Submit | None = None
    ) -> None:
        """`submit`: see `AdjustmentTables`, which is `tables`."""
        self._ops = ops
        self._batch = batch
        self._device = device
        self.tables = AdjustmentTables(len(batch.temperature), vocab_size, device, submit)
        self._bad_words: dict[str, BadWords] = {}
        self._with_logprobs: dict[str, int] = {}

    def apply(self, output: SchedulerOutput) -> None:
        """Meets new requests, forgets finished ones. The batch has been told before."""
        for request_id in output.finished_ids:
            self._bad_words.pop(request_id, None)
            self._with_logprobs.pop(request_id, None)
        for new in output.new_requests:
            if bad_words := bad_sequences(new.params):
                self._bad_words[new.request_id] = bad_words
            if new.params.logprobs is not None:
                self._with_logprobs[new.request_id] = new.params.logprobs
        for request_id in (*(new.request_id for new in output.new_requests), *output.resumed_requests):
            row, batch = self._batch.row_of[request_id], self._batch
            prompt, generated = batch.prompt_token_ids(row), batch.output_token_ids(row)
            self.tables.enter(row, batch.params[request_id], prompt, generated)

    def settles_on_host(self, request_ids: Sequence[str]) -> bool:
        """Whether the host has a part in choosing some request's tokens, or in what is told of them."""
        asked = self._bad_words.keys() | self._with_logprobs.keys()
        return bool(asked) and not asked.isdisjoint(request_ids)

    def sample(self, logits: torch.Tensor, inputs: StepInputs) -> SamplerOutput:
        """logits float32 [r, vocab] of `inputs.sample_rows`. Changes `logits`.

        Rows behind drafts are drawn as if the drafts were true. What is done to their logits knows the tokens generated
        before this step: the scheduler gives no drafts to requests that ask for more than their number.
        """
        rows = inputs.rows[inputs.sample_sequences]
        positions = inputs.positions[inputs.sample_rows] + 1
        adjustments = None
        if self.tables.are_used(rows):
            adjustments = self.tables.of(torch.from_numpy(rows).to(self._device))
        asked = self._rows_with(self._with_logprobs, inputs)
        is_changed = adjustments is not None or bool(self._bad_words)
        asked_rows = torch.tensor(list(asked), device=self._device)
        # what is reported is the model's own distribution: a row is kept before anything is done to it
        raw = logits[asked_rows] if asked and (is_changed or len(asked) < len(logits)) else logits
        for index, bad_words in self._rows_with(self._bad_words, inputs).items():
            bad_words.apply(logits[index], self._batch.output_token_ids(int(rows[index])))
        token_ids = self._ops.sample(logits, self._tensors(rows, positions, adjustments))
        scores = score_tokens(self._ops, raw, token_ids[asked_rows], list(asked.values())) if asked else []
        drawn: IntArray = token_ids.cpu().numpy()
        return SamplerOutput(drawn, dict(zip(asked, scores, strict=True)))

    def _rows_with(self, wanted: dict[str, T], inputs: StepInputs) -> dict[int, T]:
        """The rows of logits, by index in r, of requests in `wanted`."""
        if not wanted:
            return {}
        ids = [inputs.request_ids[sequence] for sequence in inputs.sample_sequences.tolist()]
        return {index: wanted[request_id] for index, request_id in enumerate(ids) if request_id in wanted}

    def _tensors(self, rows: IntArray, positions: IntArray, adjustments: LogitAdjustments | None) -> SamplingTensors:
        batch = self._batch
        temperature, top_k = batch.temperature[rows], batch.top_k[rows]
        top_p, min_p = batch.top_p[rows], batch.min_p[rows]
        return SamplingTensors(
            temperature=torch.from_numpy(temperature).to(self._device),
            top_k=torch.from_numpy(top_k).to(self._device),
            top_p=torch.from_numpy(top_p).to(self._device),
            min_p=torch.from_numpy(min_p).to(self._device),
            seeds=torch.from_numpy(batch.seeds[rows]).to(self._device),
            positions=torch.from_numpy(positions).to(self._device),
            all_greedy=not temperature.any(),
            any_top_k=bool(top_k.any()),
            any_top_p=bool((top_p < 1).any()),
            any_min_p=bool(min_p.any()),
            adjustments=adjustments,
        )


def score_tokens(
    ops: Ops, logits: torch.Tensor, token_ids: torch.Tensor, num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """logits float32 [r, vocab], as the model made them; token_ids int64 [r]; how many of the likeliest each row wants
    beside its token."""
    most = min(max(num_top, default=0), logits.shape[1])
    scores = ops.token_logprobs(logits, token_ids, most)
    columns = (token_ids, scores.logprobs, scores.ranks, scores.top_ids, scores.top_logprobs)
    return [
        TokenLogprobs(token_id=token_id, logprob=logprob, rank=rank, top=list(zip(ids, values, strict=True))[:count])
        for token_id, logprob, rank, ids, values, count in zip(
            *(column.tolist() for column in columns), num_top, strict=True
        )
    ]
