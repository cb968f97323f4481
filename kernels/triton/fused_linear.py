"""What makes the inputs of a product with 8-bit weights makes them in 8 bits: norm and quantise, gate and quantise.

One program a row, which it holds in registers. Against two launches one is saved, and what would be written and read
between them: 4n bytes of a row of n in 16 bits. Bytes left: 2n + 4n + 4n + n of a norm, 4n + n of a gate. The numbers
are rounded to x's type before they are quantised, as they would be between two launches, so a gate's bits are the same;
a norm's are but for the order in which threads add squares, which follows from the width of what they store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmserve.kernels.fused_linear import Gate, UnfusedLinear
from llmserve.kernels.ops import LinearWeight
from llmserve.kernels.triton.activation import gated_values
from llmserve.kernels.triton.norm import normed_row, num_warps
from llmserve.kernels.triton.ops import TritonOps
from llmserve.kernels.triton.quantize import QuantizedRows, largest_of, quantize_row
from llmserve.kernels.triton.weights import PackedWeight


@triton.jit
def add_rms_norm_quantize_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, scale_ptr, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """Grid: rows. residual += x, and its norm in 8 bits."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    y = normed_row(x_ptr, residual_ptr, weight_ptr, row, column, eps, SIZE, True)
    quantize_row(y.to(x_ptr.dtype.element_ty).to(tl.float32), out_ptr, scale_ptr, row, column, SIZE, LARGEST)


@triton.jit
def gate_quantize_kernel(
    gate_up_ptr, out_ptr, scale_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, LARGEST: tl.constexpr
):
    """Grid: rows. activation(gate) * up in 8 bits."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    y = gated_values(gate_up_ptr, row, column, SIZE, KIND)
    quantize_row(y.to(gate_up_ptr.dtype.element_ty).to(tl.float32), out_ptr, scale_ptr, row, column, SIZE, LARGEST)


def add_rms_norm_quantize(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> QuantizedRows:
    """residual float32 [t, n] += x [t, n], in place; quantize(rms_norm(residual) of x's type) to `dtype`."""
    assert x.is_contiguous()
    assert residual.is_contiguous()
    assert residual.dtype is weight.dtype is torch.float32
    rows = QuantizedRows.empty(x.shape, dtype, x.device)
    if x.shape[0]:
        size, block = x.shape[1], triton.next_power_of_2(x.shape[1])
        add_rms_norm_quantize_kernel[(x.shape[0],)](
            x, residual, weight, rows.values, rows.scales, eps, SIZE=size, BLOCK=block, LARGEST=largest_of(dtype),
            num_warps=num_warps(block),
        )  # fmt: skip
    return rows


def gate_quantize(gate_up: torch.Tensor, gate: Gate, dtype: torch.dtype) -> QuantizedRows:
    """gate_up [t, 2n] -> quantize(gate_and_mul(gate_up)) to `dtype`."""
    assert gate_up.is_contiguous()
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    rows = QuantizedRows.empty((num_rows, size), dtype, gate_up.device)
    if num_rows:
        block = triton.next_power_of_2(size)
        gate_quantize_kernel[(num_rows,)](
            gate_up, rows.values, rows.scales, SIZE=size, BLOCK=block, KIND=gate, LARGEST=largest_of(dtype),
            num_warps=num_warps(block),
        )  # fmt: skip
    return rows


class TritonFusedLinear:
    """Implements `FusedLinear` beside `TritonOps`. What takes its inputs in 16 bits is left to one op after another."""

    def __init__(self, ops: TritonOps) -> None:
        self._ops = ops
        self._unfused = UnfusedLinear(ops)

    def add_rms_norm_linear(
        self, x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, eps: float, weight: LinearWeight
    ) -> torch.Tensor:
        if not isinstance(weight, PackedWeight) or weight.input_dtype is None:
            return self._unfused.add_rms_norm_linear(x, residual, norm, eps, weight)
        rows = add_rms_norm_quantize(x, residual, norm, eps, weight.input_dtype)
        return self._ops.multiply_quantized(rows, weight, x.dtype)

    def gate_linear(self, gate_up: torch.Tensor, gate: Gate, weight: LinearWeight) -> torch.Tensor:
        if not isinstance(weight, PackedWeight) or weight.input_dtype is None:
            return self._unfused.gate_linear(gate_up, gate, weight)
        return self._ops.multiply_quantized(gate_quantize(gate_up, gate, weight.input_dtype), weight, gate_up.dtype)
