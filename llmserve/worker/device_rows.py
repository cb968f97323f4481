"""What a GPU keeps of every request, and how the host tells it of a step: one staging buffer, one copy. Runs no model.

A row holds what does not change from step to step: sampling parameters, the block table; and the last token drawn,
which the host need not have seen. A decode's share of a step's staging is six integers, and two for each new block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from llmserve.kernels.ops import SamplingTensors
from llmserve.kernels.step_ops import (
    HEADER,
    LAST_TOKEN,
    MIN_P,
    SEED_LOW,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    StagedStep,
)
from llmserve.scheduler.output import SchedulerOutput
from llmserve.worker.device import Device
from llmserve.worker.input_batch import InputBatch, StepInputs

_ALIGNMENT = 4  # cells: 16 bytes
Int32Array = npt.NDArray[np.int32]


class StepShape(NamedTuple):
    """The sizes of a step's tensors; those of a graph are padded."""

    num_tokens: int
    num_seqs: int
    num_draws: int

    def holds(self, other: StepShape) -> bool:
        """Whether a step of the other shape fits, padded."""
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))


class SamplingMode(NamedTuple):
    """What the draws of a step need. Modes are few, so that each can have a graph."""

    all_greedy: bool
    filtered: bool
    adjusted: bool = False


@dataclass(frozen=True, slots=True)
class Staged:
    """A step in the staging buffer of the device."""

    shape: StepShape
    num_cells: int  # of rows that change
    num_elements: int  # to be copied


