"""RMSNorm, alone or with the addition to the residual stream before it. One program a row; knows no model.

x [t, n] of the model's type, residual float32 [t, n], weight float32 [n]. A row is read once and held in registers:
bytes 2n + 2n without, and 2n + 4n + 4n + 2n with the residual, beside 4n of weights that stay in the cache; about 4n
operations. So memory alone sets the pace. A row's sum has one order, whatever rows come with it.
"""

import torch
import triton
import triton.language as tl

_MAX_WARPS = 16
_ELEMENTS_A_WARP = 512  # 16 for each thread: two loads of 16 bytes


@triton.jit
def normed_row(
    x_ptr, residual_ptr, weight_ptr, row, column, eps, SIZE: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):  # fmt: skip
    """float32, zero beyond SIZE: x * rsqrt(mean(x^2) + eps) * weight; with a residual, that of residual + x, which it
    stores too."""
    inside = column < SIZE
    at = row * SIZE + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0)
        tl.store(residual_ptr + at, x, mask=inside)
    inverse_rms = tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps)
    return x * inverse_rms * weight


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):
    """Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    y = normed_row(x_ptr, residual_ptr, weight_ptr, row, column, eps, SIZE, HAS_RESIDUAL)
    tl.store(out_ptr + row * SIZE + column, y.to(out_ptr.dtype.element_ty), mask=column < SIZE)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [t, n], weight float32 [n] -> [t, n] of x's type."""
    return _launch(x, None, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """residual float32 [t, n] += x [t, n], in place; returns rms_norm(residual) of x's type."""
    assert residual.is_contiguous()
    assert residual.dtype is torch.float32
    return _launch(x, residual, weight, eps)


def _launch(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    assert x.is_contiguous()
    assert weight.dtype is torch.float32
    rows, size = x.shape
    out = torch.empty_like(x)
    if rows:
        block = triton.next_power_of_2(size)
        rms_norm_kernel[(rows,)](
            x,
            x if residual is None else residual,
            weight,
            out,
            eps,
            SIZE=size,
            BLOCK=block,
            HAS_RESIDUAL=residual is not None,
            num_warps=num_warps(block),
        )
    return out


def num_warps(block: int) -> int:
    """Warps of a program that holds a row of `block` elements."""
    return min(max(block // _ELEMENTS_A_WARP, 1), _MAX_WARPS)
