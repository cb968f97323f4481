"""The ops that make a step's inputs on the device, from rows kept there and what the host staged; and their meaning.

Rows int32 [n + 1, width], one a request and a last one for padding: a header, then the block table. Floats stand in it
as their bits. What the host stages for a step of s sequences, t tokens and r draws is int32 too, see `StagedStep`.
Imports nothing of ours but the interface of the ops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

LAST_TOKEN, TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED_LOW, SEED_HIGH = 0, 1, 2, 3, 4, 6, 7  # columns of the header
HEADER = 8  # columns before the block table


@dataclass(frozen=True, slots=True)
class StagedStep:
    """One step as the host knows it. Sequences beyond the last have no tokens; tokens and draws beyond the last are
    padding."""

    rows: torch.Tensor  # int32 [s]
    num_computed: torch.Tensor  # int32 [s]: context before this step's tokens
    query_start: torch.Tensor  # int32 [s + 1]
    draw_tokens: torch.Tensor  # int32 [r]: which of the t tokens draw
    draw_rows: torch.Tensor  # int32 [r]: the row each draws for
    token_ids: torch.Tensor  # int32 [t]; negative: the last token of its row, which only the device knows


@dataclass(frozen=True, slots=True)
class StepTensors:
    """The same as the model wants it."""

    token_ids: torch.Tensor  # int64 [t]
    positions: torch.Tensor  # int64 [t]
    slot_mapping: torch.Tensor  # int64 [t]: of padding, the first slot of the padding row's block
    seq_lens: torch.Tensor  # int32 [s]
    block_table: torch.Tensor  # int32 [s, width - HEADER], rows not adjacent
    draw_positions: torch.Tensor  # int64 [r]: of the tokens to be drawn


class StepOps(Protocol):
    """Nothing waits for the device, and shapes depend on those of the arguments alone."""

    def write_rows(self, rows: torch.Tensor, cells: torch.Tensor, values: torch.Tensor) -> None:
        """rows[...] flat, at cells int32 [n] (all different) = values int32 [n]."""
        ...

    def expand(self, rows: torch.Tensor, staged: StagedStep, block_size: int) -> StepTensors:
        """Who computes what where."""
        ...


class ReferenceStepOps:
    """Implements `StepOps` in plain torch. Has no state."""

    def write_rows(self, rows: torch.Tensor, cells: torch.Tensor, values: torch.Tensor) -> None:
        rows.view(-1).index_copy_(0, cells.long(), values)

    def expand(self, rows: torch.Tensor, staged: StagedStep, block_size: int) -> StepTensors:
        num_tokens, num_seqs = staged.token_ids.shape[0], staged.rows.shape[0]
        gathered = rows.index_select(0, staged.rows)  # [s, width]
        block_table = gathered[:, HEADER:]
        start = staged.query_start
        token = torch.arange(num_tokens, dtype=torch.int32, device=rows.device)
        seq = torch.searchsorted(start[1:], token, right=True).clamp_(max=num_seqs - 1)
        is_padding = token >= start[-1]
        positions = (staged.num_computed[seq] + token - start[seq]).masked_fill_(is_padding, 0)
        block = block_table[seq, (positions // block_size).long()].where(~is_padding, rows[-1, HEADER])
        last_tokens = gathered[:, LAST_TOKEN][seq]
        return StepTensors(
            token_ids=torch.where(staged.token_ids < 0, last_tokens, staged.token_ids).long(),
            positions=positions.long(),
            slot_mapping=block.long() * block_size + positions % block_size,
            seq_lens=staged.num_computed + start[1:] - start[:-1],
            block_table=block_table,
            draw_positions=positions[staged.draw_tokens.long()].long() + 1,
        )
