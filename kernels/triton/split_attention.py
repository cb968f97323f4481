"""Paged attention as the model calls it: whether partitions are shared out among programs, and their merge if so.

With many programs each walks through all partitions of its sequence; with few (some decodes of long contexts) as many
share them as fill the device, and a second kernel merges them: 4 * (d + 2) bytes written and read a partition, head and
query, against 4 * d * partition length of keys and values for the group of heads. No more share them than that: a graph
is launched for the longest context there may be, and a program a partition would be thousands with nothing to do.
Which of the two is decided from shapes alone, so a captured graph stays valid; and the result is the same bits, because
partitions have a fixed length and are merged in the same order by the same arithmetic (see `attention`).
"""

import torch
import triton
import triton.language as tl

from llmserve.kernels.ops import FP8_KV, AttentionMetadata
from llmserve.kernels.triton.attention import LOG2_E, add_sink, attention_kernel, merge_partition, nothing_yet
from llmserve.kernels.triton.kv_cache import TritonKVCache
from llmserve.kernels.triton.tables import AttentionTiles

_PARTS_AT_ONCE = 8  # loaded together: their latency is paid once
_MAX_SCRATCH_BYTES = 256 * 2**20  # beyond it programs keep their partitions to themselves


@triton.jit(do_not_specialize=["num_partitions"])
def merge_kernel(
    parts_ptr, stats_ptr, sinks_ptr, out_ptr, positions_ptr, num_partitions, NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr, PARTITION: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, heads. Merges, from left to right, the partitions a token sees."""
    row = tl.program_id(0).to(tl.int64) * NUM_HEADS + tl.program_id(1)
    position = tl.load(positions_ptr + tl.program_id(0)).to(tl.int32)
    first_part = 0
    if WINDOW:
        first_part = tl.maximum(position - WINDOW + 1, 0) // PARTITION
    end_part = position // PARTITION + 1
    dim = tl.arange(0, DIM)
    total, total_sum, total_max = nothing_yet(1, DIM)
    for start in range(first_part, end_part, AT_ONCE):
        for offset in tl.static_range(AT_ONCE):
            part = start + offset + tl.arange(0, 1)
            at = row * num_partitions + part
            is_seen = part < end_part
            in_part = is_seen[:, None] & (dim < HEAD_DIM)[None, :]
            part_out = tl.load(parts_ptr + at[:, None] * HEAD_DIM + dim[None, :], mask=in_part, other=0.0)
            part_sum = tl.load(stats_ptr + at * 2, mask=is_seen, other=0.0)
            part_max = tl.load(stats_ptr + at * 2 + 1, mask=is_seen, other=float("-inf"))
            total, total_sum, total_max = merge_partition(total, total_sum, total_max, part_out, part_sum, part_max)
    if HAS_SINKS:
        total_sum = add_sink(total_sum, total_max, tl.load(sinks_ptr + tl.program_id(1)))
    out = (total / total_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * HEAD_DIM + dim[None, :], out, mask=(dim < HEAD_DIM)[None, :])


def paged_attention(
    q: torch.Tensor,
    cache: TritonKVCache,
    meta: AttentionMetadata,
    scale: float,
    sliding_window: int,
    soft_cap: float,
    sinks: torch.Tensor | None,
    tiles: AttentionTiles,
    min_programs: int,
) -> torch.Tensor:
    """As `Ops.paged_attention`: q [t, h, d] -> [t, h * d]. Partitions are shared out if there would be fewer than
    `min_programs` programs otherwise."""
    assert q.is_contiguous()
    num_tokens, num_heads, head_dim = q.shape
    num_seqs, num_kv_heads = meta.seq_lens.shape[0], cache.spec.num_kv_heads
    assert num_heads % num_kv_heads == 0
    assert num_heads // num_kv_heads <= tiles.rows
    out = torch.empty_like(q)
    if not num_tokens:
        return out.flatten(1)
    tokens_a_tile = tiles.rows // (num_heads // num_kv_heads)
    num_tiles = num_tokens // tokens_a_tile + num_seqs
    num_partitions = triton.cdiv(meta.max_seq_len, tiles.partition)
    scratch = num_tokens * num_heads * num_partitions * (head_dim + 2) * 4
    split = num_partitions > 1 and num_tiles * num_kv_heads < min_programs and scratch <= _MAX_SCRATCH_BYTES
    parts = stats = out
    if split:
        shape = (num_tokens, num_heads, num_partitions)
        parts = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((*shape, 2), dtype=torch.float32, device=q.device)
    dim = triton.next_power_of_2(head_dim)
    head_sinks = out if sinks is None else sinks
    sharing = min(num_partitions, triton.cdiv(min_programs, num_tiles * num_kv_heads)) if split else 1
    attention_kernel[(num_tiles, num_kv_heads, sharing)](
        q, cache.data, cache.data if cache.scales is None else cache.scales, head_sinks, out, parts, stats,
        meta.query_start_loc, meta.seq_lens, meta.block_table, num_seqs, meta.block_table.stride(0), num_partitions,
        2.0 * LOG2_E * scale / soft_cap if soft_cap else LOG2_E * scale, LOG2_E * soft_cap, NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, DIM=dim, BLOCK_SIZE=cache.spec.block_size,
        WINDOW=sliding_window, SOFT_CAP=soft_cap > 0, HAS_SINKS=sinks is not None, FP8_KV=cache.spec.dtype == FP8_KV,
        SPLIT=split, ROWS=tiles.rows, KEYS=tiles.keys, PARTITION=tiles.partition, STAGES=tiles.num_stages,
        num_warps=tiles.num_warps,
    )  # fmt: skip
    if split:
        merge_kernel[(num_tokens, num_heads)](
            parts, stats, head_sinks, out, meta.positions, num_partitions, NUM_HEADS=num_heads, HEAD_DIM=head_dim,
            DIM=dim, WINDOW=sliding_window, HAS_SINKS=sinks is not None, PARTITION=tiles.partition,
            AT_ONCE=_PARTS_AT_ONCE, num_warps=1,
        )  # fmt: skip
    return out.flatten(1)
