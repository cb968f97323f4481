"""A Triton kernel as it is compiled for docs/kernels.md, and the ceilings that it must keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NVIDIA = ("sm_80", "sm_90", "sm_100")
ARCHITECTURES = (*NVIDIA, "gfx942")


@dataclass(frozen=True)
class KernelCase:
    """A kernel with one set of types and constants. `types` are those of its other arguments, in Triton's notation."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    max_registers: int = 128
    max_shared_bytes: int = 0
    wide_loads: bool = True  # 16 bytes a thread at a time
    matrix: bool = False  # uses tensor cores
    architectures: tuple[str, ...] = ARCHITECTURES
    divisible: tuple[str, ...] = field(default=())  # integers that are multiples of 16

    @property
    def takes_wgmma(self) -> bool:
        """Whether a tile has the 64 lines that wgmma asks for on its left side."""
        return max(self.constants.get("ROWS", 0), self.constants.get("COLUMNS", 0)) >= 64
