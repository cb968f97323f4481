"""The parts of a dense decoder's layer, over packed weights. All arithmetic is the ops'; knows no files, no names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from llmserve.kernels.fused_linear import FusedLinear, Gate
from llmserve.kernels.moe_ops import ExpertWeights, MoEOps, Routing
from llmserve.kernels.ops import AttentionMetadata, KVCache, LayerParameters, LayerStack, LinearWeight, Ops


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Grouped-query self-attention with rotary embedding. Norm weights float32 [head_dim]."""

    ops: Ops
    num_heads: int
    qkv: LinearWeight  # [(h + 2k) * d, hidden]
    o: LinearWeight  # [hidden, h * d]
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    eps: float
    cos_sin: torch.Tensor  # float32 [max_model_len, d]
    scale: float
    sliding_window: int
    soft_cap: float
    sinks: torch.Tensor | None  # float32 [h]

    def forward(self, qkv: torch.Tensor, meta: AttentionMetadata, kv_cache: KVCache) -> torch.Tensor:
        """What `self.qkv` made [t, (h + 2k) * d] -> [t, hidden]; writes this step's keys and values to the cache."""
        q = self.ops.rotary_and_cache(
            qkv, self.cos_sin, kv_cache, meta, self.num_heads, self.q_norm, self.k_norm, self.eps
        )
        attended = self.ops.paged_attention(
            q, kv_cache, meta, self.scale, self.sliding_window, self.soft_cap, self.sinks
        )
        return self.ops.linear(attended, self.o)


