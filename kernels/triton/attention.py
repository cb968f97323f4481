"""Causal attention over the paged cache, one kernel for prompts' chunks and decodes alike. Knows no requests.

A program computes a tile of `ROWS` rows: the queries of some neighbouring tokens of one sequence, times the heads that
share a key/value head, so that the tensor cores work on full tiles and keys are read once for the whole group. Bytes of
a decode: the sequence's keys and values, 4 * d * kv_heads a token of context in 16 bits; operations 4 * d * heads a
token of context and query. Decodes are bound by memory, prompts by arithmetic.

A row's result depends on nothing but its own query and its sequence's keys:

* every batch goes through tiles of the same size with the same instructions, however few rows of them are in use; on
  Hopper 64 rows, which its wgmma asks for: a decode leaves most of them empty and is bound by memory all the same;
* keys are summed in tiles that stand at fixed positions of the sequence, and tiles into partitions of a fixed length,
  each from zero; partitions are merged from left to right, here (`SPLIT` 0) or, if several programs shared them, by
  `split_attention` in the same arithmetic. So neither the number of splits nor the cut of a prompt shows;
* what a row does not see (later keys, other rows' window) is added as exact zeros.

The ids of a tile's blocks are loaded one iteration ahead: with the load in the same iteration Triton's pipeliner
spreads its stages over the chain id -> keys, and fewer buffers are left for the keys.
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
_PER_NAT = tl.constexpr(LOG2_E)


@triton.jit
def find_sequence(query_start_ptr, tile, num_seqs, TOKENS: tl.constexpr):
    """The sequence a tile of `TOKENS` query tokens belongs to. Sequence i begins at tile query_start[i] // TOKENS + i:
    the host need not count tiles, it launches one more for each sequence than there can be in all."""
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_ptr + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def nothing_yet(ROWS: tl.constexpr, DIM: tl.constexpr):
    """Output, sum and maximum of no keys at all."""
    out = tl.zeros([ROWS, DIM], tl.float32)
    return out, tl.zeros([ROWS], tl.float32), tl.full([ROWS], float("-inf"), tl.float32)


@triton.jit
def merge_partition(total, total_sum, total_max, part, part_sum, part_max):
    """Adds a partition to what was merged so far, along the first axis of `total`: exact if the partition is empty."""
    largest = tl.maximum(total_max, part_max)
    safe = tl.where(largest == float("-inf"), 0.0, largest)
    keep = tl.exp2(total_max - safe)
    take = tl.exp2(part_max - safe)
    # fma is spelt out: the compiler may not choose another rounding in another kernel
    total = tl.fma(total, tl.broadcast_to(keep[:, None], total.shape), part * take[:, None])
    return total, tl.fma(total_sum, keep, part_sum * take), largest


@triton.jit
def add_sink(total_sum, total_max, sink):
    """The sum with the weight of one key more, whose score is `sink` and whose value is zero. The weight may overflow:
    then the output is the zero it ought to be."""
    return total_sum + tl.exp2(sink * _PER_NAT - total_max)


@triton.jit
def attend_partition(
    q, position, first_key, end_key, table_ptr, cache_ptr, scales_ptr, kv_head, scale_log2, soft_cap,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, FP8_KV: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """q [ROWS, DIM] at `position` [ROWS] over keys first_key (a multiple of KEYS) to end_key: unnormalised output,
    sum and maximum."""
    lane = tl.arange(0, KEYS)
    dim = tl.arange(0, DIM)
    out, total, largest = nothing_yet(ROWS, DIM)
    key = first_key + lane
    block = tl.load(table_ptr + key // BLOCK_SIZE, mask=key < end_key, other=0)
    for start in tl.range(first_key, end_key, KEYS, num_stages=STAGES):
        key = start + lane
        inside = key < end_key
        row = (block.to(tl.int64) * (2 * NUM_KV_HEADS) + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE
        following = key + KEYS
        block = tl.load(table_ptr + following // BLOCK_SIZE, mask=following < end_key, other=0)
        k_ptr = cache_ptr + row[None, :] * HEAD_DIM + dim[:, None]
        v_ptr = cache_ptr + (row + NUM_KV_HEADS * BLOCK_SIZE)[:, None] * HEAD_DIM + dim[None, :]
        if HEAD_DIM == DIM:
            k = tl.load(k_ptr, mask=inside[None, :], other=0.0)
            v = tl.load(v_ptr, mask=inside[:, None], other=0.0)
        else:
            k = tl.load(k_ptr, mask=inside[None, :] & (dim < HEAD_DIM)[:, None], other=0.0)
            v = tl.load(v_ptr, mask=inside[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
        score = tl.dot(q, k.to(q.dtype), input_precision="ieee")
        if FP8_KV:
            score *= tl.load(scales_ptr + row, mask=inside, other=0.0)[None, :]
        score *= scale_log2
        if SOFT_CAP:  # scale_log2 has made it score / cap * 2 log2(e): tanh(x) = 1 - 2 / (e^2x + 1)
            score = soft_cap * (1.0 - 2.0 / (tl.exp2(score) + 1.0))
        visible = key[None, :] <= position[:, None]
        if WINDOW:
            visible = visible & (key[None, :] > position[:, None] - WINDOW)
        score = tl.where(visible, score, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(score, axis=1))
        safe = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        keep = tl.exp2(largest - safe)
        weight = tl.exp2(score - safe[:, None])
        total = total * keep + tl.sum(weight, axis=1)
        largest = new_largest
        if FP8_KV:
            weight *= tl.load(scales_ptr + row + NUM_KV_HEADS * BLOCK_SIZE, mask=inside, other=0.0)[None, :]
        out = tl.dot(weight.to(q.dtype), v.to(q.dtype), out * keep[:, None], input_precision="ieee")
    return out, total, largest


@triton.jit(do_not_specialize=["num_seqs", "table_stride", "num_partitions"])
def attention_kernel(
    q_ptr, cache_ptr, scales_ptr, sinks_ptr, out_ptr, parts_ptr, stats_ptr, query_start_ptr, seq_lens_ptr, table_ptr,
    num_seqs, table_stride, num_partitions, scale_log2, soft_cap, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, FP8_KV: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PARTITION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of query tokens (the last first: they have most keys), kv heads, and, if SPLIT, programs that deal
    out the partitions, left for split_attention: parts float32 [t, h, num_partitions, d], and stats float32
    [t, h, num_partitions, 2], sum and maximum. DIM is HEAD_DIM rounded up to a power of two; WINDOW 0 is none."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    TOKENS: tl.constexpr = ROWS // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = find_sequence(query_start_ptr, tile, num_seqs, TOKENS)
    query_start = tl.load(query_start_ptr + seq)
    query_len = tl.load(query_start_ptr + seq + 1) - query_start
    first_token = (tile - query_start // TOKENS - seq) * TOKENS
    if first_token >= query_len:
        return
    row = tl.arange(0, ROWS)
    token = first_token + row // GROUP
    used = (row < TOKENS * GROUP) & (token < query_len)
    first_position = tl.load(seq_lens_ptr + seq) - query_len
    position = tl.where(used, first_position + token, -1)
    end_key = first_position + tl.minimum(first_token + TOKENS, query_len)
    begin_key = tl.maximum(first_position + first_token - WINDOW + 1, 0) // KEYS * KEYS if WINDOW else 0
    dim = tl.arange(0, DIM)
    head = kv_head * GROUP + row % GROUP
    q_row = (query_start + token).to(tl.int64) * NUM_HEADS + head
    in_q = used[:, None] & (dim < HEAD_DIM)[None, :]
    at = q_row[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(q_ptr + at, mask=in_q, other=0.0)
    total, total_sum, total_max = nothing_yet(ROWS, DIM)
    first_part = begin_key // PARTITION
    end_part = tl.cdiv(end_key, PARTITION)
    step = 1
    if SPLIT:
        first_part += tl.program_id(2)
        step = tl.num_programs(2)
    for part in range(first_part, end_part, step):
        part_out, part_sum, part_max = attend_partition(
            q, position, tl.maximum(begin_key, part * PARTITION), tl.minimum(end_key, part * PARTITION + PARTITION),
            table_ptr + seq.to(tl.int64) * table_stride, cache_ptr, scales_ptr, kv_head, scale_log2, soft_cap,
            NUM_KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, WINDOW, SOFT_CAP, FP8_KV, ROWS, KEYS, STAGES,
        )  # fmt: skip
        if SPLIT:
            at_part = q_row * num_partitions
            row_stats_ptr = stats_ptr + part * 2
            tl.store(parts_ptr + part * HEAD_DIM + at_part[:, None] * HEAD_DIM + dim[None, :], part_out, mask=in_q)
            tl.store(row_stats_ptr + at_part * 2, part_sum, mask=used)
            tl.store(row_stats_ptr + at_part * 2 + 1, part_max, mask=used)
        else:
            total, total_sum, total_max = merge_partition(total, total_sum, total_max, part_out, part_sum, part_max)
    if not SPLIT:
        if HAS_SINKS:
            total_sum = add_sink(total_sum, total_max, tl.load(sinks_ptr + head))
        tl.store(out_ptr + at, (total / total_sum[:, None]).to(out_ptr.dtype.element_ty), mask=in_q)
