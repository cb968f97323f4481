"""Draws a token from each row of logits: greedy, or the largest of logit / temperature + noise among what may be drawn.

logits float32 [r, vocab] -> ids int64 [r], in two launches, or four if a row has a filter; no step depends on a value
the host would have to know. `draw_kernel` makes the adjustments and finds each chunk's winner: 4 bytes and about 45
operations a token (greedy rows 2), 4 to 10 bytes more where there are adjustments. `pick_kernel` takes the winner of
the winners. With top-k, top-p or min-p, `thresholds` reads the row twice more, from the L2 cache.

64 rows of 128256 tokens on an H200 (4.3 TB/s; predicted, not measured): 33 MB, 8 us; with penalties on every row 83 MB,
20 us; weighing 420 million operations of a lane, 15 us; collecting 5 us; the search 8 turns of 0.7 us for each filter;
1.5 us a launch. So 11 us greedy, 20 us drawn, 45 us with top-k and top-p, 57 us with penalties as well.

A row's draw depends on its logits, seed and position alone: chunks are fixed, and the largest of a row is the same in
any order, the smallest id among equals.
"""

import torch
import triton
import triton.language as tl

from llmserve.kernels.ops import MAX_COUNT, MAX_ENTRIES, LogitAdjustments, SamplingTensors
from llmserve.kernels.triton.adjustments import adjust, check_tables, count_token
from llmserve.kernels.triton.noise import gumbel, noise_keys
from llmserve.kernels.triton.thresholds import (
    MAX_CANDIDATES,
    PIVOTS,
    amounts_from,
    bracket,
    collect_kernel,
    is_filtered,
    order,
    row_bounds,
    search,
    weigh_kernel,
)

CHUNK = 4096
SEARCH_TILE, SEARCH_WAYS, SEARCH_WARPS = 2048, 8, 16
WEIGH_TILE, WEIGH_WARPS = 512, 4


