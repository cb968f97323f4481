"""Products together with what makes their inputs, and who fuses the two on a device. Tensors in, tensors out.

They stand beside `Ops` because they mean no more than one op after another: `UnfusedLinear` is that, on any device.
`triton.fused_linear.TritonFusedLinear` makes the inputs of a matrix of 8 bits in 8 bits at once.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch

from llmserve.kernels.ops import LinearWeight, Ops

Gate = Literal["silu", "gelu_tanh"]


class FusedLinear(Protocol):
    """Shapes: t tokens, a weight of [out, in]. What the ops named give one after another, rounded where they round; as
    it is compiled, the squares of a norm may be added in another order. A row's bits do not depend on the others."""

    def add_rms_norm_linear(
        self, x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, eps: float, weight: LinearWeight
    ) -> torch.Tensor:
        """residual float32 [t, in] += x [t, in], in place; returns linear(rms_norm(residual)) [t, out] of x's dtype."""
        ...

    def gate_linear(self, gate_up: torch.Tensor, gate: Gate, weight: LinearWeight) -> torch.Tensor:
        """gate_up [t, 2 * in] -> linear(gate(gate_up's left half) * its right half) [t, out]."""
        ...


class UnfusedLinear:
    """Implements `FusedLinear` by the ops themselves."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def add_rms_norm_linear(
        self, x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, eps: float, weight: LinearWeight
    ) -> torch.Tensor:
        return self._ops.linear(self._ops.add_rms_norm(x, residual, norm, eps), weight)

    def gate_linear(self, gate_up: torch.Tensor, gate: Gate, weight: LinearWeight) -> torch.Tensor:
        gate_and_mul = self._ops.silu_and_mul if gate == "silu" else self._ops.gelu_and_mul
        return self._ops.linear(gate_and_mul(gate_up), weight)
