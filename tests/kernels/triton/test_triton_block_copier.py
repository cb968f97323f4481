"""Whole blocks of all layers between two memories, by one launch, against plain torch: to the byte, and no more."""

from __future__ import annotations

import pytest
import torch

from llmserve.kernels.block_copier import ReferenceBlockCopier
from llmserve.kernels.ops import FP8_KV, KVCacheSpec
from llmserve.kernels.triton.block_copier import TritonBlockCopier
from llmserve.kernels.triton.kv_cache import TritonKVCache
from llmserve.worker.device import CudaDevice
from tests.kernels.triton.interpreter import KernelFault, reachable
from tests.kernels.triton.triton_cases import DEVICE

NUM_LAYERS = 3


def mapped_memory(like: list[torch.Tensor], num_blocks: int) -> list[torch.Tensor]:
    """On a device the host's, as the runner has it."""
    if DEVICE.type == "cpu":
        return [torch.zeros((num_blocks, *part.shape[1:]), dtype=part.dtype) for part in like]
    sizes = [num_blocks * part[0].nbytes for part in like]
    pieces = torch.split(CudaDevice(DEVICE).mapped(sum(sizes)), sizes)
    return [p.view(part.dtype).view(num_blocks, *part.shape[1:]) for p, part in zip(pieces, like, strict=True)]


def memory(spec: KVCacheSpec, num_blocks: int, device: torch.device) -> list[torch.Tensor]:
    """Parts of all layers, every byte random."""
    caches = [TritonKVCache(spec, num_blocks, device) for _ in range(NUM_LAYERS)]
    parts = [part for cache in caches for part in cache.parts()]
    for part in parts:
        part.view(torch.uint8).random_(0, 256)
    return parts


def copied(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [part.clone() for part in parts]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, FP8_KV])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(3, 80), (1, 16), (8, 64)])
def test_blocks_are_copied_whole(kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    spec = KVCacheSpec(kv_heads, head_dim, 16, dtype)
    source, target = memory(spec, 9, DEVICE), memory(spec, 6, DEVICE)
    before, expected = copied(source), copied(target)
    pairs = torch.tensor([[8, 0], [3, 5], [3, 1]], device=DEVICE)
    ReferenceBlockCopier(source, expected).copy(pairs)
    assert not same(expected, target)
    with reachable(source + target):
        TritonBlockCopier(source, target, DEVICE).copy(pairs)
    assert same(target, expected)
    assert same(source, before)


def test_what_goes_and_comes_back_is_what_it_was() -> None:
    spec = KVCacheSpec(2, 64, 16, FP8_KV)
    device = memory(spec, 9, DEVICE)
    host, before = mapped_memory(device, 4), copied(device)
    with reachable(device + host):
        TritonBlockCopier(device, host, DEVICE).copy(torch.tensor([[7, 2], [0, 3]], device=DEVICE))
        for part in device:
            part.view(torch.uint8)[[0, 7]] = 0
        assert not same(device, before)
        TritonBlockCopier(host, device, DEVICE).copy(torch.tensor([[3, 0], [2, 7]], device=DEVICE))
    assert same(device, before)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a device does not say what it was asked to reach")
def test_a_block_that_is_not_there_and_a_target_named_twice_are_seen() -> None:
    source, target = (memory(KVCacheSpec(1, 16, 16, torch.float32), 4, DEVICE) for _ in range(2))
    with reachable(source + target):
        for pairs in ([[4, 0]], [[0, 1], [2, 1]]):
            with pytest.raises(KernelFault):
                TritonBlockCopier(source, target, DEVICE).copy(torch.tensor(pairs))
