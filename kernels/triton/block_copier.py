"""Copies of whole KV blocks between the GPU's memory and the host's: one launch for all layers. Knows no layout.

The host's memory is mapped in the GPU's address space (registered with CUDA), so a copy is a kernel that reads one and
writes the other, whatever blocks and slots it is given: nothing is gathered first, and nothing is copied per block. Its
cost is the link's: a block of 16 tokens of an 8B model (32 layers, 8 heads of 128, bf16) is 2 MiB, 40 us at the 50 GB/s
that PCIe 5 x16 gives; to compute those 16 tokens in a prompt takes ten times as long. (Reckoned, not measured.)
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from llmserve.kernels.block_copier import as_words

_WORDS = 4096  # a program's share: enough loads in flight to cover the link's latency, programs enough for few blocks


@triton.jit
def copy_blocks_kernel(sources_ptr, targets_ptr, pairs_ptr, SIZE: tl.constexpr, WORDS: tl.constexpr):
    """One program a pair, `WORDS` of the block's `SIZE` words, and a layer. The pointers of the layers stand in memory:
    aligned to 16 bytes."""
    pair, layer = tl.program_id(0), tl.program_id(2)
    source = tl.multiple_of(tl.load(sources_ptr + layer).to(tl.pointer_type(tl.int32)), 16)
    target = tl.multiple_of(tl.load(targets_ptr + layer).to(tl.pointer_type(tl.int32)), 16)
    source += tl.load(pairs_ptr + 2 * pair) * SIZE
    target += tl.load(pairs_ptr + 2 * pair + 1) * SIZE
    at = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    words = tl.load(source + at, mask=at < SIZE, other=0)
    tl.store(target + at, words, mask=at < SIZE)


class TritonBlockCopier:
    """Implements `BlockCopier`: a launch for the parts of one size, which are those of all layers (fp8's scales are a
    second size)."""

    def __init__(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], device: torch.device) -> None:
        """`device` launches; either memory may be the host's, if it is mapped there."""
        self._kept = (sources, targets)  # only addresses are used from here on
        by_size: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for source, target in zip(as_words(sources), as_words(targets), strict=True):
            assert source.shape[1] == target.shape[1]
            assert not (source.data_ptr() | target.data_ptr()) % 16
            by_size[source.shape[1]].append((source.data_ptr(), target.data_ptr()))
        self._pointers = [
            (size, torch.tensor(pointers, dtype=torch.int64).t().contiguous().to(device))
            for size, pointers in by_size.items()
        ]

    def copy(self, pairs: torch.Tensor) -> None:
        for size, (sources, targets) in self._pointers:
            grid = (len(pairs), triton.cdiv(size, _WORDS), len(sources))
            copy_blocks_kernel[grid](sources, targets, pairs, SIZE=size, WORDS=_WORDS, num_warps=8)
