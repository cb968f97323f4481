"""What is done to logits before a draw, in plain torch: masks, biases, bans, penalties. Knows slots, no requests.

Order and formulas are those of vLLM's sampler: allowed ids, minimum length and banned ids, logit bias, then penalties.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmserve.kernels.ops import MAX_COUNT, LogitAdjustments, SamplingTensors

Draw = Callable[[torch.Tensor, SamplingTensors], torch.Tensor]


def draw_adjusted(logits: torch.Tensor, sampling: SamplingTensors, draw: Draw) -> torch.Tensor:
    """`Ops.sample` by `draw`, which knows no adjustments: token ids int64 [r]."""
    if sampling.adjustments is None:
        return draw(logits, sampling)
    adjust_logits(logits, sampling.positions, sampling.adjustments)
    token_ids = draw(logits, sampling)
    count_tokens(token_ids, sampling.adjustments)
    return token_ids


def adjust_logits(logits: torch.Tensor, positions: torch.Tensor, adjustments: LogitAdjustments) -> None:
    """logits float32 [r, vocab], in place; positions int64 [r] of the tokens to be drawn. Rows that ask for nothing
    are not touched."""
    for row, slot in enumerate(adjustments.slots.tolist()):
        if adjustments.is_used[slot]:
            _apply_bitmask(logits[row], slot, adjustments)
            _apply_entries(logits[row], slot, int(positions[row]), adjustments)
            _apply_penalties(logits[row], slot, adjustments)


def count_tokens(token_ids: torch.Tensor, adjustments: LogitAdjustments) -> None:
    """Adds the drawn tokens, int64 [r], to `token_counts` of the slots that have penalties."""
    for token_id, slot in zip(token_ids.tolist(), adjustments.slots.tolist(), strict=True):
        if adjustments.is_used[slot] and _is_penalised(slot, adjustments):
            counts = adjustments.token_counts[slot]
            counts[token_id] += 2 * (counts[token_id] < 2 * MAX_COUNT)


def _apply_bitmask(logits: torch.Tensor, slot: int, adjustments: LogitAdjustments) -> None:
    if adjustments.is_masked[slot]:
        bits = torch.arange(32, dtype=torch.int32, device=logits.device)
        allowed = (adjustments.bitmask[slot, :, None] >> bits) & 1
        logits.masked_fill_(allowed.flatten()[: len(logits)] == 0, -torch.inf)


def _apply_entries(logits: torch.Tensor, slot: int, position: int, adjustments: LogitAdjustments) -> None:
    count = int(adjustments.num_entries[slot])
    if count:
        is_due = adjustments.entry_until[slot, :count] > position
        ids = adjustments.entry_ids[slot, :count][is_due].long()
        logits.index_add_(0, ids, adjustments.entry_values[slot, :count][is_due])


def _apply_penalties(logits: torch.Tensor, slot: int, adjustments: LogitAdjustments) -> None:
    if not _is_penalised(slot, adjustments):
        return
    tokens = adjustments.token_counts[slot].nonzero().flatten()  # of prompt and output: few of the vocabulary
    values, counts = logits[tokens], adjustments.token_counts[slot, tokens] >> 1
    repetition = adjustments.repetition[slot]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= adjustments.frequency[slot] * counts
    values -= adjustments.presence[slot] * (counts > 0)
    logits[tokens] = values


def _is_penalised(slot: int, adjustments: LogitAdjustments) -> bool:
    return bool(adjustments.repetition[slot] != 1 or adjustments.frequency[slot] or adjustments.presence[slot])
