"""Mixture of experts in plain torch: which experts a row goes to, and how their answers are added. Knows no matrices.

But for the counts that `grouped_linear` asks for, nothing waits for a device: shapes depend on the number of rows
alone. Ties go to the expert of the smaller id, and answers are added in the order of preference.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from llmserve.kernels.moe_ops import ExpertRows, ExpertWeights, Routing
from llmserve.kernels.ops import LinearWeight, Ops


class SeparateExperts:
    """Each expert's matrix as `Ops` packed it."""

    def __init__(self, experts: Iterable[LinearWeight]) -> None:
        self.experts = list(experts)
        self.nbytes = sum(expert.nbytes for expert in self.experts)


class ReferenceMoE:
    """Implements `MoEOps` by the products and gates of any `Ops`. Has no state."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def route(self, logits: torch.Tensor, routing: Routing, correction_bias: torch.Tensor | None = None) -> ExpertRows:
        logits = logits.float()
        scores = torch.softmax(logits, dim=-1) if routing.scoring == "softmax" else _sigmoid(logits)
        choice = scores if correction_bias is None else scores + correction_bias
        chosen = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, : routing.top_k]
        weights = scores.gather(1, chosen)
        if routing.renormalize:
            weights = weights / (_sum_in_order(weights) + 1e-20)
        expert_ids, order = torch.sort(chosen.flatten(), stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        borders = torch.arange(logits.shape[1] + 1, device=logits.device)
        return ExpertRows(
            weights=weights * routing.scale,
            order=order,
            source_rows=order // routing.top_k,
            places=places,
            offsets=torch.searchsorted(expert_ids, borders),
        )

    def pack_experts(self, experts: Iterable[LinearWeight], num_experts: int) -> SeparateExperts:
        return SeparateExperts(experts)

    def grouped_linear(self, x: torch.Tensor, experts: ExpertWeights, rows: ExpertRows) -> torch.Tensor:
        """One product for each expert that has rows; a row's bits are those `linear` gives it."""
        assert isinstance(experts, SeparateExperts)
        offsets, num_outputs = rows.offsets.tolist(), experts.experts[0].out_features
        out = torch.empty((x.shape[0], num_outputs), dtype=x.dtype, device=x.device)
        for expert, weight in enumerate(experts.experts):
            start, stop = offsets[expert], offsets[expert + 1]
            if start < stop:
                out[start:stop] = self._ops.linear(x[start:stop], weight)
        return out

    def combine_experts(
        self,
        y: torch.Tensor,
        rows: ExpertRows,
        dtype: torch.dtype,
        shared: torch.Tensor | None = None,
        shared_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        num_rows, top_k = rows.weights.shape
        by_row = y[rows.places].view(num_rows, top_k, y.shape[1])
        out = by_row[:, 0].float() * rows.weights[:, 0:1]
        for choice in range(1, top_k):
            out = out + by_row[:, choice].float() * rows.weights[:, choice : choice + 1]
        if shared is not None:
            out = out + (shared.float() if shared_logits is None else _sigmoid(shared_logits) * shared.float())
        return out.to(dtype)

    def clamped_swiglu(self, gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
        """As the plain activation of numbers scaled: silu(a * gate) * (up + 1) / a."""
        gate, up = gate_up.float().chunk(2, dim=-1)
        scaled = torch.cat((gate.clamp(max=limit) * alpha, (up.clamp(-limit, limit) + 1) / alpha), dim=-1)
        return self._ops.silu_and_mul(scaled).to(gate_up.dtype)


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    """x float32. torch's own gives an element other bits at the end of a tensor than within; a softmax does not."""
    return torch.softmax(torch.stack((x, torch.zeros_like(x)), dim=-1), dim=-1)[..., 0]


def _sum_in_order(weights: torch.Tensor) -> torch.Tensor:
    """[t, k] -> [t, 1], left to right: a reduction may sum rows in an order that depends on their number."""
    total = weights[:, 0:1]
    for choice in range(1, weights.shape[1]):
        total = total + weights[:, choice : choice + 1]
    return total