@triton.jit
def draw_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, positions_ptr, value_ptr, id_ptr,
    slots_ptr, is_used_ptr, bitmask_ptr, is_masked_ptr, entry_ids_ptr, entry_values_ptr, entry_until_ptr,
    num_entries_ptr, repetition_ptr, frequency_ptr, presence_ptr, counts_ptr, VOCAB: tl.constexpr,
    CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, ALL_GREEDY: tl.constexpr, FILTERS: tl.constexpr,
    ADJUSTS: tl.constexpr, MAX_ENTRIES: tl.constexpr,
):  # fmt: skip
    """Grid: rows, chunks. The winner of a chunk: value float32 and id int32, [r, NUM_CHUNKS]. Of a filtered row it is
    the largest logit."""
    row = tl.program_id(0).to(tl.int64)
    token_id = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = token_id < VOCAB
    value = tl.load(logits_ptr + row * VOCAB + token_id, mask=inside, other=float("-inf"))
    if ADJUSTS:
        slot = tl.load(slots_ptr + row)
        if tl.load(is_used_ptr + slot) != 0:
            value = adjust(
                value, token_id, slot, tl.load(positions_ptr + row), bitmask_ptr, is_masked_ptr, entry_ids_ptr,
                entry_values_ptr, entry_until_ptr, num_entries_ptr, repetition_ptr, frequency_ptr, presence_ptr,
                counts_ptr, VOCAB, MAX_ENTRIES, CHUNK,
            )  # fmt: skip
            tl.store(logits_ptr + row * VOCAB + token_id, value, mask=inside)
    if not ALL_GREEDY:
        temperature = tl.load(temperature_ptr + row)
        if temperature > 0:
            is_whole = True
            if FILTERS:
                is_whole = not is_filtered(row, temperature, top_k_ptr, top_p_ptr, min_p_ptr, VOCAB)
            if is_whole:
                value = tl.div_rn(value, temperature)
                key0, key1 = noise_keys(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
                value += gumbel(token_id, key0, key1)
    best, index = tl.max(value, axis=0, return_indices=True)
    at = row * NUM_CHUNKS + tl.program_id(1)
    tl.store(value_ptr + at, best)
    tl.store(id_ptr + at, tl.program_id(1) * CHUNK + index)


@triton.jit
def draw_from(ptr, ids_ptr, size, temperature, low, key0, key1, LISTED: tl.constexpr, TILE: tl.constexpr):
    """The winner of `size` logits, those left out of which `order` is below `low` when divided: its id."""
    best_value = tl.full([TILE], float("-inf"), tl.float32)
    best_id = tl.zeros([TILE], tl.int32)
    for start in range(0, size, TILE):
        at = start + tl.arange(0, TILE)
        inside = at < size
        value = tl.div_rn(tl.load(ptr + at, mask=inside, other=float("-inf")), temperature)
        token_id = at
        if LISTED:
            token_id = tl.load(ids_ptr + at, mask=inside, other=0)
        noisy = tl.where(inside & (order(value) >= low), value + gumbel(token_id, key0, key1), float("-inf"))
        is_better = noisy > best_value  # ids ascend: the smallest stays among equals
        best_value = tl.where(is_better, noisy, best_value)
        best_id = tl.where(is_better, token_id, best_id)
    value = tl.max(best_value, axis=0)
    return tl.min(tl.where(best_value == value, best_id, 2147483647), axis=0)


@triton.jit
def filtered_draw(
    ptr, ids_ptr, size, temperature, top_k, top_p, low, largest, mass, key0, key1, LISTED: tl.constexpr,
    VOCAB: tl.constexpr, TILE: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """The row's token, from `size` candidates if LISTED, else from the row itself. From `low` on min_p lets pass."""
    high = order(largest).to(tl.int64) + 1
    if (top_k > 0) & (top_k < VOCAB):
        low = search(ptr, size, temperature, low, high, top_k.to(tl.float32), largest, False, TILE, WAYS)
        if top_p < 1:
            keys = tl.full([WAYS], 0, tl.int64) + low
            mass = tl.max(amounts_from(ptr, size, temperature, keys, largest, True, TILE, WAYS), axis=0)
    if top_p < 1:
        low = search(ptr, size, temperature, low, high, mass * top_p, largest, True, TILE, WAYS)
    return draw_from(ptr, ids_ptr, size, temperature, low, key0, key1, LISTED, TILE)


@triton.jit
def pick_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, positions_ptr, value_ptr, id_ptr,
    count_ptr, mass_ptr, list_ptr, ids_ptr, slots_ptr, is_used_ptr, repetition_ptr, frequency_ptr, presence_ptr,
    counts_ptr, out_ptr, VOCAB: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr,
    FILTERS: tl.constexpr, ADJUSTS: tl.constexpr, PIVOTS: tl.constexpr, MAX_CANDIDATES: tl.constexpr,
    TILE: tl.constexpr, WAYS: tl.constexpr, MAX_COUNT: tl.constexpr,
):  # fmt: skip
    """Grid: rows. The winner of the winners; the first chunk's among equals, which has the smallest ids. Or what is
    drawn from what the filters leave."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS_PADDED)
    value = tl.load(value_ptr + row * NUM_CHUNKS + chunk, mask=chunk < NUM_CHUNKS, other=float("-inf"))
    _best, winner = tl.max(value, axis=0, return_indices=True)
    token_id = tl.load(id_ptr + row * NUM_CHUNKS + winner)
    if FILTERS:
        temperature = tl.load(temperature_ptr + row)
        if is_filtered(row, temperature, top_k_ptr, top_p_ptr, min_p_ptr, VOCAB):
            top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
            largest, floor = row_bounds(row, temperature, value_ptr, min_p_ptr, NUM_CHUNKS, CHUNKS_PADDED)
            lowest, num_candidates, _before, mass = bracket(
                row, temperature, top_k, top_p, largest, floor, count_ptr, mass_ptr, 0, VOCAB, NUM_CHUNKS,
                CHUNKS_PADDED, PIVOTS,
            )  # fmt: skip
            largest = tl.div_rn(largest, temperature)
            low = order(tl.div_rn(lowest, temperature)).to(tl.int64)
            if min_p > 0:
                low = tl.maximum(low, order(largest + tl.log(min_p)).to(tl.int64))
            key0, key1 = noise_keys(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
            if num_candidates <= MAX_CANDIDATES:
                token_id = filtered_draw(
                    list_ptr + row * MAX_CANDIDATES, ids_ptr + row * MAX_CANDIDATES, num_candidates, temperature, top_k,
                    top_p, low, largest, mass, key0, key1, True, VOCAB, TILE, WAYS,
                )  # fmt: skip
            else:
                token_id = filtered_draw(
                    logits_ptr + row * VOCAB, ids_ptr, VOCAB, temperature, top_k, top_p, low, largest, mass, key0, key1,
                    False, VOCAB, TILE, WAYS,
                )  # fmt: skip
    tl.store(out_ptr + row, token_id.to(tl.int64))
    if ADJUSTS:
        slot = tl.load(slots_ptr + row)
        count_token(
            token_id, slot, is_used_ptr, repetition_ptr, frequency_ptr, presence_ptr, counts_ptr, VOCAB, MAX_COUNT
        )


def sample(logits: torch.Tensor, sampling: SamplingTensors, max_candidates: int = MAX_CANDIDATES) -> torch.Tensor:
    """As `Ops.sample`: logits float32 [r, vocab] -> token ids int64 [r]. Rows with more than `max_candidates` left are
    searched whole."""
    assert logits.is_contiguous()
    assert logits.dtype is torch.float32
    (rows, vocab), device = logits.shape, logits.device
    out = torch.empty(rows, dtype=torch.int64, device=device)
    if not rows:
        return out
    num_chunks = triton.cdiv(vocab, CHUNK)
    padded = triton.next_power_of_2(num_chunks)
    values = torch.empty((rows, num_chunks), dtype=torch.float32, device=device)
    ids = torch.empty((rows, num_chunks), dtype=torch.int32, device=device)
    filters = not sampling.all_greedy and (sampling.any_top_k or sampling.any_top_p or sampling.any_min_p)
    limits = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    adjusting, counting = _tables(sampling.adjustments, vocab, out)
    adjusts = sampling.adjustments is not None
    draw_kernel[(rows, num_chunks)](
        logits, *limits, sampling.seeds, sampling.positions, values, ids, *adjusting, VOCAB=vocab, CHUNK=CHUNK,
        NUM_CHUNKS=num_chunks, ALL_GREEDY=sampling.all_greedy, FILTERS=filters, ADJUSTS=adjusts,
        MAX_ENTRIES=MAX_ENTRIES, num_warps=8,
    )  # fmt: skip
    counts = masses = candidates = candidate_ids = values
    if filters:
        counts = torch.empty((rows, num_chunks, PIVOTS), dtype=torch.int32, device=device)
        masses = torch.empty((rows, num_chunks, PIVOTS), dtype=torch.float32, device=device)
        candidates = torch.empty((rows, max_candidates), dtype=torch.float32, device=device)
        candidate_ids = torch.empty((rows, max_candidates), dtype=torch.int32, device=device)
        weigh_kernel[(rows, num_chunks)](
            logits, *limits, values, counts, masses, VOCAB=vocab, CHUNK=CHUNK, NUM_CHUNKS=num_chunks,
            CHUNKS_PADDED=padded, PIVOTS=PIVOTS, TILE=WEIGH_TILE, num_warps=WEIGH_WARPS,
        )  # fmt: skip
        collect_kernel[(rows, num_chunks)](
            logits, *limits, values, counts, masses, candidates, candidate_ids, VOCAB=vocab, CHUNK=CHUNK,
            NUM_CHUNKS=num_chunks, CHUNKS_PADDED=padded, PIVOTS=PIVOTS, MAX_CANDIDATES=max_candidates, num_warps=8,
        )  # fmt: skip
    pick_kernel[(rows,)](
        logits, *limits, sampling.seeds, sampling.positions, values, ids, counts, masses, candidates, candidate_ids,
        *counting, out, VOCAB=vocab, NUM_CHUNKS=num_chunks, CHUNKS_PADDED=padded, FILTERS=filters, ADJUSTS=adjusts,
        PIVOTS=PIVOTS, MAX_CANDIDATES=max_candidates, TILE=SEARCH_TILE, WAYS=SEARCH_WAYS, MAX_COUNT=MAX_COUNT,
        num_warps=SEARCH_WARPS if filters else 1,
    )  # fmt: skip
    return out


def _tables(
    given: LogitAdjustments | None, vocab: int, unused: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """What `draw_kernel` and `pick_kernel` are given of the adjustments."""
    if given is None:
        return (unused,) * 12, (unused,) * 6
    check_tables(given, vocab)
    penalties = (given.repetition, given.frequency, given.presence, given.token_counts)
    entries = (given.entry_ids, given.entry_values, given.entry_until, given.num_entries)
    slots = (given.slots, given.is_used)
    return (*slots, given.bitmask, given.is_masked, *entries, *penalties), (*slots, *penalties)
