"""Adjustments of logits for tests of every implementation: made at random, and what they mean, word by word."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from llmserve.kernels.ops import MAX_COUNT, MAX_ENTRIES, LogitAdjustments, SamplingTensors

NEVER = float("-inf")


def empty_adjustments(slots: list[int], num_slots: int, vocab: int) -> LogitAdjustments:
    """Tables in which no slot is used."""
    return LogitAdjustments(
        slots=torch.tensor(slots),
        is_used=torch.zeros(num_slots, dtype=torch.int32),
        bitmask=torch.zeros(num_slots, -(-vocab // 32), dtype=torch.int32),
        is_masked=torch.zeros(num_slots, dtype=torch.int32),
        entry_ids=torch.full((num_slots, MAX_ENTRIES), 10**6, dtype=torch.int32),  # garbage beyond the last
        entry_values=torch.full((num_slots, MAX_ENTRIES), torch.nan),
        entry_until=torch.full((num_slots, MAX_ENTRIES), 2**62),
        num_entries=torch.zeros(num_slots, dtype=torch.int32),
        repetition=torch.ones(num_slots),
        frequency=torch.zeros(num_slots),
        presence=torch.zeros(num_slots),
        token_counts=torch.zeros(num_slots, vocab, dtype=torch.int16),
    )


def random_adjustments(vocab: int) -> LogitAdjustments:
    """Eight slots for eight rows: each kind alone, all of them, none, and a slot whose tables are not to be looked at.
    Slots are not in the rows' order."""
    generator = torch.Generator().manual_seed(vocab)
    made = empty_adjustments([5, 0, 3, 1, 2, 7, 4, 6], 8, vocab)
    made.is_used[:] = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0])
    masked, biased, penalised = [0, 4, 7], [1, 4, 5, 7], [2, 3, 4, 7]
    made.is_masked[masked] = 1
    made.bitmask[masked] = torch.randint(-(2**31), 2**31, made.bitmask[masked].shape, generator=generator).int()
    for slot in biased:
        ids = torch.randperm(vocab, generator=generator)[: min(40 * slot, vocab)].sort().values
        ids[0], ids[-1] = 0, vocab - 1
        count = len(ids)
        made.num_entries[slot] = count
        made.entry_ids[slot, :count] = ids.int()
        made.entry_values[slot, :count] = torch.randn(count, generator=generator) * 3
        made.entry_values[slot, :count:5] = NEVER
        made.entry_until[slot, :count:3] = 9  # some rows draw at later positions
    made.repetition[penalised] = torch.tensor([1.3, 1.0, 0.7, 2.0])
    made.frequency[penalised] = torch.tensor([0.0, 0.5, -0.25, 1.0])
    made.presence[penalised] = torch.tensor([0.0, 0.25, 1.0, 1.0])
    counts = torch.randint(0, 9, made.token_counts.shape, generator=generator)
    made.token_counts[:] = torch.where(torch.rand(counts.shape, generator=generator) < 0.3, counts, 0).short()
    made.token_counts[2, :5] = 2 * MAX_COUNT  # full
    return made


def adjusted_value(logit: float, row: int, token_id: int, position: int, made: LogitAdjustments) -> float:
    """One logit after its slot's adjustments, from their definition."""
    slot = int(made.slots[row])
    if not made.is_used[slot]:
        return logit
    value = torch.tensor(logit)
    if made.is_masked[slot] and not int(made.bitmask[slot, token_id // 32]) >> token_id % 32 & 1:
        value = torch.tensor(NEVER)
    for index in range(int(made.num_entries[slot])):
        if made.entry_ids[slot, index] == token_id and position < made.entry_until[slot, index]:
            value = value + made.entry_values[slot, index]
    count, in_prompt = divmod(int(made.token_counts[slot, token_id]), 2)
    if in_prompt or count:
        value = value / made.repetition[slot] if value > 0 else value * made.repetition[slot]
    return float(value - made.frequency[slot] * count - made.presence[slot] * (count > 0))


def move(tensors: Any, device: torch.device) -> Any:
    """Tensors of a dataclass, copies of them on a device."""
    values = {f.name: getattr(tensors, f.name) for f in fields(tensors)}
    moved = {name: v.to(device, copy=True) for name, v in values.items() if isinstance(v, torch.Tensor)}
    return replace(tensors, **moved)


def with_adjustments(sampling: SamplingTensors, made: LogitAdjustments, device: torch.device) -> SamplingTensors:
    """On a device, with copies of its own: drawing changes the counts."""
    moved: SamplingTensors = replace(move(sampling, device), adjustments=move(made, device))
    return moved
