"""Attention within packed sequences, in both directions: encoders without padding. Knows no cache.

qkv [t, 3 * h * d], sequences one behind the other. A program computes `ROWS` queries of one head of one sequence
against all its keys: 4 * d operations a query and key, and the keys and values of a head are read once for each tile of
queries. Tiles stand at fixed places of a sequence, so its neighbours in the batch do not show.
"""

import torch
import triton
import triton.language as tl

from llmserve.kernels.ops import PackedSequences
from llmserve.kernels.triton.attention import LOG2_E, find_sequence, nothing_yet

_ROWS, _KEYS = 64, 32


@triton.jit(do_not_specialize=["num_seqs", "reach"])
def packed_attention_kernel(
    qkv_ptr, bias_ptr, out_ptr, starts_ptr, num_seqs, scale_log2, reach, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr, WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of queries, heads. bias float32 [h, 2 * reach - 1]. WINDOW: keys that far on either side; 0: all."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    seq = find_sequence(starts_ptr, tile, num_seqs, ROWS)
    start = tl.load(starts_ptr + seq)
    length = tl.load(starts_ptr + seq + 1) - start
    first_query = (tile - start // ROWS - seq) * ROWS
    if first_query >= length:
        return
    query = first_query + tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    real = (dim < HEAD_DIM)[None, :]
    used = (query < length)[:, None]
    query_row = (start + query).to(tl.int64)[:, None]
    head_ptr = qkv_ptr + head * HEAD_DIM + dim[None, :]
    q = tl.load(head_ptr + query_row * (3 * HEADS * HEAD_DIM), mask=used & real, other=0.0)
    first_key = 0
    end_key = length
    if WINDOW:
        first_key = tl.maximum(first_query - WINDOW, 0) // KEYS * KEYS
        end_key = tl.minimum(length, first_query + ROWS + WINDOW)
    out, total, largest = nothing_yet(ROWS, DIM)
    for begin in tl.range(first_key, end_key, KEYS, num_stages=STAGES):
        key = begin + tl.arange(0, KEYS)
        key_ptr = head_ptr + (start + key).to(tl.int64)[:, None] * (3 * HEADS * HEAD_DIM)
        inside = (key < length)[:, None] & real
        k = tl.load(key_ptr + HEADS * HEAD_DIM, mask=inside, other=0.0)
        v = tl.load(key_ptr + 2 * HEADS * HEAD_DIM, mask=inside, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        distance = key[None, :] - query[:, None]
        visible = (key < length)[None, :] & used
        if HAS_BIAS:
            at_bias = head * (2 * reach - 1) + reach - 1 + distance
            score += tl.load(bias_ptr + at_bias, mask=visible, other=0.0) * 1.4426950408889634  # log2(e)
        if WINDOW:
            visible = visible & (distance <= WINDOW) & (distance >= -WINDOW)
        score = tl.where(visible, score, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(score, axis=1))
        safe = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        keep = tl.exp2(largest - safe)
        weight = tl.exp2(score - safe[:, None])
        total = total * keep + tl.sum(weight, axis=1)
        out = tl.dot(weight.to(q.dtype), v, out * keep[:, None], input_precision="ieee")
        largest = new_largest
    out = (out / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + query_row * (HEADS * HEAD_DIM) + head * HEAD_DIM + dim[None, :], out, mask=used & real)


@triton.jit
def rotary_packed_kernel(
    qkv_ptr, cos_sin_ptr, positions_ptr, HEADS: tl.constexpr, HALF: tl.constexpr, HEADS_PADDED: tl.constexpr,
    HALF_PADDED: tl.constexpr,
):  # fmt: skip
    """Grid: tokens. Queries and keys lie side by side: 2 * HEADS heads are rotated in place."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_PADDED)
    pair = tl.arange(0, HALF_PADDED)
    inside = (head < 2 * HEADS)[:, None] & (pair < HALF)[None, :]
    at = qkv_ptr + token * (6 * HEADS * HALF) + head[:, None] * (2 * HALF) + pair[None, :]
    angle_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * HALF) + pair
    cos = tl.load(angle_ptr, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(angle_ptr + HALF, mask=pair < HALF, other=0.0)[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (first * cos - second * sin).to(qkv_ptr.dtype.element_ty), mask=inside)
    tl.store(at + HALF, (second * cos + first * sin).to(qkv_ptr.dtype.element_ty), mask=inside)


def packed_attention(
    qkv: torch.Tensor,
    sequences: PackedSequences,
    head_dim: int,
    scale: float,
    window: int,
    relative_bias: torch.Tensor | None,
) -> torch.Tensor:
    """As `Ops.packed_attention`: qkv [t, 3 * h * d] -> [t, h * d]."""
    assert qkv.is_contiguous()
    num_tokens, heads = qkv.shape[0], qkv.shape[1] // (3 * head_dim)
    num_seqs = sequences.cu_seqlens.shape[0] - 1
    out = torch.empty((num_tokens, heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_tokens:
        assert relative_bias is None or relative_bias.is_contiguous()
        is_wide = qkv.element_size() == 4
        rows, keys = (16, 16) if is_wide else (_ROWS, _KEYS)
        packed_attention_kernel[(num_tokens // rows + num_seqs, heads)](
            qkv, qkv if relative_bias is None else relative_bias, out, sequences.cu_seqlens, num_seqs, LOG2_E * scale,
            1 if relative_bias is None else (relative_bias.shape[1] + 1) // 2, HEADS=heads, HEAD_DIM=head_dim,
            DIM=max(triton.next_power_of_2(head_dim), 16), WINDOW=window, HAS_BIAS=relative_bias is not None,
            ROWS=rows, KEYS=keys, STAGES=2 if is_wide else 3, num_warps=4,
        )  # fmt: skip
    return out


def rotary_packed(qkv: torch.Tensor, cos_sin: torch.Tensor, sequences: PackedSequences, head_dim: int) -> None:
    """As `Ops.rotary_packed`: q and k of qkv [t, 3 * h * d], in place."""
    assert qkv.is_contiguous()
    num_tokens, heads = qkv.shape[0], qkv.shape[1] // (3 * head_dim)
    if num_tokens:
        rotary_packed_kernel[(num_tokens,)](
            qkv, cos_sin, sequences.positions, HEADS=heads, HALF=head_dim // 2,
            HEADS_PADDED=triton.next_power_of_2(2 * heads), HALF_PADDED=triton.next_power_of_2(head_dim // 2),
            num_warps=4,
        )  # fmt: skip