class DeviceRows:
    """Rows of the running requests and one for padding; and the buffers by which they are told of a step."""

    def __init__(self, device: Device, batch: InputBatch, max_tokens: int, max_draws: int, null_block: int) -> None:
        """No step has more than `max_tokens` or `max_draws`. Padding reads and writes `null_block`, which no request
        may have."""
        self._device = device
        self._batch = batch
        max_num_seqs, max_blocks = batch.block_table.shape
        self._null_row = max_num_seqs
        self._width = HEADER + max_blocks + -max_blocks % _ALIGNMENT
        self.rows = torch.zeros((max_num_seqs + 1, self._width), dtype=torch.int32, device=device.torch_device)
        self.rows[self._null_row, HEADER:] = null_block
        capacity = _end(StepShape(max_tokens, max_num_seqs, max_draws)) + 2 * max_num_seqs * self._width
        self._staged = torch.zeros(capacity, dtype=torch.int32, device=device.torch_device)
        # Two: one may still be on its way to the device while the next step is written to the other.
        self._buffers = [device.pinned(capacity, torch.int32) for _ in range(2)]
        self._turn = 0

    def stage(self, output: SchedulerOutput, inputs: StepInputs, shape: StepShape) -> Staged:
        """Copies a step to the device. The batch has been brought up to `output`; the step before last has ended."""
        self._turn = 1 - self._turn
        buffer = self._buffers[self._turn]
        host: Int32Array = buffer.numpy()
        self._write(host, inputs, shape)
        cells, values = self._changes(output)
        first = _end(shape)
        host[first : first + len(cells)] = cells
        host[first + len(cells) : first + 2 * len(cells)] = values
        staged = Staged(shape, len(cells), first + 2 * len(cells))
        self._device.copy(self._staged[: staged.num_elements], buffer[: staged.num_elements])
        return staged

    def clear_staged(self) -> None:
        """Any step read from the buffer is all padding then, of row 0."""
        self._staged.zero_()

    def step(self, shape: StepShape) -> StagedStep:
        """The tensors of a staged step: the same memory for every step of the shape."""
        return StagedStep(*(self._staged[first:end] for first, end in _parts(shape)))

    def changes(self, staged: Staged) -> tuple[torch.Tensor, torch.Tensor]:
        """Cells of `rows` and their new values."""
        first = _end(staged.shape)
        cells, values = torch.split(self._staged[first : staged.num_elements], staged.num_cells)
        return cells, values

    def sampling(self, draw_rows: torch.Tensor, positions: torch.Tensor, mode: SamplingMode) -> SamplingTensors:
        """Of the rows that draw, int32 [r], and the positions of the tokens to be drawn, int64 [r]."""
        header = self.rows[:, :HEADER].index_select(0, draw_rows)  # [r, HEADER]
        num_draws = len(draw_rows)
        padded = num_draws + -num_draws % _ALIGNMENT
        columns = torch.empty((HEADER, padded), dtype=torch.int32, device=header.device)[:, :num_draws]
        columns.copy_(header.t())
        return SamplingTensors(
            temperature=columns[TEMPERATURE].view(torch.float32),
            top_k=columns[TOP_K].long(),
            top_p=columns[TOP_P].view(torch.float32),
            min_p=columns[MIN_P].view(torch.float32),
            seeds=header.view(torch.int64)[:, SEED_LOW // 2].contiguous(),
            positions=positions,
            all_greedy=mode.all_greedy,
            any_top_k=mode.filtered,
            any_top_p=mode.filtered,
            any_min_p=mode.filtered,
        )

    def keep_last_tokens(self, draw_rows: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Each row's last token, for the next step: draw_rows int32 [r], token_ids int64 [r]."""
        self.rows[:, LAST_TOKEN].index_copy_(0, draw_rows.long(), token_ids.int())

    def mode(self, inputs: StepInputs) -> SamplingMode:
        """What the step's draws need, by the host's rows."""
        batch, rows = self._batch, inputs.rows
        filtered = batch.top_k[rows].any() or (batch.top_p[rows] < 1).any() or batch.min_p[rows].any()
        all_greedy = not batch.temperature[rows].any()
        return SamplingMode(all_greedy, bool(filtered) and not all_greedy)

    def _write(self, host: Int32Array, inputs: StepInputs, shape: StepShape) -> None:
        num_tokens, num_seqs = len(inputs.token_ids), len(inputs.rows)
        rows, num_computed, query_start, draw_tokens, draw_rows, token_ids = (
            host[first:end] for first, end in _parts(shape)
        )
        rows[:num_seqs] = inputs.rows
        rows[num_seqs:] = self._null_row
        num_computed[:num_seqs] = inputs.seq_lens - np.diff(inputs.query_start)
        num_computed[num_seqs:] = 0
        query_start[: num_seqs + 1] = inputs.query_start
        query_start[num_seqs + 1 :] = num_tokens
        num_draws = len(inputs.sample_rows)
        draw_tokens[:num_draws] = inputs.sample_rows
        draw_tokens[num_draws:] = 0
        draw_rows[:num_draws] = inputs.rows[inputs.sample_sequences]
        draw_rows[num_draws:] = self._null_row
        token_ids[:num_tokens] = inputs.token_ids
        token_ids[num_tokens:] = 0

    def _changes(self, output: SchedulerOutput) -> tuple[Int32Array, Int32Array]:
        """Flat indices into `rows`, all different, and values."""
        batch = self._batch
        entered = dict.fromkeys([new.request_id for new in output.new_requests] + list(output.resumed_requests))
        cells: list[Int32Array] = []
        values: list[Int32Array] = []
        for request_id in entered:
            row = batch.row_of[request_id]
            table = batch.block_table[row, : batch.num_blocks[row]]
            values += [self._header(row), table]
            cells.append(np.arange(HEADER + len(table), dtype=np.int32) + np.int32(row * self._width))
        for request_id, block_ids in output.new_block_ids.items():
            if request_id in entered:
                continue  # its table has them
            row = batch.row_of[request_id]
            first = row * self._width + HEADER + int(batch.num_blocks[row]) - len(block_ids)
            cells.append(np.arange(first, first + len(block_ids), dtype=np.int32))
            values.append(np.asarray(block_ids, dtype=np.int32))
        if not cells:
            return _NONE, _NONE
        return np.concatenate(cells), np.concatenate(values)

    def _header(self, row: int) -> Int32Array:
        batch = self._batch
        header = np.zeros(HEADER, dtype=np.int32)
        floats = header.view(np.float32)
        floats[TEMPERATURE], floats[TOP_P], floats[MIN_P] = batch.temperature[row], batch.top_p[row], batch.min_p[row]
        header[TOP_K] = min(int(batch.top_k[row]), np.iinfo(np.int32).max)
        header.view(np.int64)[SEED_LOW // 2] = batch.seeds[row]
        return header


_NONE: Int32Array = np.empty(0, dtype=np.int32)


def _parts(shape: StepShape) -> list[tuple[int, int]]:
    """Where the parts of a `StagedStep` stand, in its order. Aligned: a kernel is compiled for an alignment."""
    num_tokens, num_seqs, num_draws = shape
    parts, first = [], 0
    for size in (num_seqs, num_seqs, num_seqs + 1, num_draws, num_draws, num_tokens):
        parts.append((first, first + size))
        first += size + -size % _ALIGNMENT
    return parts


def _end(shape: StepShape) -> int:
    first, end = _parts(shape)[-1]
    return end + (first - end) % _ALIGNMENT
