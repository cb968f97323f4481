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

    def forward(
        self, hidden: torch.Tensor, sequences: PackedSequences, num_prompt_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """hidden [t, m] -> float32 [n, m * modes], as if the first num_prompt_tokens int64 [n] of each sequence were
        not there; but a weighted mean still counts positions from its beginning."""
        pooled = [self._pool(mode, hidden, sequences, num_prompt_tokens) for mode in self._modes]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)

    def _pool(
        self,
        mode: PoolingMode,
        hidden: torch.Tensor,
        sequences: PackedSequences,
        num_prompt_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        bounds = sequences.cu_seqlens.long()
        if mode == "cls":
            return hidden[bounds[:-1] if num_prompt_tokens is None else bounds[:-1] + num_prompt_tokens].float()
        if mode == "last":
            return hidden[bounds[1:] - 1].float()
        lengths = bounds.diff()
        counted = torch.ones(len(hidden), device=hidden.device)
        if num_prompt_tokens is not None:
            counted *= sequences.positions >= num_prompt_tokens.repeat_interleave(lengths)
        if mode == "max":
            visible = hidden.float().masked_fill(counted[:, None] == 0, -torch.inf)
            return torch.segment_reduce(visible, "max", lengths=lengths, axis=0)
        if mode == "weighted_mean":  # SGPT (Muennighoff 2022): later tokens count more
            counted *= sequences.positions + 1
        totals = lengths[:, None].float()
        if num_prompt_tokens is not None or mode == "weighted_mean":
            totals = self._ops.segment_sum(counted[:, None], torch.ones_like(counted), sequences.cu_seqlens)
        if mode == "mean_sqrt_len":
            totals = totals.sqrt()
        return self._ops.segment_sum(hidden, counted, sequences.cu_seqlens) / totals


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

    def forward(
        self, hidden: torch.Tensor, sequences: PackedSequences, num_prompt_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """hidden [t, m] -> float32 [n, out]."""
        x = self._pooler.forward(hidden, sequences, num_prompt_tokens)
        for layer in self._layers:
            x = layer.forward(x)
        return x
