"""What stands behind an encoder: pooling, dense layers, classification heads. Knows no files and no model.

Everything here is float32: it is a row for each text, and costs nothing beside the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmserve.kernels.ops import Activation, LinearWeight, Ops, PackedSequences
from llmserve.models.encoder import LayerNorm
from llmserve.pooling_modules import PoolingMode


class Pooler:
    """Token vectors of each sequence to one vector, as sentence-transformers' `Pooling` does."""

    def __init__(self, ops: Ops, modes: tuple[PoolingMode, ...]) -> None:
        """Several modes are concatenated."""
        self._ops = ops
        self._modes = modes

    def forward(self, hidden: torch.Tensor, sequences: PackedSequences) -> torch.Tensor:
        """hidden [t, m] -> float32 [n, m * modes]."""
        pooled = [self._pool(mode, hidden, sequences) for mode in self._modes]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)

    def _pool(self, mode: PoolingMode, hidden: torch.Tensor, sequences: PackedSequences) -> torch.Tensor:
        bounds = sequences.cu_seqlens.long()
        if mode == "cls":
            return hidden[bounds[:-1]].float()
        if mode == "last":
            return hidden[bounds[1:] - 1].float()
        lengths = bounds.diff()
        if mode == "max":
            return torch.segment_reduce(hidden.float(), "max", lengths=lengths, axis=0)
        weights, totals = torch.ones(len(hidden), device=hidden.device), lengths[:, None].float()
        if mode == "weighted_mean":  # SGPT (Muennighoff 2022): later tokens count more
            weights = (sequences.positions + 1).float()
            totals = self._ops.segment_sum(weights[:, None], torch.ones_like(weights), sequences.cu_seqlens)
        if mode == "mean_sqrt_len":
            totals = totals.sqrt()
        return self._ops.segment_sum(hidden, weights, sequences.cu_seqlens) / totals


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseLayer:
    """norm(activation(linear(x))), each of the latter two if it is there."""

    ops: Ops
    linear: LinearWeight
    activation: Activation | None = None
    norm: LayerNorm | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x float32 [n, in] -> float32 [n, out]."""
        y = self.ops.linear(x, self.linear)
        if self.activation is not None:
            self.ops.activate(y, self.activation)
        if self.norm is not None:
            y = self.ops.layer_norm(y, self.norm.weight, self.norm.bias, self.norm.eps)
        return y


class Head:
    """Pooling and dense layers: embeddings, or logits of classes."""

    def __init__(self, pooler: Pooler, layers: list[DenseLayer]) -> None:
        self._pooler = pooler
        self._layers = layers

    def forward(self, hidden: torch.Tensor, sequences: PackedSequences) -> torch.Tensor:
        """hidden [t, m] -> float32 [n, out]."""
        x = self._pooler.forward(hidden, sequences)
        for layer in self._layers:
            x = layer.forward(x)
        return x
