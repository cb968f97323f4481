"""Mixtures of experts on a GPU: `MoEOps` by our own kernels, in launches whose number and shapes do not depend on data.

Of a layer: two launches choose and sort, one gathers rows, one or two multiply (`gemm.py`, all experts at once), one is
the activation, one or two multiply, one adds up; the wait for counts that `ReferenceMoE` needs is gone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from llmserve.kernels.moe_ops import ExpertRows, ExpertWeights, Routing
from llmserve.kernels.ops import LinearWeight
from llmserve.kernels.reference import DenseLinearWeight
from llmserve.kernels.triton import routing as routing_kernels
from llmserve.kernels.triton.ops import TritonOps
from llmserve.kernels.triton.weights import PackedWeight, stack_experts

_BLOCK = 1024


@triton.jit
def combine_kernel(
    y_ptr, places_ptr, weights_ptr, shared_ptr, gate_ptr, out_ptr, SIZE: tl.constexpr, TOP_K: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: rows, and blocks of columns. Bytes: (k + 1) * n a row in 16 bits. In the order of preference."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOP_K):
        place = tl.load(places_ptr + row * TOP_K + choice)
        weight = tl.load(weights_ptr + row * TOP_K + choice)
        total += tl.load(y_ptr + place * SIZE + column, mask=inside, other=0.0).to(tl.float32) * weight
    if HAS_SHARED:
        shared = tl.load(shared_ptr + row * SIZE + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            shared = shared / (1.0 + tl.exp(-tl.load(gate_ptr + row)))
        total += shared
    tl.store(out_ptr + row * SIZE + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def clamped_swiglu_kernel(gate_up_ptr, out_ptr, alpha, limit, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: rows, and blocks of columns. In float32, rounded once. A NaN stays one."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    gate = tl.load(gate_up_ptr + row * 2 * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * SIZE + SIZE + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    y = (up + 1.0) * gate / (1.0 + tl.exp(-alpha * gate))
    tl.store(out_ptr + row * SIZE + column, y.to(out_ptr.dtype.element_ty), mask=inside)


class TritonMoE:
    """Implements `MoEOps` beside `TritonOps`."""

    def __init__(self, ops: TritonOps) -> None:
        self._ops = ops

    def route(self, logits: torch.Tensor, routing: Routing, correction_bias: torch.Tensor | None = None) -> ExpertRows:
        return routing_kernels.route(logits, routing, correction_bias)

    def pack_experts(self, experts: Iterable[LinearWeight], num_experts: int) -> PackedWeight:
        """One tensor of all; experts of different formats are a ValueError."""
        return stack_experts((_own(expert) for expert in experts), num_experts)

    def grouped_linear(self, x: torch.Tensor, experts: ExpertWeights, rows: ExpertRows) -> torch.Tensor:
        assert isinstance(experts, PackedWeight)
        return self._ops.multiply(x, experts, offsets=rows.offsets)

    def combine_experts(
        self,
        y: torch.Tensor,
        rows: ExpertRows,
        dtype: torch.dtype,
        shared: torch.Tensor | None = None,
        shared_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert y.is_contiguous()
        (num_rows, top_k), size = rows.weights.shape, y.shape[1]
        out = torch.empty((num_rows, size), dtype=dtype, device=y.device)
        if num_rows:
            combine_kernel[(num_rows, triton.cdiv(size, _BLOCK))](
                y, rows.places, rows.weights, out if shared is None else shared,
                out if shared_logits is None else shared_logits, out, SIZE=size, TOP_K=top_k,
                HAS_SHARED=shared is not None, HAS_GATE=shared_logits is not None, BLOCK=_BLOCK, num_warps=4,
            )  # fmt: skip
        return out

    def clamped_swiglu(self, gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
        assert gate_up.is_contiguous()
        num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((num_rows, size))
        if num_rows:
            grid = (num_rows, triton.cdiv(size, _BLOCK))
            clamped_swiglu_kernel[grid](gate_up, out, alpha, limit, SIZE=size, BLOCK=_BLOCK, num_warps=4)
        return out


def _own(weight: LinearWeight) -> PackedWeight | DenseLinearWeight:
    assert isinstance(weight, PackedWeight | DenseLinearWeight)
    return weight
