"""What the tests of the Triton kernels share: where they run, and ops whose tiles are small enough to interpret."""

from __future__ import annotations

from dataclasses import replace

import torch
from triton import knobs

from llmserve.kernels.ops import FP8_KV, AttentionMetadata, KVCache, KVCacheSpec
from llmserve.kernels.reference import ReferenceOps
from llmserve.kernels.reference_attention import DenseKVCache
from llmserve.kernels.triton.kv_cache import TritonKVCache
from llmserve.kernels.triton.ops import TritonOps, create_triton_ops
from llmserve.kernels.triton.split_attention import paged_attention
from llmserve.kernels.triton.tables import AttentionTiles
from tests.kernels.triton.interpreter import install

IS_INTERPRETED = bool(knobs.runtime.interpret)
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
REFERENCE = ReferenceOps()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
if IS_INTERPRETED:
    install()
SMALL = AttentionTiles(rows=16, keys=16, partition=64, num_warps=4, num_stages=2)


def triton_ops() -> TritonOps:
    """As they are served; interpreted, with the tiles of an H200."""
    return TritonOps("sm_90", 132) if IS_INTERPRETED else create_triton_ops(DEVICE)


class SmallTileOps(TritonOps):
    """Tiles and partitions so small that short contexts cross them. `split`: in steps of at most so many tokens
    partitions are shared out, among some `programs`; `fp8`: the cache keeps keys and values in 8 bits."""

    def __init__(
        self, *, split: int = 0, programs: int = 10**9, fp8: bool = False, tiles: AttentionTiles = SMALL
    ) -> None:
        super().__init__("none", 1)
        self._split = split
        self._programs = programs
        self._fp8 = fp8
        self._tiles = tiles

    def allocate_kv_cache(self, spec: KVCacheSpec, num_blocks: int, device: torch.device) -> TritonKVCache:
        return TritonKVCache(replace(spec, dtype=FP8_KV) if self._fp8 else spec, num_blocks, device)

    def paged_attention(
        self,
        q: torch.Tensor,
        kv_cache: KVCache,
        meta: AttentionMetadata,
        scale: float,
        sliding_window: int = 0,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert isinstance(kv_cache, TritonKVCache)
        min_programs = self._programs if q.shape[0] <= self._split else 0
        return paged_attention(q, kv_cache, meta, scale, sliding_window, soft_cap, sinks, self._tiles, min_programs)


class Fp8ReferenceOps(ReferenceOps):
    """Plain torch with a cache that keeps keys and values in 8 bits."""

    def allocate_kv_cache(self, spec: KVCacheSpec, num_blocks: int, device: torch.device) -> DenseKVCache:
        return DenseKVCache(replace(spec, dtype=FP8_KV), num_blocks, device)


def tolerance(dtype: torch.dtype) -> float:
    """Largest difference allowed, over the largest value."""
    return {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
