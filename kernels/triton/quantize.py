"""Activations into 8 bits, a scale for each token. x [t, k] -> int8 or fp8 (e4m3) [t, k] and float32 [t].

Bytes: 2 * t * k of bf16 read, t * k written. A token's scale is its own: nothing depends on the batch.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def quantize_kernel(x_ptr, out_ptr, scale_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    """Grid: tokens. A token with a NaN or an infinity gets a scale of NaN, so that all its results are NaN."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    x = tl.load(x_ptr + row * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    amount = tl.max(tl.abs(x), axis=0)
    scale = tl.where(amount > 0, amount / LARGEST, 1.0)
    spoilt = tl.sum(x * 0.0, axis=0)  # NaN if anything is not finite
    scaled = x / scale
    if out_ptr.dtype.element_ty == tl.int8:
        scaled = tl.floor(tl.where(scaled == scaled, scaled, 0.0) + 0.5)
    tl.store(out_ptr + row * SIZE + column, scaled.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale + spoilt)


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [t, k] -> x' [t, k] of int8 or float8_e4m3fn, and its scales float32 [t]."""
    assert x.is_contiguous()
    num_rows, size = x.shape
    out = torch.empty((num_rows, size), dtype=dtype, device=x.device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if num_rows:
        block = triton.next_power_of_2(size)
        largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
        warps = min(max(block // 512, 1), 16)
        quantize_kernel[(num_rows,)](x, out, scale, SIZE=size, BLOCK=block, LARGEST=largest, num_warps=warps)
    return out, scale
