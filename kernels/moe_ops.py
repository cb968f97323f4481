"""The ops of a mixture of experts, and who implements them on a device. Tensors in, tensors out.

They stand beside `Ops` because they can be made of it: `ReferenceMoE` runs on any device through its `linear`.
`triton.moe.TritonMoE` is a GPU's own. Every row's result is its own, whoever shares its experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from llmserve.kernels.ops import LinearWeight


@dataclass(frozen=True, slots=True)
class Routing:
    """How a mixture of experts chooses. The `top_k` best scores become weights, divided by their sum if `renormalize`,
    and times `scale`. (A softmax over the chosen logits alone is the renormalised softmax over all.)"""

    top_k: int
    scoring: Literal["softmax", "sigmoid"]
    renormalize: bool
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Which rows go to which of e experts: t * k assignments, sorted by expert, and within one by row."""

    weights: torch.Tensor  # float32 [t, k]: of each row's experts, the preferred one first
    order: torch.Tensor  # int64 [t * k]: the assignment, row * k + choice, that stands at each place
    source_rows: torch.Tensor  # int64 [t * k]: its row
    places: torch.Tensor  # int64 [t * k]: the place at which each assignment stands
    offsets: torch.Tensor  # int64 [e + 1]: expert i has the places offsets[i]:offsets[i + 1]


class ExpertWeights(Protocol):
    """A matrix of every expert of a layer, all of one shape. Only the implementation that packed it looks inside."""

    nbytes: int


class MoEOps(Protocol):
    """Shapes: t rows, k experts of each, e experts in all."""

    def clamped_swiglu(self, gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
        """gate_up [t, 2n] -> (up + 1) * gate * sigmoid(alpha * gate) [t, n], gate clamped from above, up from both
        sides (gpt-oss)."""
        ...

    def route(self, logits: torch.Tensor, routing: Routing, correction_bias: torch.Tensor | None = None) -> ExpertRows:
        """logits float32 [t, e] -> which experts each row goes to; the smaller id among equal scores.
        `correction_bias` float32 [e] is added to the scores for the choice, not in the weights (DeepSeek-V3)."""
        ...

    def pack_experts(self, experts: Iterable[LinearWeight], num_experts: int) -> ExpertWeights:
        """Matrices that `Ops` packed, in the experts' order, each taken before the next is made. A ValueError where
        their formats differ and it matters."""
        ...

    def grouped_linear(self, x: torch.Tensor, experts: ExpertWeights, rows: ExpertRows) -> torch.Tensor:
        """x [t * k, in], rows as `rows` sorts them -> each times its expert's matrix, [t * k, out] of x's dtype. A
        row's bits do not depend on the others."""
        ...

    def combine_experts(
        self,
        y: torch.Tensor,
        rows: ExpertRows,
        dtype: torch.dtype,
        shared: torch.Tensor | None = None,
        shared_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """y [t * k, n], sorted as `rows` says -> the weighted sum of each row's experts, [t, n] of `dtype`, added in
        float32 in the order of preference; then shared [t, n], times sigmoid(shared_logits float32 [t, 1])."""
        ...
