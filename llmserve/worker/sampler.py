"""Draws the next token of every row that is due one, and reports log-probabilities where asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmserve.kernels.ops import Ops, SamplingTensors
from llmserve.messages import TokenLogprobs
from llmserve.scheduler.output import SchedulerOutput
from llmserve.worker.input_batch import InputBatch, IntArray, StepInputs
from llmserve.worker.logits_processors import LogitsProcessor, build_processors


@dataclass(slots=True)
class SamplerOutput:
    """`token_ids` [r], and log-probabilities of the rows that asked, by index in r."""

    token_ids: IntArray
    logprobs: dict[int, TokenLogprobs]


class Sampler:
    """Keeps each request's logits processors for as long as the request lives."""

    def __init__(self, ops: Ops, batch: InputBatch, vocab_size: int, device: torch.device) -> None:
        self._ops = ops
        self._batch = batch
        self._vocab_size = vocab_size
        self._device = device
        self._processors: dict[str, list[LogitsProcessor]] = {}
        self._with_logprobs: dict[str, int] = {}

    def apply(self, output: SchedulerOutput) -> None:
        """Meets new requests, forgets finished ones."""
        for request_id in output.finished_ids:
            self._processors.pop(request_id, None)
            self._with_logprobs.pop(request_id, None)
        for new in output.new_requests:
            if processors := build_processors(new.params, self._vocab_size, self._device):
                self._processors[new.request_id] = processors
            if new.params.logprobs is not None:
                self._with_logprobs[new.request_id] = new.params.logprobs

    def settles_on_host(self, request_ids: Sequence[str]) -> bool:
        """Whether the host has a part in choosing some request's tokens, or in what is told of them."""
        asked = self._processors.keys() | self._with_logprobs.keys()
        return bool(asked) and not asked.isdisjoint(request_ids)

    def sample(self, logits: torch.Tensor, inputs: StepInputs) -> SamplerOutput:
        """logits float32 [r, vocab] of `inputs.sample_rows`. Changes `logits`.

        Rows behind drafts are drawn as if the drafts were true. Their processors see the tokens generated before this
        step: the scheduler gives no drafts to requests whose processors look at more than their number.
        """
        sequences = inputs.sample_sequences.tolist()
        raw = self._rows_for_logprobs(logits, inputs, sequences)
        if self._processors:
            for index, sequence in enumerate(sequences):
                self._process(logits[index], inputs.request_ids[sequence], int(inputs.rows[sequence]))
        positions = inputs.positions[inputs.sample_rows] + 1
        token_ids = self._ops.sample(logits, self._tensors(inputs.rows[inputs.sample_sequences], positions))
        drawn: IntArray = token_ids.cpu().numpy()
        logprobs = {index: _token_logprobs(row, int(drawn[index]), top) for index, (row, top) in raw.items()}
        return SamplerOutput(drawn, logprobs)

    def _process(self, logits: torch.Tensor, request_id: str, row: int) -> None:
        for processor in self._processors.get(request_id, ()):
            processor.apply(logits, self._batch.prompt_token_ids(row), self._batch.output_token_ids(row))

    def _rows_for_logprobs(
        self, logits: torch.Tensor, inputs: StepInputs, sequences: list[int]
    ) -> dict[int, tuple[torch.Tensor, int]]:
        """Raw log-probabilities, taken before any processor changes the row."""
        if not self._with_logprobs:
            return {}
        asked = {}
        for index, sequence in enumerate(sequences):
            top = self._with_logprobs.get(inputs.request_ids[sequence])
            if top is not None:
                asked[index] = (torch.log_softmax(logits[index], dim=-1), top)
        return asked

    def _tensors(self, rows: IntArray, positions: IntArray) -> SamplingTensors:
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
        )


def _token_logprobs(row: torch.Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """row: log-probabilities float32 [vocab]."""
    chosen = row[token_id]
    rank = int((row > chosen).sum()) + 1
    values, ids = row.topk(min(num_top, row.numel()))
    top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token_id=token_id, logprob=float(chosen), rank=rank, top=top)


def prompt_logprobs(logits: torch.Tensor, next_token_ids: list[int], num_top: int) -> list[TokenLogprobs]:
    """logits float32 [n, vocab] at n prompt positions, and the token that really follows each."""
    rows = torch.log_softmax(logits, dim=-1)
    return [_token_logprobs(row, token_id, num_top) for row, token_id in zip(rows, next_token_ids, strict=True)]
