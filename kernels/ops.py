"""The one interface of every op, and who implements it on a device. Tensors in, tensors out; imports nothing of ours.

An implementation is a class with these methods: `reference.ReferenceOps` (plain torch, the meaning of every op) and
the fast families in `cpu/` and `triton/`. Every op is batch-invariant where its implementation says so: a row's result
does not depend on the rows that came with it, nor on how a prompt was cut into chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """What one layer's cache must hold. Its layout in memory is the implementation's own affair."""

    num_kv_heads: int
    head_dim: int
    block_size: int
    # of keys and values. FP8_KV: each token of each head is rounded to e4m3 times a scale of its own, float32: its
    # largest value / FP8_LARGEST. Nothing is calibrated, and what a token becomes does not depend on its neighbours.
    dtype: torch.dtype


FP8_KV = torch.float8_e4m3fn
FP8_LARGEST = 448.0


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the tokens of a ragged mixed batch stand: prompts' chunks and single decode tokens alike."""

    query_start_loc: torch.Tensor  # int32 [num_seqs + 1]: sequence i owns rows query_start_loc[i]:query_start_loc[i+1]
    seq_lens: torch.Tensor  # int32 [num_seqs]: tokens of context, those of this step included
    block_table: torch.Tensor  # int32 [num_seqs, max_blocks]
    slot_mapping: torch.Tensor  # int64 [num_tokens]: block id * block_size + offset
    positions: torch.Tensor  # int64 [num_tokens]
    max_seq_len: int


Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "tanh", "sigmoid"]  # "gelu" is the exact one, by erf


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """Whole sequences of an encoder's batch, one behind the other with no padding."""

    cu_seqlens: torch.Tensor  # int32 [num_seqs + 1]: sequence i owns rows cu_seqlens[i]:cu_seqlens[i + 1], at least one
    positions: torch.Tensor  # int64 [num_tokens]: from 0 within each sequence
    max_seq_len: int


@dataclass(frozen=True, slots=True)
class LogitAdjustments:
    """What is done to logits before a draw, from tables with a row, a *slot*, for each sequence that may run (s slots).
    The tables stay where they are from step to step, so that a captured graph may read them. A slot's order is: the
    bitmask, the entries, the repetition penalty, then those of frequency and presence."""

    slots: torch.Tensor  # int64 [rows]: the slot of each row of logits
    is_used: torch.Tensor  # int32 [s]: 0 where nothing is done to logits, whatever stands in the other tables
    bitmask: torch.Tensor  # int32 [s, ceil(vocab / 32)]: bit i % 32 of word i // 32 says that token i may be drawn
    is_masked: torch.Tensor  # int32 [s]: 1 where the bitmask counts
    entry_ids: torch.Tensor  # int32 [s, MAX_ENTRIES]: tokens to which `entry_values` are added, in ascending order
    entry_values: torch.Tensor  # float32 [s, MAX_ENTRIES]; -inf is a ban
    entry_until: torch.Tensor  # int64 [s, MAX_ENTRIES]: an entry counts for draws at positions below this
    num_entries: torch.Tensor  # int32 [s]
    repetition: torch.Tensor  # float32 [s]; 1 is off: CTRL's, arXiv 1909.05858, of tokens of prompt and output
    frequency: torch.Tensor  # float32 [s]; 0 is off: OpenAI's, times how often the output has the token
    presence: torch.Tensor  # float32 [s]; 0 is off: OpenAI's, once for a token the output has
    # int16 [s, vocab]: bit 0, the prompt has the token; the bits above, how often the output has it, MAX_COUNT at most
    token_counts: torch.Tensor


MAX_ENTRIES = 2048
MAX_COUNT = 16383


@dataclass(frozen=True, slots=True)
class TokenLogprobTensors:
    """Log-probabilities at r positions."""

    logprobs: torch.Tensor  # float32 [r], of the given tokens
    ranks: torch.Tensor  # int64 [r]: 1 + how many tokens are likelier than the given one
    top_ids: torch.Tensor  # int64 [r, n], the likeliest tokens, likeliest first
    top_logprobs: torch.Tensor  # float32 [r, n]


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """One row each. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off."""

    temperature: torch.Tensor  # float32 [rows]
    top_k: torch.Tensor  # int64 [rows]
    top_p: torch.Tensor  # float32 [rows]
    min_p: torch.Tensor  # float32 [rows]
    seeds: torch.Tensor  # int64 [rows]
    positions: torch.Tensor  # int64 [rows]: position of the token to be drawn; with the seed it is the random counter
    all_greedy: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool
    adjustments: LogitAdjustments | None = None


