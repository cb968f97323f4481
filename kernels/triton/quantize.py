"""Activations into 8 bits, a scale for each token. x [t, k] -> int8 or fp8 (e4m3) [t, k] and float32 [t].

Bytes: 2 * t * k of bf16 read, t * k written. A token's scale is its own: nothing depends on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """t rows that are `values` times the scale of each."""

    values: torch.Tensor  # int8 or float8_e4m3fn [t, k]
    scales: torch.Tensor  # float32 [t]

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> QuantizedRows:
        """Room for rows of `shape` [t, k]."""
        scales = torch.empty(shape[0], dtype=torch.float32, device=device)
        return cls(torch.empty(shape, dtype=dtype, device=device), scales)


@triton.jit
def quantize_row(x, out_ptr, scale_ptr, row, column, SIZE: tl.constexpr, LARGEST: tl.constexpr):
    """Stores a row, float32 and zero beyond SIZE. With a NaN or an infinity in it its scale is NaN, so that all its
    results are NaN."""
    amount = tl.max(tl.abs(x), axis=0)
    scale = tl.where(amount > 0, amount / LARGEST, 1.0)
    spoilt = tl.sum(x * 0.0, axis=0)  # NaN if anything is not finite
    scaled = x / scale
    if out_ptr.dtype.element_ty == tl.int8:
        scaled = tl.floor(tl.where(scaled == scaled, scaled, 0.0) + 0.5)
    tl.store(out_ptr + row * SIZE + column, scaled.to(out_ptr.dtype.element_ty), mask=column < SIZE)
    tl.store(scale_ptr + row, scale + spoilt)


@triton.jit
def quantize_kernel(x_ptr, out_ptr, scale_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    """Grid: tokens."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * SIZE + column, mask=column < SIZE, other=0.0).to(tl.float32)
    quantize_row(x, out_ptr, scale_ptr, row, column, SIZE, LARGEST)


def largest_of(dtype: torch.dtype) -> float:
    """What a row's largest value becomes."""
    return 127.0 if dtype == torch.int8 else torch.finfo(dtype).max


def quantize(x: torch.Tensor, dtype: torch.dtype) -> QuantizedRows:
    """x [t, k] in int8 or float8_e4m3fn."""
    assert x.is_contiguous()
    num_rows, size = x.shape
    rows = QuantizedRows.empty(x.shape, dtype, x.device)
    if num_rows:
        block = triton.next_power_of_2(size)
        warps = min(max(block // 512, 1), 16)
        quantize_kernel[(num_rows,)](
            x, rows.values, rows.scales, SIZE=size, BLOCK=block, LARGEST=largest_of(dtype), num_warps=warps
        )
    return rows
