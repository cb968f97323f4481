"""Rows of the embedding table, gathered. Knows no tokenizer.

token_ids int64 [t], table [vocab, n] -> [t, n]: n elements read and written a token, no arithmetic.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def embedding_kernel(ids_ptr, table_ptr, out_ptr, vocab_size, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One program a token and `BLOCK` of its row."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + token)
    known = (row >= 0) & (row < vocab_size)
    inside = column < SIZE
    values = tl.load(table_ptr + row * SIZE + column, mask=inside & known, other=float("nan"))
    tl.store(out_ptr + token * SIZE + column, values, mask=inside)


def embedding(token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """token_ids int64 [t], table [vocab, n] -> [t, n]. An id outside the table gives a row of NaN: to raise an error
    the host would have to wait for the device."""
    assert table.is_contiguous()
    num_tokens, (vocab_size, size) = token_ids.shape[0], table.shape
    out = torch.empty((num_tokens, size), dtype=table.dtype, device=table.device)
    if num_tokens:
        grid = (num_tokens, triton.cdiv(size, _BLOCK))
        embedding_kernel[grid](token_ids, table, out, vocab_size, SIZE=size, BLOCK=_BLOCK, num_warps=4)
    return out
