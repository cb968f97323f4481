"""Tries tile sizes of paged attention on this GPU and prints the rows for `kernels/triton/tables.py`.

    python -m benchmarks.tune_kernels [--head-dims 64,128,256]

One row must serve every batch, or results would depend on it: each candidate is timed in a full decode batch, a single
long decode and a prompt, and the least sum of the three, each against the best of its kind, wins. Needs a GPU.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product

import torch
import triton
from triton.runtime.errors import OutOfResources

from benchmarks.gpu import missing
from llmserve.kernels.ops import AttentionMetadata, KVCacheSpec
from llmserve.kernels.triton.kv_cache import TritonKVCache
from llmserve.kernels.triton.ops import create_triton_ops
from llmserve.kernels.triton.split_attention import paged_attention
from llmserve.kernels.triton.tables import AttentionTiles

HEADS, KV_HEADS = 32, 8
SHAPES = ((64, 4096, 1), (1, 131072, 1), (1, 8192, 8192))  # sequences, context, queries of each


def candidates() -> list[AttentionTiles]:
    """What the design allows: at least 16 rows, so that groups of up to 16 heads fit."""
    sizes = product((32, 64, 128), (16, 32, 64, 128), (512, 1024), (4, 8), (2, 3, 4))
    return [AttentionTiles(*size) for size in sizes]


def shape_case(
    num_seqs: int, context: int, queries: int, head_dim: int, cache_dtype: torch.dtype
) -> tuple[torch.Tensor, TritonKVCache, AttentionMetadata]:
    """Scattered blocks, random content."""
    device, blocks = torch.device("cuda"), context // 16
    cache = TritonKVCache(KVCacheSpec(KV_HEADS, head_dim, 16, cache_dtype), num_seqs * blocks, device)
    cache.data.view(torch.uint8).random_(0, 64)
    positions = torch.arange(context - queries, context, device=device).repeat(num_seqs)
    meta = AttentionMetadata(
        query_start_loc=torch.arange(0, num_seqs * queries + 1, queries, dtype=torch.int32, device=device),
        seq_lens=torch.full((num_seqs,), context, dtype=torch.int32, device=device),
        block_table=torch.randperm(num_seqs * blocks, device=device).int().view(num_seqs, blocks),
        slot_mapping=positions,
        positions=positions,
        max_query_len=queries,
        max_seq_len=context,
    )
    q = torch.randn(num_seqs * queries, HEADS, head_dim, device=device, dtype=torch.bfloat16)
    return q, cache, meta


def best_tiles(head_dim: int, cache_dtype: torch.dtype, min_programs: int) -> AttentionTiles:
    """Prints how each candidate did."""
    cases = [shape_case(*shape, head_dim, cache_dtype) for shape in SHAPES]
    times: dict[AttentionTiles, list[float]] = {}
    for tiles in candidates():
        try:
            times[tiles] = [
                float(
                    triton.testing.do_bench(lambda c=case, t=tiles: paged_attention(*c, 0.1, 0, 0.0, t, min_programs))
                )
                for case in cases
            ]
        except OutOfResources:
            continue
        print(tiles, " ".join(f"{ms:.3f} ms" for ms in times[tiles]), flush=True)
    fastest = [min(column) for column in zip(*times.values(), strict=True)]
    return min(times, key=lambda tiles: sum(ms / best for ms, best in zip(times[tiles], fastest, strict=True)))


def main() -> int:
    """0 if rows were printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", default="64,128,256")
    args = parser.parse_args()
    if reason := missing():
        print(reason)
        return 1
    ops = create_triton_ops(torch.device("cuda"))
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for head_dim in map(int, args.head_dims.split(",")):
        for cache_dtype in (torch.bfloat16, torch.float8_e4m3fn):
            tiles = best_tiles(head_dim, cache_dtype, 2 * processors)
            print(f'    ("{ops.architecture}", {head_dim}, {cache_dtype.itemsize}): {tiles},', flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
