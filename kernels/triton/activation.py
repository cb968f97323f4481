"""Activations, and the gates of a feed-forward network: activation(gate) * up. Knows no matrices.

gate_up [t, 2n] -> [t, n]: bytes 4n read and 2n written a row in 16 bits, 8 to 20 operations an element. Computed in
float32 and rounded once.
"""

import torch
import triton
import triton.language as tl

from llmserve.kernels.ops import Activation

_BLOCK = 1024


@triton.jit
def activate_value(x, KIND: tl.constexpr):
    """float32 -> float32."""
    if KIND == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif KIND == "gelu_tanh":  # 0.5 * (1 + tanh(z)) is the sigmoid of 2z
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "relu":
        y = tl.where(x < 0, 0.0, x)  # a NaN stays one
    elif KIND == "tanh":
        y = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    else:
        tl.static_assert(KIND == "sigmoid")
        y = 1.0 / (1.0 + tl.exp(-x))
    return y


@triton.jit
def gated_values(gate_up_ptr, row, column, SIZE: tl.constexpr, KIND: tl.constexpr):
    """float32: activation(gate) * up at some columns of a row; beyond SIZE zero."""
    inside = column < SIZE
    gate = tl.load(gate_up_ptr + row * 2 * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * SIZE + SIZE + column, mask=inside, other=0.0).to(tl.float32)
    return activate_value(gate, KIND) * up


@triton.jit
def gate_and_mul_kernel(gate_up_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """One program a row and `BLOCK` of its columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gated = gated_values(gate_up_ptr, row, column, SIZE, KIND)
    tl.store(out_ptr + row * SIZE + column, gated.to(out_ptr.dtype.element_ty), mask=column < SIZE)


@triton.jit
def activate_kernel(x_ptr, size, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """One program `BLOCK` elements, in place."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(x_ptr + at, activate_value(x, KIND).to(x_ptr.dtype.element_ty), mask=at < size)


def gate_and_mul(gate_up: torch.Tensor, kind: Activation) -> torch.Tensor:
    """gate_up [t, 2n] -> activation(gate) * up [t, n]."""
    assert gate_up.is_contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        grid = (rows, triton.cdiv(size, _BLOCK))
        gate_and_mul_kernel[grid](gate_up, out, SIZE=size, BLOCK=_BLOCK, KIND=kind, num_warps=4)
    return out


def activate(x: torch.Tensor, kind: Activation) -> torch.Tensor:
    """x = activation(x), in place; returns x."""
    assert x.is_contiguous()
    if x.numel():
        activate_kernel[(triton.cdiv(x.numel(), _BLOCK),)](x, x.numel(), BLOCK=_BLOCK, KIND=kind, num_warps=4)
    return x
