"""Every op in plain torch: what each one means, the oracle of the fast kernels, and what runs where there are none.

Any device, any float type. On a CPU, with float32 or bfloat16 weights, every op is batch-invariant to the bit. What
makes it so: products by oneDNN-packed weights (`cpu_linear`), and an attention whose sums run over fixed tiles of keys.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llmserve.kernels.cpu_linear import OneDnnLinearWeight, can_pack
from llmserve.kernels.memory import cache_zeros
from llmserve.kernels.ops import AttentionMetadata, KVCache, KVCacheSpec, LinearWeight, SamplingTensors
from llmserve.kernels.reference_sampling import sample
from llmserve.kernels.weight_formats import DENSE

_KEY_TILE = 128  # keys are summed tile by tile, and tiles stand at fixed positions of the sequence
_QUERY_TILE = 128  # query rows of one prompt computed at once: bounds the score matrix
_MIN_MATMUL_ROWS = 4  # below this a matrix library may take a vector kernel that sums in another order


class DenseLinearWeight:
    """A [out, in] matrix as it came, for `F.linear`."""

    format = "dense"

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)
        self.weight = weight
        self.bias = bias


class DenseKVCache:
    """One layer's keys and values, [num_blocks, block_size, kv_heads, d] each."""

    def __init__(self, spec: KVCacheSpec, num_blocks: int, device: torch.device) -> None:
        shape = (num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        self.k = cache_zeros(shape, spec.dtype, device)
        self.v = cache_zeros(shape, spec.dtype, device)
        self.nbytes = self.k.nbytes + self.v.nbytes


@dataclass(frozen=True, slots=True)
class _QueryGroup:
    """Queries computed together: `n` rows of each of `b` sequences against keys first_key .. first_key + num_keys."""

    rows: torch.Tensor  # int64 [b, n]
    seqs: torch.Tensor  # int64 [b]
    first_key: int  # a multiple of _KEY_TILE
    num_keys: int  # a multiple of _KEY_TILE


class ReferenceOps:
    """Implements `Ops`. Has no state."""

    name = "reference"
    weight_formats: tuple[str, ...] = (DENSE,)

    def kv_cache_bytes_per_block(self, spec: KVCacheSpec) -> int:
        return 2 * spec.block_size * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize

    def allocate_kv_cache(self, spec: KVCacheSpec, num_blocks: int, device: torch.device) -> DenseKVCache:
        return DenseKVCache(spec, num_blocks, device)

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None, fmt: str = "dense") -> LinearWeight:
        """Only "dense" is known here; another `fmt` is a ValueError."""
        if fmt != DENSE:
            raise ValueError(f"The reference ops know the weight format 'dense', not {fmt!r}.")
        return OneDnnLinearWeight(weight, bias) if can_pack(weight) else DenseLinearWeight(weight, bias)

    def pack_quantized(self, raw: torch.Tensor, ggml_type: str, bias: torch.Tensor | None = None) -> LinearWeight:
        """Always a ValueError: dequantise, and pack the dense matrix."""
        raise ValueError(f"The reference ops know the weight format 'dense', not {ggml_type!r}.")

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
        kv_cache.k.flatten(0, 1)[meta.slot_mapping] = _rotate(k, cos, sin).to(kv_cache.k.dtype)
        kv_cache.v.flatten(0, 1)[meta.slot_mapping] = v.to(kv_cache.v.dtype)
        return _rotate(q, cos, sin)

    def paged_attention(
        self,
        q: torch.Tensor,
        kv_cache: KVCache,
        meta: AttentionMetadata,
        scale: float,
        sliding_window: int = 0,
        soft_cap: float = 0.0,
    ) -> torch.Tensor:
        assert isinstance(kv_cache, DenseKVCache)
        num_kv_heads, head_dim = kv_cache.k.shape[2:]
        out = torch.empty_like(q)
        for group in _group_queries(meta, sliding_window):
            key_positions = torch.arange(group.first_key, group.first_key + group.num_keys, device=q.device)
            k, v = _gather_context(kv_cache, meta, group.seqs, key_positions)
            query_positions = meta.positions[group.rows][:, :, None]  # [b, n, 1]
            visible = key_positions <= query_positions
            if sliding_window:
                visible &= key_positions > query_positions - sliding_window
            b, n = group.rows.shape
            queries = q[group.rows].view(b, n, num_kv_heads, -1, head_dim).transpose(1, 2)  # [b, k, n, g, d]
            group_size = queries.shape[3]
            attended = _attend(
                queries.flatten(2, 3).float() * scale, k, v, visible.repeat_interleave(group_size, dim=1), soft_cap
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

    def sample(self, logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
        return sample(logits, sampling)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [t, n, d] by cos, sin float32 [t, 1, d/2]; element i pairs with i + d/2."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _group_queries(meta: AttentionMetadata, sliding_window: int) -> list[_QueryGroup]:
    """Cuts a ragged batch into rectangles: decodes of similar context together, prompts each in tiles of rows.

    How it is cut changes no result: each row's sums run over the same tiles of keys in the same order.
    """
    starts, seq_lens, device = meta.query_start_loc.tolist(), meta.seq_lens.tolist(), meta.positions.device
    groups: list[_QueryGroup] = []
    decodes: defaultdict[int, list[int]] = defaultdict(list)  # context in tiles, rounded up to a power of two -> seqs
    for seq, seq_len in enumerate(seq_lens):
        first_row, end_row = starts[seq], starts[seq + 1]
        if end_row - first_row == 1:
            decodes[1 << (_num_tiles(seq_len) - 1).bit_length()].append(seq)
            continue
        for row in range(first_row, end_row, _QUERY_TILE):
            rows = torch.arange(row, min(row + _QUERY_TILE, end_row), device=device)
            first_position = seq_len - (end_row - row)
            last_key = first_position + len(rows)
            first_key = max(0, first_position - sliding_window + 1) // _KEY_TILE * _KEY_TILE if sliding_window else 0
            num_keys = _num_tiles(last_key) * _KEY_TILE - first_key
            groups.append(_QueryGroup(rows[None], torch.tensor([seq], device=device), first_key, num_keys))
    for seqs in decodes.values():
        num_keys = _num_tiles(max(seq_lens[seq] for seq in seqs)) * _KEY_TILE
        shortest = min(seq_lens[seq] for seq in seqs)
        first_key = max(0, shortest - sliding_window) // _KEY_TILE * _KEY_TILE if sliding_window else 0
        rows = torch.tensor([[starts[seq]] for seq in seqs], device=device)
        groups.append(_QueryGroup(rows, torch.tensor(seqs, device=device), first_key, num_keys - first_key))
    return groups


def _num_tiles(num_keys: int) -> int:
    return -(-num_keys // _KEY_TILE)


def _gather_context(
    cache: DenseKVCache, meta: AttentionMetadata, seqs: torch.Tensor, key_positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values float32 [b, k, l, d] of sequences [b] at positions [l].

    Values beyond a sequence's end are zeros: their weight is zero too, but what an earlier owner left in a block must
    not leak in as 0 * NaN. Keys there need no care: scores that are not visible are replaced.
    """
    block_size = cache.k.shape[1]
    beyond = key_positions >= meta.seq_lens[seqs][:, None]  # [b, l]
    columns = (key_positions // block_size).clamp(max=meta.block_table.shape[1] - 1)
    slots = meta.block_table[seqs][:, columns].long() * block_size + key_positions % block_size
    slots = slots.masked_fill(beyond, 0)
    k = cache.k.flatten(0, 1)[slots].float()
    v = cache.v.flatten(0, 1)[slots].masked_fill_(beyond[:, :, None, None], 0.0).float()
    return k.transpose(1, 2), v.transpose(1, 2)


def _attend(
    queries: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, soft_cap: float
) -> torch.Tensor:
    """Softmax attention in float32: queries [b, k, m, d], k and v [b, k, l, d], visible bool [b, m, l]
    -> [b, k, m, d]. l is a multiple of _KEY_TILE, and each row sees a key."""
    b, num_kv_heads, num_rows, head_dim = queries.shape
    padding = max(0, _MIN_MATMUL_ROWS - num_rows)
    queries = F.pad(queries, (0, 0, 0, padding))
    visible = F.pad(visible, (0, 0, 0, padding), value=True)
    scores = queries @ k.transpose(-1, -2)  # [b, k, m, l]
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill_(~visible[:, None], -torch.inf)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp_()
    tiles = weights.view(b, num_kv_heads, num_rows + padding, -1, _KEY_TILE).transpose(2, 3)  # [b, k, tiles, m, tile]
    partial_outputs = tiles @ v.reshape(b, num_kv_heads, -1, _KEY_TILE, head_dim)  # [b, k, tiles, m, d]
    partial_sums = tiles.sum(dim=-1, keepdim=True)
    output, total = partial_outputs[:, :, 0], partial_sums[:, :, 0]
    for tile in range(1, tiles.shape[2]):  # left to right, so that tiles that are all zero change nothing
        output = output + partial_outputs[:, :, tile]
        total = total + partial_sums[:, :, tile]
    return (output / total)[:, :, :num_rows]
