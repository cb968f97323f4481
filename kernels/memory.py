"""Memory for caches that are large and filled bit by bit."""

from __future__ import annotations

import math
import mmap

import torch


def cache_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros. On a CPU aligned to a page, and costing memory only as they are written (`torch.zeros`: at once)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = math.prod(shape)
    buffer = mmap.mmap(-1, max(count * dtype.itemsize, 1), access=mmap.ACCESS_COPY)
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)
