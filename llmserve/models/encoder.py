"""The encoder: BERT, RoBERTa, XLM-R, DistilBERT, MPNet and ModernBERT over packed sequences. Knows no files, no names.

All arithmetic is the ops'. The residual stream is float32, whatever the weights are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmserve.kernels.ops import Activation, LinearWeight, Ops, PackedSequences


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """float32 [hidden] each."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderAttention:
    """Bidirectional self-attention within each sequence."""

    ops: Ops
    head_dim: int
    qkv: LinearWeight  # [3 * hidden, hidden]
    out: LinearWeight  # [hidden, hidden]
    window: int
    cos_sin: torch.Tensor | None  # float32 [positions, head_dim]
    relative_bias: torch.Tensor | None  # float32 [heads, 2 * positions - 1]

    def forward(self, x: torch.Tensor, sequences: PackedSequences) -> torch.Tensor:
        """x [t, hidden] -> [t, hidden]."""
        qkv = self.ops.linear(x, self.qkv)
        if self.cos_sin is not None:
            self.ops.rotary_packed(qkv, self.cos_sin, sequences, self.head_dim)
        scale = self.head_dim**-0.5
        attended = self.ops.packed_attention(qkv, sequences, self.head_dim, scale, self.window, self.relative_bias)
        return self.ops.linear(attended, self.out)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainMLP:
    """down(activation(up(x)))."""

    ops: Ops
    up: LinearWeight  # [intermediate, hidden]
    down: LinearWeight  # [hidden, intermediate]
    activation: Activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [t, hidden] -> [t, hidden]."""
        return self.ops.linear(self.ops.activate(self.ops.linear(x, self.up), self.activation), self.down)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeluGatedMLP:
    """down(gelu(gate(x)) * up(x))."""

    ops: Ops
    up: LinearWeight  # [2 * intermediate, hidden]: gate, then up
    down: LinearWeight  # [hidden, intermediate]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [t, hidden] -> [t, hidden]."""
        return self.ops.linear(self.ops.gelu_erf_and_mul(self.ops.linear(x, self.up)), self.down)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderLayer:
    """Attention and MLP with a norm each: behind them in BERT's family, before them in ModernBERT."""

    attention: EncoderAttention
    mlp: PlainMLP | GeluGatedMLP
    attention_norm: LayerNorm | None  # ModernBERT's first layer takes the normed embeddings as they are
    mlp_norm: LayerNorm


@dataclass(frozen=True, slots=True, kw_only=True)
class BertEmbeddings:
    """Words, positions and token types, summed and normed."""

    ops: Ops
    words: torch.Tensor  # [vocab, hidden]
    places: torch.Tensor  # float32 [token types * positions, hidden]: the sum of a token type's and a position's
    num_positions: int
    norm: LayerNorm

    def forward(
        self, token_ids: torch.Tensor, token_types: torch.Tensor | None, sequences: PackedSequences
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [t] each -> the normed sum [t, hidden] in the words' type and as float32, the residual."""
        index = sequences.positions
        if token_types is not None:
            index = index + token_types * self.num_positions
        residual = self.ops.embedding(index, self.places)
        norm = self.norm
        words = self.ops.embedding(token_ids, self.words)
        return self.ops.post_layer_norm(words, residual, norm.weight, norm.bias, norm.eps), residual


class BertEncoder:
    """The family whose norms stand behind attention and MLP."""

    def __init__(self, ops: Ops, embeddings: BertEmbeddings, layers: list[EncoderLayer]) -> None:
        self.ops = ops
        self.embeddings = embeddings
        self.layers = layers

    def forward(
        self, token_ids: torch.Tensor, token_types: torch.Tensor | None, sequences: PackedSequences
    ) -> torch.Tensor:
        """int64 [t] each; without token types they are all zero -> hidden states float32 [t, hidden]."""
        post_layer_norm = self.ops.post_layer_norm
        x, residual = self.embeddings.forward(token_ids, token_types, sequences)
        for layer in self.layers:
            norm = layer.attention_norm
            assert norm is not None
            attended = layer.attention.forward(x, sequences)
            x = post_layer_norm(attended, residual, norm.weight, norm.bias, norm.eps)
            norm = layer.mlp_norm
            x = post_layer_norm(layer.mlp.forward(x), residual, norm.weight, norm.bias, norm.eps)
        return residual


class ModernBertEncoder:
    """Norms before attention and MLP, rotary positions, local and global layers in turn."""

    def __init__(
        self, ops: Ops, words: torch.Tensor, embedding_norm: LayerNorm, layers: list[EncoderLayer], final: LayerNorm
    ) -> None:
        """words [vocab, hidden]."""
        self.ops = ops
        self.words = words
        self.embedding_norm = embedding_norm
        self.layers = layers
        self.final_norm = final

    def forward(
        self, token_ids: torch.Tensor, token_types: torch.Tensor | None, sequences: PackedSequences
    ) -> torch.Tensor:
        """int64 [t] -> hidden states [t, hidden]. There are no token types here."""
        assert token_types is None
        ops, norm = self.ops, self.embedding_norm
        x = ops.layer_norm(ops.embedding(token_ids, self.words), norm.weight, norm.bias, norm.eps)
        residual = x.to(torch.float32, copy=True)
        following = [layer.attention_norm for layer in self.layers[1:]] + [self.final_norm]
        for layer, next_norm in zip(self.layers, following, strict=True):
            norm = layer.mlp_norm
            attended = layer.attention.forward(x, sequences)
            x = ops.add_layer_norm(attended, residual, norm.weight, norm.bias, norm.eps)
            assert next_norm is not None
            x = ops.add_layer_norm(layer.mlp.forward(x), residual, next_norm.weight, next_norm.bias, next_norm.eps)
        return x
