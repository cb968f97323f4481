"""What top-k, top-p and min-p leave of a row, as one threshold, without sorting it. Knows no noise and draws nothing.

Three steps. `weigh_kernel` counts and weighs what is at least so likely, for `PIVOTS` likelihoods between the largest
and none at all: that brackets the threshold. `collect_kernel` writes the tokens from the bracket's lower end on one
behind the other, some hundreds of 128k as a rule. In them `search` finds the threshold to the bit, between float32 bit
patterns, which are ordered as the values are. Where there are too many (a flat distribution, a large k) the same search
runs over the row itself: slower, and chosen by the row alone.

The first two are shared among programs by chunks, and read the row's 4 bytes a token from the L2 cache, which the draw
has just filled. Weighing is bound by its 5 * PIVOTS operations a token; collecting skips chunks without a candidate.

Masses are float32 sums in a fixed order. No token's is negative, and rounding is monotone, so that the mass from a
larger value on is never the greater one: the search needs no more.
"""

import triton
import triton.language as tl

PIVOTS = 8
MAX_CANDIDATES = 32768
_SLACK = tl.constexpr(1e-4)  # of a mass: more than two orders of a sum differ


@triton.jit
def order(value):
    """float32 -> int32 in the same order; 0.0 and -0.0 are one."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def is_filtered(row, temperature, top_k_ptr, top_p_ptr, min_p_ptr, VOCAB: tl.constexpr):
    """Whether the row is drawn, and from less than the whole vocabulary."""
    top_k = tl.load(top_k_ptr + row)
    limits = ((top_k > 0) & (top_k < VOCAB)) | (tl.load(top_p_ptr + row) < 1) | (tl.load(min_p_ptr + row) > 0)
    return (temperature > 0) & limits


@triton.jit
def pivot_of(index, largest, temperature, PIVOTS: tl.constexpr):
    """The index-th pivot: close together near the largest logit, and at last -inf."""
    distance = 0.3 * temperature * ((index + 1) * (index + 1)).to(tl.float32)
    return tl.where(index == PIVOTS - 1, float("-inf"), largest - distance)


@triton.jit
def row_bounds(row, temperature, value_ptr, min_p_ptr, NUM_CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr):
    """The largest logit of a filtered row, from those of its chunks, and one that is not above what min_p lets pass."""
    chunk = tl.arange(0, CHUNKS_PADDED)
    best = tl.load(value_ptr + row * NUM_CHUNKS + chunk, mask=chunk < NUM_CHUNKS, other=float("-inf"))
    largest = tl.max(best, axis=0)
    min_p = tl.load(min_p_ptr + row)
    return largest, tl.where(min_p > 0, largest + (tl.log(min_p) - _SLACK) * temperature, float("-inf"))


@triton.jit
def weigh_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, value_ptr, count_ptr, mass_ptr, VOCAB: tl.constexpr,
    CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr, PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Grid: rows, chunks. From the chunks' largest logits, value, counts int32 and masses float32
    [r, NUM_CHUNKS, PIVOTS] of what is at least a pivot, of what min_p lets pass; the likeliest token has mass 1."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    if not is_filtered(row, temperature, top_k_ptr, top_p_ptr, min_p_ptr, VOCAB):
        return
    largest, floor = row_bounds(row, temperature, value_ptr, min_p_ptr, NUM_CHUNKS, CHUNKS_PADDED)
    index = tl.arange(0, PIVOTS)
    pivot = pivot_of(index, largest, temperature, PIVOTS)
    per_nat = 1.4426950408889634 / temperature
    count = tl.zeros([PIVOTS, TILE], tl.int32)  # in this order each thread holds a value against all pivots
    mass = tl.zeros([PIVOTS, TILE], tl.float32)
    for start in tl.range(0, CHUNK, TILE):
        token_id = chunk * CHUNK + start + tl.arange(0, TILE)
        inside = token_id < VOCAB
        logit = tl.load(logits_ptr + row * VOCAB + token_id, mask=inside, other=float("-inf"))
        weight = tl.exp2((logit - largest) * per_nat)
        is_above = (logit[None, :] >= pivot[:, None]) & (inside & (logit >= floor))[None, :]
        count += is_above.to(tl.int32)
        mass += tl.where(is_above, weight[None, :], 0.0)
    at = (row * NUM_CHUNKS + chunk) * PIVOTS + index
    tl.store(count_ptr + at, tl.sum(count, axis=1))
    tl.store(mass_ptr + at, tl.sum(mass, axis=1))


@triton.jit
def bracket(
    row, temperature, top_k, top_p, largest, floor, count_ptr, mass_ptr, chunk, VOCAB: tl.constexpr,
    NUM_CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """(logit from which on candidates are taken, how many there are, how many of them stand before `chunk`, mass of
    what min_p lets pass)."""
    chunks = tl.arange(0, CHUNKS_PADDED)
    index = tl.arange(0, PIVOTS)
    at = (row * NUM_CHUNKS + chunks[:, None]) * PIVOTS + index[None, :]
    in_row = (chunks < NUM_CHUNKS)[:, None]
    counts = tl.load(count_ptr + at, mask=in_row, other=0)
    masses = tl.sum(tl.load(mass_ptr + at, mask=in_row, other=0.0), axis=0)
    mass = tl.max(masses, axis=0)
    if (top_k > 0) & (top_k < VOCAB):  # top_p counts what top_k leaves: all of that is needed
        is_enough = tl.sum(counts, axis=0) >= top_k
    else:
        is_enough = (masses >= mass * (top_p + _SLACK)) & (top_p < 1)
    chosen = tl.min(tl.where(is_enough, index, PIVOTS - 1), axis=0)
    chunk_counts = tl.sum(tl.where(index[None, :] == chosen, counts, 0), axis=1)
    total = tl.sum(chunk_counts, axis=0)
    before = tl.sum(tl.where(chunks < chunk, chunk_counts, 0), axis=0)
    return tl.maximum(pivot_of(chosen, largest, temperature, PIVOTS), floor), total, before, mass


@triton.jit
def collect_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, value_ptr, count_ptr, mass_ptr, list_ptr, ids_ptr,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr,
    PIVOTS: tl.constexpr, MAX_CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Grid: rows, chunks. The candidates' logits float32 and ids int32, [r, MAX_CANDIDATES], if there is room."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    if not is_filtered(row, temperature, top_k_ptr, top_p_ptr, min_p_ptr, VOCAB):
        return
    largest, floor = row_bounds(row, temperature, value_ptr, min_p_ptr, NUM_CHUNKS, CHUNKS_PADDED)
    lowest, total, before, _mass = bracket(
        row, temperature, tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), largest, floor, count_ptr, mass_ptr,
        chunk, VOCAB, NUM_CHUNKS, CHUNKS_PADDED, PIVOTS,
    )  # fmt: skip
    if (total > MAX_CANDIDATES) | (tl.load(value_ptr + row * NUM_CHUNKS + chunk) < lowest):
        return
    token_id = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token_id < VOCAB
    logit = tl.load(logits_ptr + row * VOCAB + token_id, mask=inside, other=float("-inf"))
    is_candidate = inside & (logit >= lowest)
    first = row * MAX_CANDIDATES + before - 1
    place = tl.cumsum(is_candidate.to(tl.int32), axis=0)
    tl.store(list_ptr + first + place, logit, mask=is_candidate)
    tl.store(ids_ptr + first + place, token_id, mask=is_candidate)


@triton.jit
def amounts_from(
    ptr, size, temperature, keys, largest, WEIGH: tl.constexpr, TILE: tl.constexpr, WAYS: tl.constexpr
):  # fmt: skip
    """How many of `size` logits, divided by the temperature, are at least each of `keys` int64 [WAYS], or, if WEIGH,
    their mass: float32."""
    total = tl.zeros([WAYS, TILE], tl.float32)
    for start in range(0, size, TILE):
        at = start + tl.arange(0, TILE)
        inside = at < size
        value = tl.div_rn(tl.load(ptr + at, mask=inside, other=float("-inf")), temperature)
        amount = tl.full([TILE], 1.0, tl.float32)  # exact: a vocabulary has less than 2^24 tokens
        if WEIGH:
            amount = tl.exp(value - largest)
        is_above = (order(value)[None, :] >= keys.to(tl.int32)[:, None]) & inside[None, :]
        total += tl.where(is_above, amount[None, :], 0.0)
    return tl.sum(total, axis=1)


@triton.jit
def search(
    ptr, size, temperature, low, high, target, largest, WEIGH: tl.constexpr, TILE: tl.constexpr, WAYS: tl.constexpr
):
    """The largest key from which on there is an amount of at least `target`; from `low` there is, from `high` not. Each
    turn looks at WAYS keys between them."""
    while high - low > 1:
        keys = low + (high - low) * (tl.arange(0, WAYS) + 1) // (WAYS + 1)
        is_enough = amounts_from(ptr, size, temperature, keys, largest, WEIGH, TILE, WAYS) >= target
        low = tl.maximum(low, tl.max(tl.where(is_enough, keys, low), axis=0))
        high = tl.min(tl.where(is_enough, high, keys), axis=0)
    return low
