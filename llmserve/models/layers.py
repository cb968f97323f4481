"""The parts of a dense decoder's layer, over packed weights. All arithmetic is the ops'; knows no files, no names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llmserve.kernels.ops import AttentionMetadata, KVCache, LayerParameters, LinearWeight, Ops


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

    def forward(self, x: torch.Tensor, meta: AttentionMetadata, kv_cache: KVCache) -> torch.Tensor:
        """x [t, hidden] -> [t, hidden]; writes this step's keys and values to the cache."""
        qkv = self.ops.linear(x, self.qkv)
        q = self.ops.rotary_and_cache(
            qkv, self.cos_sin, kv_cache, meta, self.num_heads, self.q_norm, self.k_norm, self.eps
        )
        attended = self.ops.paged_attention(q, kv_cache, meta, self.scale, self.sliding_window, self.soft_cap)
        return self.ops.linear(attended, self.o)


@dataclass(frozen=True, slots=True, kw_only=True)
class MLP:
    """The gated feed-forward network: down(activation(gate(x)) * up(x))."""

    ops: Ops
    gate_up: LinearWeight  # [2 * intermediate, hidden]
    down: LinearWeight  # [hidden, intermediate]
    activation_and_mul: Callable[[torch.Tensor], torch.Tensor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [t, hidden] -> [t, hidden]."""
        return self.ops.linear(self.activation_and_mul(self.ops.linear(x, self.gate_up)), self.down)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """Attention and MLP around a residual stream. Norm weights float32 [hidden]."""

    ops: Ops
    attention: Attention
    mlp: MLP
    attention_norm: torch.Tensor  # before attention; the model applies it, fused with the previous layer's residual
    mlp_norm: torch.Tensor
    post_attention_norm: torch.Tensor | None  # Gemma's: on what attention returns, before the residual
    post_mlp_norm: torch.Tensor | None
    eps: float

    @property
    def linears(self) -> list[LinearWeight]:
        """Its packed matrices."""
        return [self.attention.qkv, self.attention.o, self.mlp.gate_up, self.mlp.down]

    @property
    def norms(self) -> list[torch.Tensor]:
        """The norm weights it has."""
        optional = (self.attention.q_norm, self.attention.k_norm, self.post_attention_norm, self.post_mlp_norm)
        return [self.attention_norm, self.mlp_norm, *(norm for norm in optional if norm is not None)]

    def forward(
        self, normed: torch.Tensor, residual: torch.Tensor, meta: AttentionMetadata, kv_cache: KVCache
    ) -> torch.Tensor:
        """normed [t, hidden] is the normed residual. Adds attention's part to `residual` in place, and returns the
        MLP's part, for the next norm to add."""
        attended = self.attention.forward(normed, meta, kv_cache)
        if self.post_attention_norm is not None:
            attended = self.ops.rms_norm(attended, self.post_attention_norm, self.eps)
        normed = self.ops.add_rms_norm(attended, residual, self.mlp_norm, self.eps)
        out = self.mlp.forward(normed)
        if self.post_mlp_norm is not None:
            out = self.ops.rms_norm(out, self.post_mlp_norm, self.eps)
        return out

    def parameters(self) -> LayerParameters:
        """What it is made of, for ops that compute whole layers."""
        attention, mlp = self.attention, self.mlp
        gelu = mlp.activation_and_mul == self.ops.gelu_and_mul
        assert gelu or mlp.activation_and_mul == self.ops.silu_and_mul
        return LayerParameters(
            num_heads=attention.num_heads,
            qkv=attention.qkv,
            o=attention.o,
            gate_up=mlp.gate_up,
            down=mlp.down,
            gelu=gelu,
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


class DecoderLayers:
    """The layers one op after another: a `LayerStack` of any ops."""

    def __init__(self, ops: Ops, layers: Sequence[DecoderLayer], final_norm: torch.Tensor, eps: float) -> None:
        self._ops = ops
        self._layers = layers
        self._eps = eps
        # The norm that follows each layer: the next one's first, and after the last the final one.
        self._next_norms = [layer.attention_norm for layer in layers[1:]] + [final_norm]

    def forward(self, embedded: torch.Tensor, meta: AttentionMetadata, kv_caches: list[KVCache]) -> torch.Tensor:
        """embedded [t, hidden], one cache a layer -> hidden states [t, hidden], final norm applied."""
        normed = self._ops.rms_norm(embedded, self._layers[0].attention_norm, self._eps)
        residual = embedded.to(torch.float32, copy=True)  # rounding each layer's sum is most of what bf16 loses
        for layer, kv_cache, next_norm in zip(self._layers, kv_caches, self._next_norms, strict=True):
            out = layer.forward(normed, residual, meta, kv_cache)
            normed = self._ops.add_rms_norm(out, residual, next_norm, self._eps)
        return normed
