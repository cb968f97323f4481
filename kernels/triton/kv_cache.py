"""The KV cache of one layer as the Triton kernels lay it out, and copies of its blocks. Knows no requests.

data [num_blocks, 2, kv_heads, block_size, head_dim]: keys, then values; within a block the tokens of one head lie
together, so that a tile of keys is read in runs of block_size * head_dim elements. In fp8 the scales stand beside
them: float32 [num_blocks, 2, kv_heads, block_size].
"""

import torch
import triton
import triton.language as tl

from llmserve.kernels.ops import FP8_KV, KVCacheSpec

KV_DTYPES = (torch.bfloat16, torch.float16, torch.float32, FP8_KV)
MAX_HEAD_DIM = 256
_COPY_BLOCK = 4096


class TritonKVCache:
    """One layer's blocks. A spec these kernels do not know is a ValueError."""

    def __init__(self, spec: KVCacheSpec, num_blocks: int, device: torch.device) -> None:
        check_spec(spec)
        shape = (num_blocks, 2, spec.num_kv_heads, spec.block_size)
        self.spec = spec
        self.data = torch.zeros((*shape, spec.head_dim), dtype=spec.dtype, device=device)
        self.scales = torch.ones(shape, dtype=torch.float32, device=device) if spec.dtype == FP8_KV else None
        self.nbytes = self.data.nbytes + (self.scales.nbytes if self.scales is not None else 0)


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


@triton.jit
def copy_blocks_kernel(data_ptr, pairs_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One program a pair and `BLOCK` words of the block."""
    pair = tl.program_id(0)
    source = tl.load(pairs_ptr + 2 * pair)
    target = tl.load(pairs_ptr + 2 * pair + 1)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(data_ptr + source * SIZE + at, mask=at < SIZE, other=0)
    tl.store(data_ptr + target * SIZE + at, words, mask=at < SIZE)


def copy_blocks(cache: TritonKVCache, pairs: torch.Tensor) -> None:
    """Copies whole blocks within the cache: pairs int64 [n, 2] of source and target. No block is both, and no target
    stands twice: the pairs run at once."""
    for tensor in (cache.data, cache.scales):
        if tensor is None or not len(pairs):
            continue
        words = tensor.view(torch.int32).flatten(1)  # a head's row is a multiple of 16 elements
        grid = (len(pairs), triton.cdiv(words.shape[1], _COPY_BLOCK))
        copy_blocks_kernel[grid](words, pairs, SIZE=words.shape[1], BLOCK=_COPY_BLOCK, num_warps=8)
