"""Weighted sums of each sequence's rows: what pooling an encoder's output takes. Knows no models.

x [t, m], weights float32 [t] -> float32 [n, m]. A program takes one sequence and `BLOCK` columns and adds its rows in
order, `ROWS` at a time from the sequence's beginning: t * m elements read once, 2 operations each.
"""

import torch
import triton
import triton.language as tl

_ROWS, _BLOCK = 16, 128


@triton.jit
def segment_sum_kernel(
    x_ptr, weights_ptr, starts_ptr, out_ptr, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: sequences, blocks of columns."""
    seq = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(starts_ptr + seq + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.load(starts_ptr + seq), end, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * SIZE + column[None, :]
        x = tl.load(x_ptr + at, mask=(row < end)[:, None] & (column < SIZE)[None, :], other=0.0).to(tl.float32)
        weight = tl.load(weights_ptr + row, mask=row < end, other=0.0)
        total += tl.sum(x * weight[:, None], axis=0)
    tl.store(out_ptr + seq.to(tl.int64) * SIZE + column, total, mask=column < SIZE)


def segment_sum(x: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """x [t, m], weights float32 [t], starts int32 [n + 1] -> float32 [n, m]."""
    assert x.is_contiguous()
    num_seqs, size = starts.shape[0] - 1, x.shape[1]
    out = torch.empty((num_seqs, size), dtype=torch.float32, device=x.device)
    if num_seqs:
        grid = (num_seqs, triton.cdiv(size, _BLOCK))
        segment_sum_kernel[grid](x, weights, starts, out, SIZE=size, ROWS=_ROWS, BLOCK=_BLOCK, num_warps=4)
    return out
