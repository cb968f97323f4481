"""Rotary embedding of queries and keys, their norms, and the write into the KV cache, in one pass over qkv.

qkv [t, (h + 2k) * d] is read once, q [t, h, d] and the blocks' slots are written once: 2 * (h + 2k) * d elements a
token, and cos_sin's row, shared by the token's heads; about 10 operations an element. A program takes one token and
several heads, enough that each thread moves 16 bytes at a time. Heads are independent: no sum crosses them.
"""

import torch
import triton
import triton.language as tl

from llmserve.kernels.ops import FP8_KV, FP8_LARGEST, AttentionMetadata
from llmserve.kernels.triton.kv_cache import TritonKVCache

_PAIRS_A_PROGRAM = 1024  # pairs of elements


@triton.jit
def rotary_kernel(
    qkv_ptr, cos_sin_ptr, q_norm_ptr, k_norm_ptr, q_ptr, cache_ptr, scales_ptr, positions_ptr, slots_ptr, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr, FP8_KV: tl.constexpr, FP8_LARGEST: tl.constexpr, HEADS: tl.constexpr,
    HALF_PADDED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF_PADDED)
    is_query = head < NUM_HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    is_head = head < NUM_HEADS + 2 * NUM_KV_HEADS
    inside = is_head[:, None] & (pair < HALF)[None, :]
    within_head = 2 * HALF * head[:, None] + pair[None, :]
    row_ptr = qkv_ptr + token * (2 * HALF * (NUM_HEADS + 2 * NUM_KV_HEADS))
    first = tl.load(row_ptr + within_head, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(row_ptr + within_head + HALF, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        square = tl.sum(first * first + second * second, axis=1)
        factor = tl.where(is_value, 1.0, tl.rsqrt(square / (2 * HALF) + eps))[:, None]
        weights_ptr = tl.where(is_query, q_norm_ptr, k_norm_ptr)[:, None] + pair[None, :]
        weighted = inside & (head < NUM_HEADS + NUM_KV_HEADS)[:, None]
        first = first * factor * tl.load(weights_ptr, mask=weighted, other=1.0)
        second = second * factor * tl.load(weights_ptr + HALF, mask=weighted, other=1.0)
    angle_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * HALF) + pair
    cos = tl.load(angle_ptr, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(angle_ptr + HALF, mask=pair < HALF, other=0.0)[None, :]
    rotated_first = tl.where(is_value[:, None], first, first * cos - second * sin)
    rotated_second = tl.where(is_value[:, None], second, second * cos + first * sin)

    to_query = inside & is_query[:, None]
    q_row_ptr = q_ptr + token * (2 * HALF * NUM_HEADS) + within_head
    tl.store(q_row_ptr, rotated_first.to(q_ptr.dtype.element_ty), mask=to_query)
    tl.store(q_row_ptr + HALF, rotated_second.to(q_ptr.dtype.element_ty), mask=to_query)

    slot = tl.load(slots_ptr + token)  # negative: a row that only fills the batch up
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    # keys of all heads, then values: qkv's order is the block's
    cache_row = (block * (2 * NUM_KV_HEADS) + head - NUM_HEADS) * BLOCK_SIZE + offset
    to_cache = is_head & (head >= NUM_HEADS) & (slot >= 0)
    if FP8_KV:
        largest = tl.max(tl.maximum(tl.abs(rotated_first), tl.abs(rotated_second)), axis=1)
        scale = tl.where(largest > 0, largest / FP8_LARGEST, 1.0)
        tl.store(scales_ptr + cache_row, scale, mask=to_cache)
        rotated_first = rotated_first / scale[:, None]
        rotated_second = rotated_second / scale[:, None]
    at = cache_ptr + cache_row[:, None] * (2 * HALF) + pair[None, :]
    written = inside & to_cache[:, None]
    tl.store(at, rotated_first.to(cache_ptr.dtype.element_ty), mask=written)
    tl.store(at + HALF, rotated_second.to(cache_ptr.dtype.element_ty), mask=written)


def rotary_and_cache(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    cache: TritonKVCache,
    meta: AttentionMetadata,
    num_heads: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """As `Ops.rotary_and_cache`: qkv [t, (h + 2k) * d] -> q [t, h, d]. A token whose slot is negative is not kept."""
    assert qkv.is_contiguous()
    assert (q_norm is None) == (k_norm is None)
    num_tokens, head_dim = qkv.shape[0], cache.spec.head_dim
    q = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_tokens:
        half_padded = triton.next_power_of_2(head_dim // 2)
        num_rows = num_heads + 2 * cache.spec.num_kv_heads
        heads = min(triton.next_power_of_2(num_rows), max(_PAIRS_A_PROGRAM // half_padded, 1))
        rotary_kernel[(num_tokens, triton.cdiv(num_rows, heads))](
            qkv, cos_sin, cos_sin if q_norm is None else q_norm, cos_sin if k_norm is None else k_norm, q, cache.data,
            cos_sin if cache.scales is None else cache.scales, meta.positions, meta.slot_mapping, eps,
            NUM_HEADS=num_heads, NUM_KV_HEADS=cache.spec.num_kv_heads, HALF=head_dim // 2,
            BLOCK_SIZE=cache.spec.block_size, HAS_NORM=q_norm is not None, FP8_KV=cache.spec.dtype == FP8_KV,
            FP8_LARGEST=FP8_LARGEST, HEADS=heads, HALF_PADDED=half_padded, num_warps=4,
        )  # fmt: skip
    return q
