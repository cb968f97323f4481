"""Attention of encoders: packed sequences against torch's own, one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmserve.kernels.triton.packed_attention import packed_attention
from tests.kernels.cpu_cases import relative_error
from tests.kernels.triton.triton_cases import DEVICE, DTYPES, tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "window"), [(3, 3, 32, 0), (4, 2, 48, 0), (2, 1, 64, 9)])
def test_each_sequence_sees_itself(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, window: int) -> None:
    torch.manual_seed(0)
    lengths = [1, 40, 17, 65]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    q = torch.randn(sum(lengths), heads, head_dim).to(DEVICE, dtype)
    k, v = (torch.randn(sum(lengths), kv_heads, head_dim).to(DEVICE, dtype) for _ in range(2))
    starts = torch.tensor([0, *ends], dtype=torch.int32, device=DEVICE)
    found = packed_attention(q, k, v, starts, 0.2, window)
    for length, end in zip(lengths, ends, strict=True):
        rows = slice(end - length, end)
        at = torch.arange(length, device=DEVICE)
        mask = (at[:, None] - at[None, :]).abs() <= (window or length)
        group = heads // kv_heads
        one = [x[rows].float().transpose(0, 1) for x in (q, k, v)]
        keys, values = one[1].repeat_interleave(group, 0), one[2].repeat_interleave(group, 0)
        expected = F.scaled_dot_product_attention(one[0], keys, values, attn_mask=mask, scale=0.2)
        assert relative_error(found[rows], expected.transpose(0, 1).flatten(1)) < tolerance(dtype)
        alone = packed_attention(
            *(x[rows].clone() for x in (q, k, v)),
            torch.tensor([0, length], dtype=torch.int32, device=DEVICE),
            0.2,
            window,
        )
        assert torch.equal(alone, found[rows])
