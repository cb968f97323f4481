"""What top-k, top-p and min-p leave of a row, as one threshold, without sorting it. Knows no noise and draws nothing.

One program a row. Two passes over it find the largest value, the mass, and the candidates: values within `SPAN` of the
largest, a few hundred of 128k as a rule, written to scratch. The threshold is then searched by halving between float32
bit patterns (which are ordered as the values are): 24 to 32 counts over the candidates, that lie in the cache. Where
they do not suffice (a flat distribution, a large k) the same search runs over the row itself: slower, and the same
result, because masses are summed in integers, exactly: exp(value - largest) in units of 2^-40.
"""

import triton
import triton.language as tl

SPAN = 12.0  # exp(-12) = 6e-6 of the likeliest token's probability
MAX_CANDIDATES = 8192


@triton.jit
def order(value):
    """float32 -> int32 in the same order; 0.0 and -0.0 are one."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The float32 that `order` took to `key`."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def amount_from(ptr, size, temperature, key, largest, WEIGH: tl.constexpr, BLOCK: tl.constexpr):
    """How many values are at least `key`, or, if WEIGH, their mass: int64."""
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.div_rn(tl.load(ptr + at, mask=at < size, other=float("-inf")), temperature)
        one = (at < size).to(tl.int64)
        if WEIGH:
            one = (tl.exp(value - largest) * 1099511627776.0).to(tl.int64)  # 2^40
        total += tl.where(order(value) >= key, one, 0)
    return tl.sum(total, axis=0)


@triton.jit
def search(ptr, size, temperature, low, high, target, largest, WEIGH: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key from which on there is an amount of at least `target`; from `low` there is, from `high` not."""
    while high - low > 1:
        middle = (low + high) // 2
        if amount_from(ptr, size, temperature, middle, largest, WEIGH, BLOCK) >= target:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def threshold_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, scratch_ptr, threshold_ptr, VOCAB: tl.constexpr,
    BLOCK: tl.constexpr, SEARCH_BLOCK: tl.constexpr, SPAN: tl.constexpr, MAX_CANDIDATES: tl.constexpr,
):  # fmt: skip
    """threshold float32 [r]: the least logit / temperature that may be drawn; -inf: all. scratch float32
    [r, MAX_CANDIDATES]."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    tl.store(threshold_ptr + row, float("-inf"))
    limits_k = (top_k > 0) & (top_k < VOCAB)
    if (temperature <= 0) | ((top_p >= 1) & (min_p <= 0) & (limits_k == 0)):
        return
    row_ptr = logits_ptr + row * VOCAB
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        at = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(row_ptr + at, mask=at < VOCAB, other=float("-inf")))
    largest = tl.div_rn(tl.max(best, axis=0), temperature)

    candidates_ptr = scratch_ptr + row * MAX_CANDIDATES
    pivot = largest - SPAN
    count = 0
    for start in range(0, VOCAB, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.div_rn(tl.load(row_ptr + at, mask=at < VOCAB, other=float("-inf")), temperature)
        is_candidate = ((value >= pivot) & (at < VOCAB)).to(tl.int32)
        place = count + tl.cumsum(is_candidate, axis=0) - 1
        tl.store(candidates_ptr + place, value, mask=(is_candidate != 0) & (place < MAX_CANDIDATES))
        count += tl.sum(is_candidate, axis=0)
    tl.debug_barrier()  # the search reads what other threads wrote

    # beyond the candidates lies less mass than this, whatever it is
    unseen = (VOCAB - count).to(tl.float32) * tl.exp(-SPAN)
    fits = count <= MAX_CANDIDATES
    key = order(tl.full([1], float("-inf"), tl.float32)).to(tl.int64)
    low = tl.sum(key, axis=0)
    high = order(largest).to(tl.int64) + 1
    if min_p > 0:
        low = tl.maximum(low, order(largest + tl.log(min_p)).to(tl.int64))
    if limits_k:
        enough = fits & (count >= top_k)
        ptr = tl.where(enough, candidates_ptr, row_ptr)
        size = tl.where(enough, count, VOCAB)
        found = search(ptr, size, tl.where(enough, 1.0, temperature), low, high, top_k, largest, False, SEARCH_BLOCK)
        low = tl.maximum(low, found)
    if top_p < 1:
        mass = amount_from(row_ptr, VOCAB, temperature, low, largest, True, SEARCH_BLOCK).to(tl.float64)
        target = tl.ceil(mass * top_p.to(tl.float64)).to(tl.int64)
        # the candidates hold at least `target`, if what is left over cannot matter
        enough = fits & (mass * (1.0 - top_p.to(tl.float64)) > unseen.to(tl.float64) * 1099511627776.0)
        ptr = tl.where(enough, candidates_ptr, row_ptr)
        size = tl.where(enough, count, VOCAB)
        low = search(ptr, size, tl.where(enough, 1.0, temperature), low, high, target, largest, True, SEARCH_BLOCK)
    tl.store(threshold_ptr + row, value_of(low))
