"""Every op in plain torch: what each one means, the oracle of the fast kernels, and what runs where there are none.

Any device, any float type. On a CPU, with float32 or bfloat16 weights, every op is batch-invariant to the bit. What
makes it so: products by oneDNN-packed weights (`cpu_linear`), and an attention whose sums run over fixed tiles of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from llmserve.kernels.cpu_linear import OneDnnLinearWeight, can_pack
from llmserve.kernels.ops import (
    Activation,
    AttentionMetadata,
    KVCache,
    KVCacheSpec,
    LayerParameters,
    LayerStack,
    LinearWeight,
    PackedSequences,
    SamplingTensors,
    TokenLogprobTensors,
)
from llmserve.kernels.reference_attention import (
    DenseKVCache,
    attend,
    gather_context,
    group_queries,
    head_bytes,
    packed_attention,
    rotate,
)
from llmserve.kernels.reference_sampling import sample, token_logprobs
from llmserve.kernels.weight_formats import DENSE

_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class DenseLinearWeight:
    """A [out, in] matrix as it came, for `F.linear`."""

    format = "dense"

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)
        self.weight = weight
        self.bias = bias


class ReferenceOps:
    """Implements `Ops`. Has no state."""

    name = "reference"
    caches_fp8 = True
    weight_formats: tuple[str, ...] = (DENSE,)

    def kv_cache_bytes_per_block(self, spec: KVCacheSpec) -> int:
        return 2 * spec.block_size * spec.num_kv_heads * head_bytes(spec)

    def allocate_kv_cache(self, spec: KVCacheSpec, num_blocks: int, device: torch.device) -> DenseKVCache:
        return DenseKVCache(spec, num_blocks, device)

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None, fmt: str = "dense") -> LinearWeight:
        """Only "dense" is known here; another `fmt` is a ValueError."""
        if fmt != DENSE:
            raise ValueError(f"The reference ops know the weight format 'dense', not {fmt!r}.")
        return OneDnnLinearWeight(weight, bias) if can_pack(weight) else DenseLinearWeight(weight, bias)

    def pack_quantized(
        self, raw: torch.Tensor, fmt: str, bias: torch.Tensor | None = None, order: torch.Tensor | None = None
    ) -> LinearWeight:
        """Always a ValueError: dequantise, and pack the dense matrix."""
        raise ValueError(f"The reference ops know the weight format 'dense', not {fmt!r}.")

    def linear_bytes(self, fmt: str, out_features: int, in_features: int, dtype: torch.dtype, has_bias: bool) -> int:
        assert fmt in self.weight_formats
        return (out_features * in_features + out_features * has_bias) * dtype.itemsize

    def linear(self, x: torch.Tensor, weight: LinearWeight, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """What torch's products have rounded to x's dtype, `out_dtype` does not bring back."""
        if isinstance(weight, OneDnnLinearWeight):
            return weight.multiply(x).to(out_dtype or x.dtype)
        assert isinstance(weight, DenseLinearWeight)
        return F.linear(x, weight.weight, weight.bias).to(out_dtype or x.dtype)

    def embedding(self, token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return table[token_ids]

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x_float = x.float()
        inverse_rms = torch.rsqrt(x_float.square().mean(dim=-1, keepdim=True) + eps)
        return (x_float * inverse_rms * weight.float()).to(x.dtype)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        residual += x
        return self.rms_norm(residual, weight, eps).to(x.dtype)

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
        assert isinstance(kv_cache, DenseKVCache)
        num_kv_heads, head_dim = kv_cache.k.shape[2:]
        heads = qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim)
        q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if q_norm is not None:
            q = self.rms_norm(q, q_norm, eps)
        if k_norm is not None:
            k = self.rms_norm(k, k_norm, eps)
        cos, sin = cos_sin[meta.positions, None, :].chunk(2, dim=-1)  # [t, 1, d/2] each
        kv_cache.write(rotate(k.float(), cos, sin), v, meta.slot_mapping)
        return rotate(q, cos, sin)

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
        assert isinstance(kv_cache, DenseKVCache)
        num_kv_heads, head_dim = kv_cache.k.shape[2:]
        out = torch.empty_like(q)
        for group in group_queries(meta, sliding_window):
            key_positions = torch.arange(group.first_key, group.first_key + group.num_keys, device=q.device)
            k, v = gather_context(kv_cache, meta, group.seqs, key_positions)
            query_positions = meta.positions[group.rows][:, :, None]  # [b, n, 1]
            visible = key_positions <= query_positions
            if sliding_window:
                visible &= key_positions > query_positions - sliding_window
            b, n = group.rows.shape
            queries = q[group.rows].view(b, n, num_kv_heads, -1, head_dim).transpose(1, 2)  # [b, k, n, g, d]
            group_size = queries.shape[3]
            row_sinks = None if sinks is None else sinks.view(num_kv_heads, group_size).repeat(1, n)  # [k, m]
            attended = attend(
                queries.flatten(2, 3).float() * scale,
                k,
                v,
                visible.repeat_interleave(group_size, dim=1),
                soft_cap,
                sinks=row_sinks,
            )
            attended = attended.view(b, num_kv_heads, n, group_size, head_dim).transpose(1, 2)
            out[group.rows] = attended.flatten(2, 3).to(q.dtype)
        return out.flatten(1)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def gelu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up

    def gelu_erf_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate) * up

    def activate(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        return x.copy_(_ACTIVATIONS[activation](x.float()))

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(x.dtype)

    def add_layer_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        residual += x
        return self.layer_norm(residual, weight, bias, eps).to(x.dtype)

    def post_layer_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        residual += x
        residual.copy_(self.layer_norm(residual, weight, bias, eps))
        return residual.to(x.dtype)

    def rotary_packed(self, qkv: torch.Tensor, cos_sin: torch.Tensor, sequences: PackedSequences, d: int) -> None:
        cos, sin = cos_sin[sequences.positions, None, :].chunk(2, dim=-1)
        q_and_k = qkv.view(len(qkv), 3, -1, d)[:, :2].flatten(1, 2)
        qkv.view(len(qkv), 3, -1, d)[:, :2] = rotate(q_and_k, cos, sin).view(len(qkv), 2, -1, d)

    def packed_attention(
        self,
        qkv: torch.Tensor,
        sequences: PackedSequences,
        head_dim: int,
        scale: float,
        window: int = 0,
        relative_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        heads = qkv.view(len(qkv), 3, -1, head_dim)
        return packed_attention(heads, sequences, scale, window, relative_bias).flatten(1)

    def segment_sum(self, x: torch.Tensor, weights: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        lengths = cu_seqlens.diff().long()
        return torch.segment_reduce(x.float() * weights[:, None], "sum", lengths=lengths, axis=0)

    def fuse_layers(self, layers: Sequence[LayerParameters], final_norm: torch.Tensor) -> LayerStack | None:
        return None

    def sample(self, logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
        return sample(logits, sampling)

    def token_logprobs(self, logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> TokenLogprobTensors:
        return token_logprobs(logits, token_ids, num_top)
