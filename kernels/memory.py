"""Memory on a CPU for what is large and read from end to end: in huge pages, where the system gives them.

A core that streams gigabytes through pages of 4 KiB waits for address translations, and its prefetcher stops at every
page: with both cores reading, pages of 2 MiB are some 15 % faster.
"""

from __future__ import annotations

import math
import mmap

import torch

_HUGE_PAGE = 2 << 20
_MAPPING_BYTES = 64 << 20
_ALIGNMENT = 64


def cache_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros. On a CPU aligned to a page, and costing memory only as they are written (`torch.zeros`: at once)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = math.prod(shape)
    return torch.frombuffer(_map(max(count * dtype.itemsize, 1)), dtype=dtype, count=count).view(shape)


class WeightMemory:
    """Cuts weights from large mappings, one behind the other: most matrices alone would not fill a huge page. A mapping
    goes back to the system when its last tensor is gone."""

    def __init__(self) -> None:
        self._mapping: mmap.mmap | None = None
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the CPU, its start aligned to a cache line."""
        count = math.prod(shape)
        num_bytes = count * dtype.itemsize
        if not count:
            return torch.empty(shape, dtype=dtype)
        if self._mapping is None or self._used + num_bytes > len(self._mapping):
            self._mapping, self._used = _map(max(num_bytes + -num_bytes % _HUGE_PAGE, _MAPPING_BYTES)), 0
        tensor = torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=self._used)
        self._used += num_bytes + -num_bytes % _ALIGNMENT
        return tensor.view(shape)


def _map(num_bytes: int) -> mmap.mmap:
    mapping = mmap.mmap(-1, num_bytes, access=mmap.ACCESS_COPY)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
