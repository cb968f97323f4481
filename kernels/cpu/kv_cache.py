"""One layer's KV blocks in the layout of kv_layout.h, and what they may hold. Knows no arithmetic."""

from __future__ import annotations

import ctypes

import torch

from llmserve.kernels.cpu.library import BF16, F32, KVCacheStruct
from llmserve.kernels.memory import cache_zeros
from llmserve.kernels.ops import KVCacheSpec

DTYPES = {torch.float32: F32, torch.bfloat16: BF16}
MAX_HEAD_DIM = 256


class CPUKVCache:
    """One layer's blocks in the layout of kv_layout.h."""

    def __init__(self, spec: KVCacheSpec, num_blocks: int) -> None:
        _check_spec(spec)
        shape = (num_blocks, spec.num_kv_heads, 2, spec.block_size * spec.head_dim)
        self.data = cache_zeros(shape, spec.dtype, torch.device("cpu"))
        self.nbytes = self.data.nbytes
        self._struct = KVCacheStruct(
            self.data.data_ptr(), spec.num_kv_heads, spec.head_dim, spec.block_size, DTYPES[spec.dtype]
        )
        self.spec = spec
        self.pointer = ctypes.addressof(self._struct)

    def parts(self) -> tuple[torch.Tensor, ...]:
        return (self.data,)


def _check_spec(spec: KVCacheSpec) -> None:
    if spec.dtype not in DTYPES:
        raise ValueError(f"The CPU kernels keep keys and values in float32 or bfloat16, not {spec.dtype}.")
    if spec.head_dim % 16 or not 0 < spec.head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"The CPU kernels need a head_dim that is a multiple of 16 up to 256, not {spec.head_dim}.")
    if spec.block_size % 16 or spec.block_size <= 0:
        raise ValueError(f"The CPU kernels need a block_size that is a multiple of 16, not {spec.block_size}.")
