"""Attention within packed sequences, in both directions: encoders without padding. Knows no cache.

q [t, h, d], k and v [t, kv_heads, d], sequences one behind the other. A program computes `ROWS` queries of one head of
one sequence against all its keys: 4 * d operations a query and key, and the keys and values of a head are read once for
each tile of queries. Tiles stand at fixed places of a sequence, so its neighbours in the batch do not show.
"""

import torch
import triton
import triton.language as tl

from llmserve.kernels.triton.attention import LOG2_E, find_sequence, nothing_yet

_ROWS, _KEYS = 64, 32


@triton.jit(do_not_specialize=["num_seqs"])
def packed_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, starts_ptr, num_seqs, scale_log2, NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of queries, heads."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    seq = find_sequence(starts_ptr, tile, num_seqs, ROWS)
    start = tl.load(starts_ptr + seq)
    length = tl.load(starts_ptr + seq + 1) - start
    first_query = (tile - start // ROWS - seq) * ROWS
    if first_query >= length:
        return
    query = first_query + tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    real = (dim < HEAD_DIM)[None, :]
    at = ((start + query).to(tl.int64) * NUM_HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(q_ptr + at, mask=(query < length)[:, None] & real, other=0.0)
    first_key = 0
    end_key = length
    if WINDOW:
        first_key = tl.maximum(first_query - WINDOW, 0) // KEYS * KEYS
        end_key = tl.minimum(length, first_query + ROWS + WINDOW)
    out, total, largest = nothing_yet(ROWS, DIM)
    for begin in tl.range(first_key, end_key, KEYS, num_stages=STAGES):
        key = begin + tl.arange(0, KEYS)
        row = (start + key).to(tl.int64) * NUM_KV_HEADS + kv_head
        inside = (key < length)[:, None] & real
        k = tl.load(k_ptr + row[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0)
        v = tl.load(v_ptr + row[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        visible = (key < length)[None, :] & (query < length)[:, None]
        if WINDOW:
            distance = query[:, None] - key[None, :]
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
    tl.store(out_ptr + at, out, mask=(query < length)[:, None] & real)


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_start_loc: torch.Tensor, scale: float, window: int = 0
) -> torch.Tensor:
    """q [t, h, d], k and v [t, kv_heads, d], query_start_loc int32 [num_seqs + 1] -> [t, h * d]. `window` w: a query
    sees keys at most w positions before or behind it; 0: all of its sequence."""
    assert q.is_contiguous()
    assert k.is_contiguous()
    assert v.is_contiguous()
    num_tokens, num_heads, head_dim = q.shape
    num_seqs = query_start_loc.shape[0] - 1
    out = torch.empty_like(q)
    if num_tokens:
        is_wide = q.element_size() == 4
        rows, keys = (16, 16) if is_wide else (_ROWS, _KEYS)
        packed_attention_kernel[(num_tokens // rows + num_seqs, num_heads)](
            q,
            k,
            v,
            out,
            query_start_loc,
            num_seqs,
            LOG2_E * scale,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=k.shape[1],
            HEAD_DIM=head_dim,
            DIM=max(triton.next_power_of_2(head_dim), 16),
            WINDOW=window,
            ROWS=rows,
            KEYS=keys,
            STAGES=2 if is_wide else 3,
            num_warps=4,
        )
    return out.flatten(1)