class LinearWeight(Protocol):
    """A weight matrix packed for `Ops.linear`. Only the implementation that packed it looks inside."""

    out_features: int
    in_features: int
    format: str
    nbytes: int


class KVCache(Protocol):
    """One layer's blocks. Only the implementation that made it looks inside."""

    nbytes: int

    def parts(self) -> tuple[torch.Tensor, ...]:
        """All that it keeps: [num_blocks, ...] each, a block in one piece of a multiple of 4 bytes. For copies of whole
        blocks."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParameters:
    """One layer of a dense decoder, for an implementation that computes whole layers. Norm weights and `cos_sin` are
    float32; None: the layer has no such norm."""

    num_heads: int
    qkv: LinearWeight  # [(h + 2k) * d, hidden]
    o: LinearWeight  # [hidden, h * d]
    gate_up: LinearWeight  # [2 * intermediate, hidden]
    down: LinearWeight  # [hidden, intermediate]
    gelu: bool  # the activation: tanh-GELU, or else SiLU
    attention_norm: torch.Tensor  # [hidden], before attention
    mlp_norm: torch.Tensor
    post_attention_norm: torch.Tensor | None
    post_mlp_norm: torch.Tensor | None
    q_norm: torch.Tensor | None  # [d]
    k_norm: torch.Tensor | None
    eps: float
    cos_sin: torch.Tensor  # [max_positions, d]
    scale: float
    sliding_window: int
    soft_cap: float


class LayerStack(Protocol):
    """All layers of a decoder, from the embedding to the final norm."""

    def forward(self, embedded: torch.Tensor, meta: AttentionMetadata, kv_caches: list[KVCache]) -> torch.Tensor:
        """embedded [t, hidden], one cache a layer -> hidden states [t, hidden], final norm applied."""
        ...


class Ops(Protocol):
    """All ops of decoders and encoders. Shapes: t tokens, n sequences, h query heads, k kv heads, d head size, r rows.

    Norm weights and biases are float32."""

    name: str
    caches_fp8: bool  # whether a `KVCacheSpec` may be of FP8_KV
    weight_formats: tuple[str, ...]  # of `weight_formats.py`, those this implementation computes

    def kv_cache_bytes_per_block(self, spec: KVCacheSpec) -> int:
        """Bytes one block of one layer takes, keys and values together."""
        ...

    def allocate_kv_cache(self, spec: KVCacheSpec, num_blocks: int, device: torch.device) -> KVCache:
        """One layer's blocks, zeroed."""
        ...

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None, fmt: str = "dense") -> LinearWeight:
        """Packs a [out, in] weight; the caller drops its own reference. `fmt` "dense" keeps the dtype; "int8",
        "fp8" and "q8_0" make a byte of each weight, if `weight_formats` has them. Another is a ValueError."""
        ...

    def pack_quantized(
        self, raw: torch.Tensor, fmt: str, bias: torch.Tensor | None = None, order: torch.Tensor | None = None
    ) -> LinearWeight:
        """Packs a matrix that is quantised already, raw uint8 [out, `row_bytes`] as `weight_formats.py` says, and keeps
        its numbers; the caller drops its own reference. Rows may have been joined or permuted. `order` int64 [in], of
        formats that end in "_order": which input stands at each place. A format that is not in `weight_formats` is a
        ValueError."""
        ...

    def linear_bytes(self, fmt: str, out_features: int, in_features: int, dtype: torch.dtype, has_bias: bool) -> int:
        """`nbytes` of a matrix packed in that format (`dtype`: of a dense one), known before it is packed."""
        ...

    def linear(self, x: torch.Tensor, weight: LinearWeight, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """x [t, in] -> x @ W^T + bias [t, out], of x's dtype or of `out_dtype`: float32 keeps what was accumulated."""
        ...

    def embedding(self, token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """token_ids int64 [t], table [vocab, hidden] -> [t, hidden]."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [t, n] * rsqrt(mean(x^2) + eps) * weight float32 [n], computed in fp32. A new tensor."""
        ...

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """residual float32 += x, in place; returns rms_norm(residual) of x's dtype."""
        ...

    def rotary_and_cache(
        self,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        kv_cache: KVCache,
        meta: AttentionMetadata,
        num_heads: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        """Splits qkv [t, (h + 2k) * d], norms q and k per head if weights float32 [d] are given, rotates them (NeoX:
        element i pairs with i + d/2) by cos_sin float32 [max_positions, d] (cosines, then sines, of d/2 frequencies)
        at meta.positions, writes k and v to meta.slot_mapping. Returns q [t, h, d]."""
        ...

    def paged_attention(
        self,
        q: torch.Tensor,
        kv_cache: KVCache,
        meta: AttentionMetadata,
        scale: float,
        sliding_window: int = 0,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of q [t, h, d] over the cache: row j of sequence i, at position p, sees positions <= p, and
        with a window w only positions > p - w. `soft_cap` c replaces a score s by c * tanh(s / c). `sinks` float32 [h]
        are scores of a key more, whose value is zero (gpt-oss). Returns [t, h * d]."""
        ...

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up [t, 2n] -> silu(gate) * up [t, n]."""
        ...

    def gelu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up [t, 2n] -> gelu_tanh(gate) * up [t, n]."""
        ...

    def gelu_erf_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up [t, 2n] -> gelu(gate) * up [t, n], the gelu the exact one."""
        ...

    def activate(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """x [t, n] = activation(x), in place; returns x."""
        ...

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        """(x - mean) * rsqrt(variance + eps) * weight + bias over each row of x [t, n], in fp32. A new tensor."""
        ...

    def add_layer_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        """residual float32 += x, in place; returns layer_norm(residual) of x's dtype. Of layers that norm first."""
        ...

    def post_layer_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        """residual float32 = layer_norm(residual + x), in place; returns it in x's dtype, itself if that is float32.
        Of layers that norm last, as BERT's do."""
        ...

    def rotary_packed(
        self, qkv: torch.Tensor, cos_sin: torch.Tensor, sequences: PackedSequences, head_dim: int
    ) -> None:
        """Rotates q and k of qkv [t, 3 * h * d] in place, as `rotary_and_cache` does."""
        ...

    def packed_attention(
        self,
        qkv: torch.Tensor,
        sequences: PackedSequences,
        head_dim: int,
        scale: float,
        window: int = 0,
        relative_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Bidirectional attention within each sequence of qkv [t, 3 * h * d]: a row sees every row of its sequence, and
        with a window w > 0 those at most w away. `relative_bias` float32 [h, 2m - 1], m >= max_seq_len, is added to
        the scaled scores: element m - 1 + j - i for the query at position i and the key at j. Returns [t, h * d]."""
        ...

    def segment_sum(self, x: torch.Tensor, weights: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """x [t, m], weights float32 [t], cu_seqlens int32 [n + 1] -> float32 [n, m]: each sequence's weighted sum of
        rows."""
        ...

    def fuse_layers(self, layers: Sequence[LayerParameters], final_norm: torch.Tensor) -> LayerStack | None:
        """The layers as one op, to the same bits as one op after another; None if this implementation has none."""
        ...

    def sample(self, logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
        """logits float32 [r, vocab] -> token ids int64 [r]. First makes the adjustments, in place; at last it counts
        the drawn tokens in `token_counts` of the slots that have penalties, each of which may have one row.

        Greedy rows take the largest logit, the smallest id among equals. The others divide by the temperature, keep
        what min_p, top_k and top_p leave, and take the largest logit + Gumbel noise; the noise is a function of
        (seed, position, token id) alone, so neither the batch nor a restart changes a draw.
        """
        ...

    def token_logprobs(self, logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> TokenLogprobTensors:
        """logits float32 [r, vocab], token_ids int64 [r] -> their log-probabilities, and those of the `num_top` (at
        most vocab) likeliest. Among equals any come first; which tokens of probability 0 stand last is open."""
        ...
