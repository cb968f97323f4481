"""The KV cache of one layer as the Triton kernels lay it out. Knows no requests.

data [num_blocks, 2, kv_heads, block_size, head_dim]: keys, then values; within a block the tokens of one head lie
together, so that a tile of keys is read in runs of block_size * head_dim elements. In fp8 the scales stand beside
them: float32 [num_blocks, 2, kv_heads, block_size].
"""

import torch

from llmserve.kernels.ops import FP8_KV, KVCacheSpec

KV_DTYPES = (torch.bfloat16, torch.float16, torch.float32, FP8_KV)
MAX_HEAD_DIM = 256


class TritonKVCache:
    """One layer's blocks. A spec these kernels do not know is a ValueError."""

    def __init__(self, spec: KVCacheSpec, num_blocks: int, device: torch.device) -> None:
        check_spec(spec)
        shape = (num_blocks, 2, spec.num_kv_heads, spec.block_size)
        self.spec = spec
        self.data = torch.zeros((*shape, spec.head_dim), dtype=spec.dtype, device=device)
        self.scales = torch.ones(shape, dtype=torch.float32, device=device) if spec.dtype == FP8_KV else None
        self.nbytes = sum(part.nbytes for part in self.parts())

    def parts(self) -> tuple[torch.Tensor, ...]:
        return (self.data,) if self.scales is None else (self.data, self.scales)


def check_spec(spec: KVCacheSpec) -> None:
    """Raises ValueError for what the kernels do not compute."""
    if spec.dtype not in KV_DTYPES:
        raise ValueError(f"The Triton kernels keep keys and values in {KV_DTYPES}, not {spec.dtype}.")
    if spec.head_dim % 16 or not 0 < spec.head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"The Triton kernels need a head_dim that is a multiple of 16 up to 256, not {spec.head_dim}.")
    if spec.block_size % 16 or spec.block_size <= 0:
        raise ValueError(f"The Triton kernels need a block_size that is a multiple of 16, not {spec.block_size}.")


def bytes_per_block(spec: KVCacheSpec) -> int:
    """Of one layer, keys, values and scales together."""
    element = spec.head_dim * spec.dtype.itemsize + (4 if spec.dtype == FP8_KV else 0)
    return 2 * spec.num_kv_heads * spec.block_size * element
