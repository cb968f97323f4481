"""Whether this machine has a driver of a GPU: what can be asked without torch, which is slow to load. Knows no room."""

from __future__ import annotations

import ctypes
from pathlib import Path


def has_gpu_driver() -> bool:
    """NVIDIA's, or AMD's, which torch calls cuda too."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True
