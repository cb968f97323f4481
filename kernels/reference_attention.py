"""Attention in plain torch: how a ragged batch is cut into rectangles, and how a row's sums run over tiles of keys.

What makes it batch-invariant on a CPU: every sum runs over tiles of keys at fixed positions, from left to right.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from llmserve.kernels.memory import cache_zeros
from llmserve.kernels.ops import FP8_KV, FP8_LARGEST, AttentionMetadata, KVCacheSpec, PackedSequences

_KEY_TILE = 128  # keys are summed tile by tile, and tiles stand at fixed positions of the sequence
_QUERY_TILE = 128  # query rows of one prompt computed at once: bounds the score matrix
_MIN_MATMUL_ROWS = 4  # below this a matrix library may take a vector kernel that sums in another order


class DenseKVCache:
    """One layer's keys and values, [num_blocks, block_size, kv_heads, d] each, and their scales if they are in fp8."""

    def __init__(self, spec: KVCacheSpec, num_blocks: int, device: torch.device) -> None:
        shape = (num_blocks, spec.block_size, spec.num_kv_heads)
        self.k = cache_zeros((*shape, spec.head_dim), spec.dtype, device)
        self.v = cache_zeros((*shape, spec.head_dim), spec.dtype, device)
        self.nbytes = self.k.nbytes + self.v.nbytes
        self.k_scale = self.v_scale = None
        if spec.dtype == FP8_KV:
            self.k_scale = torch.ones(shape, dtype=torch.float32, device=device)
            self.v_scale = torch.ones(shape, dtype=torch.float32, device=device)
            self.nbytes += self.k_scale.nbytes + self.v_scale.nbytes

    def parts(self) -> tuple[torch.Tensor, ...]:
        return tuple(part for part in (self.k, self.v, self.k_scale, self.v_scale) if part is not None)

    def write(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """k, v [t, kv_heads, d] to slots int64 [t]."""
        for values, cache, scales in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            if scales is None:
                cache.flatten(0, 1)[slots] = values.to(cache.dtype)
                continue
            largest = values.float().abs().amax(dim=-1)
            scale = torch.where(largest > 0, largest / FP8_LARGEST, 1.0)
            scales.flatten(0, 1)[slots] = scale
            rounded = (values.float() / scale[:, :, None]).to(FP8_KV)
            cache.view(torch.uint8).flatten(0, 1)[slots] = rounded.view(torch.uint8)

    def read(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v float32 [..., kv_heads, d] of slots int64 [...]."""
        found = []
        for cache, scales in ((self.k, self.k_scale), (self.v, self.v_scale)):
            if scales is None:
                found.append(cache.flatten(0, 1)[slots].float())
            else:
                values = cache.view(torch.uint8).flatten(0, 1)[slots].view(FP8_KV).float()
                found.append(values * scales.flatten(0, 1)[slots][..., None])
        return found[0], found[1]


def head_bytes(spec: KVCacheSpec) -> int:
    """A token's key or value of one head, and its scale if there is one."""
    return spec.head_dim * spec.dtype.itemsize + (4 if spec.dtype == FP8_KV else 0)


@dataclass(frozen=True, slots=True)
class QueryGroup:
    """Queries computed together: `n` rows of each of `b` sequences against keys first_key .. first_key + num_keys."""

    rows: torch.Tensor  # int64 [b, n]
    seqs: torch.Tensor  # int64 [b]
    first_key: int  # a multiple of _KEY_TILE
    num_keys: int  # a multiple of _KEY_TILE


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [t, n, d] by cos, sin float32 [t, 1, d/2]; element i pairs with i + d/2."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def group_queries(meta: AttentionMetadata, sliding_window: int) -> list[QueryGroup]:
    """Cuts a ragged batch into rectangles: decodes of similar context together, prompts each in tiles of rows.

    How it is cut changes no result: each row's sums run over the same tiles of keys in the same order.
    """
    starts, seq_lens, device = meta.query_start_loc.tolist(), meta.seq_lens.tolist(), meta.positions.device
    groups: list[QueryGroup] = []
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
            groups.append(QueryGroup(rows[None], torch.tensor([seq], device=device), first_key, num_keys))
    for seqs in decodes.values():
        num_keys = _num_tiles(max(seq_lens[seq] for seq in seqs)) * _KEY_TILE
        shortest = min(seq_lens[seq] for seq in seqs)
        first_key = max(0, shortest - sliding_window) // _KEY_TILE * _KEY_TILE if sliding_window else 0
        rows = torch.tensor([[starts[seq]] for seq in seqs], device=device)
        groups.append(QueryGroup(rows, torch.tensor(seqs, device=device), first_key, num_keys - first_key))
    return groups


def _num_tiles(num_keys: int) -> int:
    return -(-num_keys // _KEY_TILE)


def gather_context(
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
    k, v = cache.read(slots)
    return k.transpose(1, 2), v.masked_fill_(beyond[:, :, None, None], 0.0).transpose(1, 2)


def attend(
    queries: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    soft_cap: float = 0.0,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention in float32: queries [b, k, m, d], k and v [b, k, l, d], visible bool [b, m, l], bias [k, m, l],
    sinks [k, m], the scores of one more key that has no value -> [b, k, m, d]. l is a multiple of _KEY_TILE, and each
    row sees a key."""
    b, num_kv_heads, num_rows, head_dim = queries.shape
    padding = max(0, _MIN_MATMUL_ROWS - num_rows)
    queries = F.pad(queries, (0, 0, 0, padding))
    visible = F.pad(visible, (0, 0, 0, padding), value=True)
    bias = None if bias is None else F.pad(bias, (0, 0, 0, padding))
    scores = queries @ k.transpose(-1, -2)  # [b, k, m, l]
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill_(~visible[:, None], -torch.inf)
    highest = scores.amax(dim=-1, keepdim=True)
    weights = (scores - highest).exp_()
    tiles = weights.view(b, num_kv_heads, num_rows + padding, -1, _KEY_TILE).transpose(2, 3)  # [b, k, tiles, m, tile]
    partial_outputs = tiles @ v.reshape(b, num_kv_heads, -1, _KEY_TILE, head_dim)  # [b, k, tiles, m, d]
    partial_sums = tiles.sum(dim=-1, keepdim=True)
    output, total = partial_outputs[:, :, 0], partial_sums[:, :, 0]
    for tile in range(1, tiles.shape[2]):  # left to right, so that tiles that are all zero change nothing
        output = output + partial_outputs[:, :, tile]
        total = total + partial_sums[:, :, tile]
    output, total = output[:, :, :num_rows], total[:, :, :num_rows]
    if sinks is not None:  # a weight that may overflow: then the output is the zero it ought to be
        total = total + (sinks[:, :, None] - highest[:, :, :num_rows]).exp()
    return output / total


def packed_attention(
    qkv: torch.Tensor, sequences: PackedSequences, scale: float, window: int, relative_bias: torch.Tensor | None
) -> torch.Tensor:
    """qkv [t, 3, h, d] -> [t, h, d]: `Ops.packed_attention`, a sequence and a tile of its queries at a time."""
    out = torch.empty_like(qkv[:, 0])
    bounds = sequences.cu_seqlens.tolist()
    for start, stop in pairwise(bounds):
        n = stop - start
        num_keys = _num_tiles(n) * _KEY_TILE
        rows = F.pad(qkv[start:stop].float(), (0, 0, 0, 0, 0, 0, 0, num_keys - n)).permute(1, 2, 0, 3)  # [3, h, l, d]
        keys = torch.arange(num_keys, device=qkv.device)
        for first in range(0, n, _QUERY_TILE):
            queries = torch.arange(first, min(first + _QUERY_TILE, n), device=qkv.device)[:, None]
            visible = (keys < n) & ((keys - queries).abs() <= (window or n))
            bias = None
            if relative_bias is not None:
                middle = relative_bias.shape[1] // 2
                bias = relative_bias[:, (middle + keys - queries).clamp(0, 2 * middle)]  # [h, m, l]
            scaled = rows[0, None, :, queries[:, 0]] * scale
            attended = attend(scaled, rows[None, 1], rows[None, 2], visible[None], bias=bias)
            out[start + first : start + first + len(queries)] = attended[0].transpose(0, 1).to(out.dtype)
    return out
