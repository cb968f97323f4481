"""LayerNorm, alone or with the residual stream before it. One program a row; knows no model.

x [t, n] of the model's type, residual float32 [t, n], weight and bias float32 [n]. As RMSNorm (`norm`), with one more
sum over the row, which lies in registers: bytes 2n + 2n, or 2n + 4n + 4n + 2n with a residual.
"""

import torch
import triton
import triton.language as tl

from llmserve.kernels.triton.norm import num_warps


@triton.jit
def layer_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, POST: tl.constexpr,
):  # fmt: skip
    """out = norm(x); with a residual norm(residual + x), and what is stored as residual is the sum or, if POST, out."""
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    at = tl.program_id(0).to(tl.int64) * SIZE + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0)
        if not POST:
            tl.store(residual_ptr + at, x, mask=inside)
    centred = tl.where(inside, x - tl.sum(x, axis=0) / SIZE, 0.0)
    out = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / SIZE + eps)
    out = out * tl.load(weight_ptr + column, mask=inside, other=0.0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + column, mask=inside, other=0.0)
    if POST:
        tl.store(residual_ptr + at, out, mask=inside)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    post: bool = False,
) -> torch.Tensor:
    """x [t, n] -> its norm, or that of residual float32 [t, n] + x. `residual` becomes the sum; if `post`, the norm."""
    assert x.is_contiguous()
    assert weight.dtype is torch.float32
    rows, size = x.shape
    out = torch.empty_like(x)
    if residual is not None:
        assert residual.is_contiguous()
        assert residual.dtype is torch.float32
    if rows:
        block = triton.next_power_of_2(size)
        layer_norm_kernel[(rows,)](
            x, x if residual is None else residual, weight, weight if bias is None else bias, out, eps,
            SIZE=size, BLOCK=block, HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, POST=post,
            num_warps=num_warps(block),
        )  # fmt: skip
    return out