class FeedForward(Protocol):
    """The second half of a layer."""

    @property
    def linears(self) -> list[LinearWeight | ExpertWeights]:
        """Its packed matrices."""
        ...

    @property
    def vectors(self) -> list[torch.Tensor]:
        """Its weights that are no matrices."""
        ...

    def forward(self, x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, eps: float) -> torch.Tensor:
        """Adds x [t, hidden] to `residual` in place, norms that by `norm`, and returns what it makes of it [t, hidden],
        not added yet."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MLP:
    """The gated feed-forward network: down(activation(gate(x)) * up(x))."""

    ops: Ops
    fused: FusedLinear
    gate_up: LinearWeight  # [2 * intermediate, hidden]
    down: LinearWeight  # [hidden, intermediate]
    gate: Gate

    @property
    def linears(self) -> list[LinearWeight | ExpertWeights]:
        return [self.gate_up, self.down]

    @property
    def vectors(self) -> list[torch.Tensor]:
        return []

    def forward(self, x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, eps: float) -> torch.Tensor:
        gate_up = self.fused.add_rms_norm_linear(x, residual, norm, eps, self.gate_up)
        return self.fused.gate_linear(gate_up, self.gate, self.down)

    def of_normed(self, x: torch.Tensor) -> torch.Tensor:
        """x [t, hidden], which others read too -> [t, hidden]."""
        return self.fused.gate_linear(self.ops.linear(x, self.gate_up), self.gate, self.down)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE:
    """A mixture of experts: each token's answer is the weighted sum of those of the experts its router chose, and of
    the shared expert's, if there is one. A token's result does not depend on who shares its experts."""

    ops: Ops
    moe_ops: MoEOps
    router: LinearWeight  # [experts, hidden]
    routing: Routing
    correction_bias: torch.Tensor | None  # float32 [experts]
    gate_up: ExpertWeights  # of each expert, [2 * intermediate, hidden]
    down: ExpertWeights  # [hidden, intermediate]
    activation_and_mul: Callable[[torch.Tensor], torch.Tensor]
    shared: MLP | None
    shared_gate: LinearWeight | None  # [1, hidden]

    @property
    def linears(self) -> list[LinearWeight | ExpertWeights]:
        shared = self.shared.linears if self.shared is not None else []
        gate = [self.shared_gate] if self.shared_gate is not None else []
        return [self.router, self.gate_up, self.down, *shared, *gate]

    @property
    def vectors(self) -> list[torch.Tensor]:
        return [] if self.correction_bias is None else [self.correction_bias]

    def forward(self, x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, eps: float) -> torch.Tensor:
        x = self.ops.add_rms_norm(x, residual, norm, eps)
        rows = self.moe_ops.route(self.ops.linear(x, self.router, torch.float32), self.routing, self.correction_bias)
        activated = self.activation_and_mul(self.moe_ops.grouped_linear(x[rows.source_rows], self.gate_up, rows))
        out = self.moe_ops.grouped_linear(activated, self.down, rows)
        shared = None if self.shared is None else self.shared.of_normed(x)
        logits = None if self.shared_gate is None else self.ops.linear(x, self.shared_gate, torch.float32)
        return self.moe_ops.combine_experts(out, rows, x.dtype, shared, logits)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """Attention and MLP or mixture around a residual stream. Norm weights float32 [hidden]."""

    ops: Ops
    fused: FusedLinear
    attention: Attention
    mlp: FeedForward
    attention_norm: torch.Tensor  # before attention
    mlp_norm: torch.Tensor
    post_attention_norm: torch.Tensor | None  # Gemma's: on what attention returns, before the residual
    post_mlp_norm: torch.Tensor | None
    eps: float

    @property
    def linears(self) -> list[LinearWeight | ExpertWeights]:
        """Its packed matrices."""
        return [self.attention.qkv, self.attention.o, *self.mlp.linears]

    @property
    def vectors(self) -> list[torch.Tensor]:
        """Its weights that are no matrices: norms, mostly."""
        attention = (self.attention.q_norm, self.attention.k_norm, self.attention.sinks)
        optional = (*attention, self.post_attention_norm, self.post_mlp_norm)
        here = [vector for vector in optional if vector is not None]
        return [self.attention_norm, self.mlp_norm, *here, *self.mlp.vectors]

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor, meta: AttentionMetadata, kv_cache: KVCache
    ) -> torch.Tensor:
        """Adds x [t, hidden], the part of the layer before, to `residual` in place, then attention's part, and returns
        the MLP's part, for the next norm to add."""
        qkv = self.fused.add_rms_norm_linear(x, residual, self.attention_norm, self.eps, self.attention.qkv)
        attended = self.attention.forward(qkv, meta, kv_cache)
        if self.post_attention_norm is not None:
            attended = self.ops.rms_norm(attended, self.post_attention_norm, self.eps)
        out = self.mlp.forward(attended, residual, self.mlp_norm, self.eps)
        if self.post_mlp_norm is not None:
            out = self.ops.rms_norm(out, self.post_mlp_norm, self.eps)
        return out

    def parameters(self) -> LayerParameters | None:
        """What it is made of, for ops that compute whole layers; None if those know no such layer."""
        attention, mlp = self.attention, self.mlp
        if not isinstance(mlp, MLP) or attention.sinks is not None:
            return None
        return LayerParameters(
            num_heads=attention.num_heads,
            qkv=attention.qkv,
            o=attention.o,
            gate_up=mlp.gate_up,
            down=mlp.down,
            gelu=mlp.gate == "gelu_tanh",
            attention_norm=self.attention_norm,
            mlp_norm=self.mlp_norm,
            post_attention_norm=self.post_attention_norm,
            post_mlp_norm=self.post_mlp_norm,
            q_norm=attention.q_norm,
            k_norm=attention.k_norm,
            eps=self.eps,
            cos_sin=attention.cos_sin,
            scale=attention.scale,
            sliding_window=attention.sliding_window,
            soft_cap=attention.soft_cap,
        )


def stack_layers(ops: Ops, layers: Sequence[DecoderLayer], final_norm: torch.Tensor, eps: float) -> LayerStack:
    """As one op, if there is one for layers like these; else as one op after another."""
    parameters = [known for layer in layers if (known := layer.parameters()) is not None]
    fused = ops.fuse_layers(parameters, final_norm) if len(parameters) == len(layers) else None
    return fused or DecoderLayers(ops, layers, final_norm, eps)


class DecoderLayers:
    """The layers one op after another: a `LayerStack` of any ops."""

    def __init__(self, ops: Ops, layers: Sequence[DecoderLayer], final_norm: torch.Tensor, eps: float) -> None:
        self._ops = ops
        self._layers = layers
        self._final_norm = final_norm
        self._eps = eps

    def forward(self, embedded: torch.Tensor, meta: AttentionMetadata, kv_caches: list[KVCache]) -> torch.Tensor:
        """embedded [t, hidden], one cache a layer -> hidden states [t, hidden], final norm applied."""
        x = embedded
        residual = torch.zeros_like(x, dtype=torch.float32)  # rounding each layer's sum is most of what bf16 loses
        for layer, kv_cache in zip(self._layers, kv_caches, strict=True):
            x = layer.forward(x, residual, meta, kv_cache)
        return self._ops.add_rms_norm(x, residual, self._final_norm, self._eps)
