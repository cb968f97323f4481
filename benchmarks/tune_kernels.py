"""Tries tile sizes on this GPU and prints the rows for `kernels/triton/tables.py`.

    python -m benchmarks.tune_kernels [--head-dims 64,128,256] [--only attention|products]

One row must serve every batch, or results would depend on it: each candidate is timed in a full decode batch, a single
long decode and a prompt (products: in several matrices), and the least sum, each against the best of its kind, wins.
Needs a GPU. With TRITON_INTERPRET=1 it runs dry: toy shapes, interpreted, a candidate of each kind; what it then prints
was not measured, and says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import product

import torch
from triton import knobs

from benchmarks import tune_products
from benchmarks.gpu import missing
from benchmarks.tuning import Place, best, find_place
from llmserve.kernels.ops import AttentionMetadata, KVCacheSpec
from llmserve.kernels.triton.kv_cache import TritonKVCache
from llmserve.kernels.triton.split_attention import paged_attention
from llmserve.kernels.triton.tables import AttentionTiles, gemm_tiles

HEADS, KV_HEADS = 32, 8
SHAPES = ((64, 4096, 1), (1, 131072, 1), (1, 8192, 8192))  # sequences, context, queries of each


def candidates() -> list[AttentionTiles]:
    """What the design allows: at least 16 rows, so that groups of up to 16 heads fit."""
    sizes = product((32, 64, 128), (16, 32, 64, 128), (512, 1024), (4, 8), (2, 3, 4))
    return [AttentionTiles(*size) for size in sizes]


def shape_case(
    num_seqs: int, context: int, queries: int, head_dim: int, cache_dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, TritonKVCache, AttentionMetadata]:
    """Scattered blocks, random content."""
    blocks = context // 16
    cache = TritonKVCache(KVCacheSpec(KV_HEADS, head_dim, 16, cache_dtype), num_seqs * blocks, device)
    cache.data.view(torch.uint8).random_(0, 64)
    positions = torch.arange(context - queries, context, device=device).repeat(num_seqs)
    meta = AttentionMetadata(
        query_start_loc=torch.arange(0, num_seqs * queries + 1, queries, dtype=torch.int32, device=device),
        seq_lens=torch.full((num_seqs,), context, dtype=torch.int32, device=device),
        block_table=torch.randperm(num_seqs * blocks, device=device).int().view(num_seqs, blocks),
        slot_mapping=positions,
        positions=positions,
        max_seq_len=context,
    )
    q = torch.randn(num_seqs * queries, HEADS, head_dim, device=device, dtype=torch.bfloat16)
    return q, cache, meta


def best_tiles(head_dim: int, cache_dtype: torch.dtype, place: Place) -> AttentionTiles:
    """Of attention, for a head size and a type of the cache."""
    tiles = [AttentionTiles(16, 16, 512, 4, 2)] if place.is_dry else candidates()
    shapes = ((2, 32, 1), (1, 16, 16)) if place.is_dry else SHAPES
    cases = [shape_case(*shape, head_dim, cache_dtype, place.device) for shape in shapes]
    return best(place, tiles, cases, lambda each, case: paged_attention(*case, 0.1, 0, 0.0, each, place.min_programs))


def attention_rows(place: Place, head_dims: list[int]) -> Iterator[str]:
    """As they stand in the table."""
    for head_dim, dtype in product(head_dims, (torch.bfloat16, torch.float8_e4m3fn)):
        yield f'("{place.ops.architecture}", {head_dim}, {dtype.itemsize}): {best_tiles(head_dim, dtype, place)},'


def product_rows(place: Place) -> Iterator[str]:
    """Likewise; with as many sizes as the table has for the architecture."""
    for bits in tune_products.BITS:
        sizes = [tile.rows for tile in gemm_tiles(place.ops.architecture, bits)]
        tiles = ", ".join(str(tune_products.best_row(bits, rows, place)) for rows in sizes)
        yield f'("{place.ops.architecture}", {bits}): ({tiles},),'


def main() -> int:
    """0 if rows were printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", default="64,128,256")
    parser.add_argument("--only", choices=("attention", "products"))
    args = parser.parse_args()
    if not knobs.runtime.interpret and (reason := missing()):
        print(reason)
        return 1
    place = find_place()
    note = "  # NOT MEASURED: interpreted" if place.is_dry else ""
    if args.only != "products":
        for row in attention_rows(place, [int(size) for size in args.head_dims.split(",")]):
            print(f"    {row}{note}", flush=True)
    if args.only != "attention":
        for row in product_rows(place):
            print(f"    {row}{note}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
