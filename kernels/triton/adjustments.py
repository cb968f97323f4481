"""Adjustments of logits as functions for the kernel that draws: masks, biases, bans, penalties, counts. No launch.

A row whose slot is not used costs nothing. One with adjustments reads and writes its logits once more in the draw's own
pass: beside 4 + 4 bytes a token 1/8 for a bitmask and 2 for penalties. Entries are sorted by token id, so each chunk
finds its own and makes those alone: 4 bytes an entry and chunk, in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmserve.kernels.ops import LogitAdjustments


@triton.jit
def is_penalised(slot, repetition_ptr, frequency_ptr, presence_ptr):
    """Whether the slot has any penalty."""
    return (
        (tl.load(repetition_ptr + slot) != 1.0)
        | (tl.load(frequency_ptr + slot) != 0.0)
        | (tl.load(presence_ptr + slot) != 0.0)
    )


@triton.jit
def adjust(
    value, token_id, slot, position, bitmask_ptr, is_masked_ptr, entry_ids_ptr, entry_values_ptr, entry_until_ptr,
    num_entries_ptr, repetition_ptr, frequency_ptr, presence_ptr, counts_ptr, VOCAB: tl.constexpr,
    MAX_ENTRIES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """value float32 [CHUNK], the logits of `token_id`, an ascending run of CHUNK ids, for the draw at `position`."""
    inside = token_id < VOCAB
    if tl.load(is_masked_ptr + slot) != 0:
        words_ptr = bitmask_ptr + slot * ((VOCAB + 31) // 32)
        word = tl.load(words_ptr + token_id // 32, mask=inside, other=0)
        value = tl.where(((word >> (token_id % 32)) & 1) != 0, value, float("-inf"))
    num_entries = tl.load(num_entries_ptr + slot)
    if num_entries > 0:
        entry = tl.arange(0, MAX_ENTRIES)
        entry_ids = tl.load(entry_ids_ptr + slot * MAX_ENTRIES + entry, mask=entry < num_entries, other=VOCAB + CHUNK)
        chunk_start = tl.min(token_id, axis=0)
        first = tl.sum((entry_ids < chunk_start).to(tl.int32), axis=0)
        last = tl.sum((entry_ids < chunk_start + CHUNK).to(tl.int32), axis=0)
        for index in range(first, last):
            at = slot * MAX_ENTRIES + index
            is_due = position < tl.load(entry_until_ptr + at)
            is_token = token_id == tl.load(entry_ids_ptr + at)
            value = tl.where(is_token & is_due, value + tl.load(entry_values_ptr + at), value)
    if is_penalised(slot, repetition_ptr, frequency_ptr, presence_ptr):
        counts = tl.load(counts_ptr + slot * VOCAB + token_id, mask=inside, other=0).to(tl.int32)
        repetition = tl.load(repetition_ptr + slot)
        repeated = tl.where(value > 0, tl.div_rn(value, repetition), value * repetition)
        value = tl.where(counts != 0, repeated, value)
        num_generated = counts >> 1
        value -= tl.load(frequency_ptr + slot) * num_generated.to(tl.float32)
        value -= tl.load(presence_ptr + slot) * (num_generated > 0).to(tl.float32)
    return value


@triton.jit
def count_token(
    token_id, slot, is_used_ptr, repetition_ptr, frequency_ptr, presence_ptr, counts_ptr, VOCAB: tl.constexpr,
    MAX_COUNT: tl.constexpr,
):  # fmt: skip
    """Adds a drawn token to the slot's counts, if it has penalties."""
    if tl.load(is_used_ptr + slot) != 0:  # noqa: SIM102 - `and` would look at both
        if is_penalised(slot, repetition_ptr, frequency_ptr, presence_ptr):
            at = counts_ptr + slot * VOCAB + token_id
            count = tl.load(at).to(tl.int32)
            tl.store(at, (count + 2 * (count < 2 * MAX_COUNT).to(tl.int32)).to(tl.int16))


def check_tables(adjustments: LogitAdjustments, vocab: int) -> None:
    """What the kernels take for granted of the tables."""
    assert adjustments.token_counts.shape[1] == vocab
    assert adjustments.bitmask.shape[1] == triton.cdiv(vocab, 32)
    for tensor, dtype in ((adjustments.token_counts, torch.int16), (adjustments.bitmask, torch.int32)):
        assert tensor.dtype is dtype
        assert tensor.is_contiguous()
