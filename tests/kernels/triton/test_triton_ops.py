"""Norms, gates, embedding, block copies, rotary embedding: against plain torch, over types, sizes and extremes."""

from __future__ import annotations

import pytest
import torch

from llmserve.kernels.ops import FP8_KV, KVCacheSpec
from tests.kernels.cpu_cases import PagedBatch, relative_error, to_device
from tests.kernels.triton.triton_cases import DEVICE, DTYPES, REFERENCE, tolerance, triton_ops

OPS = triton_ops()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 576), (5, 577), (2, 2048), (0, 64)])
def test_norms_and_gates(dtype: torch.dtype, rows: int, width: int) -> None:
    x, weight = torch.randn(rows, width).to(DEVICE, dtype), torch.randn(width).to(DEVICE)
    residual = torch.randn(rows, width).to(DEVICE)
    mine, theirs = residual.clone(), residual.clone()
    gate_up = (torch.randn(rows, 2 * width) * 4).to(DEVICE, dtype)
    pairs = [
        (OPS.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5)),
        (OPS.add_rms_norm(x, mine, weight, 1e-5), REFERENCE.add_rms_norm(x, theirs, weight, 1e-5)),
        (mine, theirs),
        (OPS.silu_and_mul(gate_up), REFERENCE.silu_and_mul(gate_up)),
        (OPS.gelu_and_mul(gate_up), REFERENCE.gelu_and_mul(gate_up)),
    ]
    for actual, expected in pairs:
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        if rows:
            assert relative_error(actual, expected) < tolerance(dtype)


def test_extreme_values_stay_in_their_row() -> None:
    x = torch.randn(6, 96)
    x[1, 5], x[2, 17], x[3], x[4] = float("nan"), float("inf"), 0.0, 1e-40
    result = OPS.rms_norm(x.to(DEVICE), torch.randn(96).to(DEVICE), 1e-5)
    assert result[[0, 3, 4, 5]].isfinite().all()
    assert not result[1].isfinite().any()
    assert result[2, 17].isnan()
    gated = OPS.silu_and_mul(torch.tensor([[-1e4, 1e4, float("nan"), 1.0, 1.0, 1.0]], device=DEVICE))[0]
    assert gated[0].abs() < 1e-30
    assert gated[1] == 1e4
    assert gated[2].isnan()


def test_rows_do_not_depend_on_the_batch() -> None:
    x, weight = torch.randn(7, 1154).to(DEVICE, torch.bfloat16), torch.randn(1154).to(DEVICE)
    whole = [OPS.rms_norm(x, weight, 1e-5), OPS.silu_and_mul(x), OPS.gelu_and_mul(x)]
    for row in (0, 3, 6):
        one = x[row : row + 1].clone()
        alone = [OPS.rms_norm(one, weight, 1e-5), OPS.silu_and_mul(one), OPS.gelu_and_mul(one)]
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(whole, alone, strict=True))


def test_embedding() -> None:
    table = torch.randn(50, 24).to(DEVICE, torch.bfloat16)
    ids = torch.tensor([0, 49, 7, 7], device=DEVICE)
    assert torch.equal(OPS.embedding(ids, table), table[ids])
    wrong = OPS.embedding(torch.tensor([3, -1, 50], device=DEVICE), table)
    assert torch.equal(wrong[0], table[3])
    assert wrong[1:].isnan().all()


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, FP8_KV])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 80), (16, 1, 16), (2, 1, 256)])
def test_rotary_writes_what_it_should_where_it_should(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, with_norm: bool
) -> None:
    spec = KVCacheSpec(kv_heads, head_dim, 16, dtype)
    compute = torch.bfloat16 if dtype == FP8_KV else dtype
    batch = PagedBatch.random(KVCacheSpec(kv_heads, head_dim, 16, compute), heads, [3, 1, 21])
    norm = (torch.rand(head_dim) + 0.5).to(DEVICE) if with_norm else None
    meta, rows = batch.metadata([(0, 1, 3), (1, 0, 1), (2, 15, 18)])
    meta.slot_mapping[-1] = -1  # a row that only fills up
    meta, qkv, cos_sin = to_device(meta, DEVICE), batch.qkv[rows].to(DEVICE), batch.cos_sin.to(DEVICE)
    cache = OPS.allocate_kv_cache(spec, batch.num_blocks, DEVICE)
    cache.data.view(torch.uint8).fill_(7)
    untouched = cache.data.view(torch.uint8).clone()
    q = OPS.rotary_and_cache(qkv, cos_sin, cache, meta, heads, norm, norm, 1e-6)

    expected_cache = REFERENCE.allocate_kv_cache(
        KVCacheSpec(kv_heads, head_dim, 16, torch.float32), batch.num_blocks, DEVICE
    )
    expected_q = REFERENCE.rotary_and_cache(qkv.float(), cos_sin, expected_cache, meta, heads, norm, norm, 1e-6)
    tol = tolerance(compute)
    assert relative_error(q, expected_q) < tol
    kept = meta.slot_mapping[:-1]
    block, offset = kept // 16, kept % 16
    found = cache.data.float().permute(1, 0, 3, 2, 4)[:, block, offset]  # [2, t, k, d]
    if cache.scales is not None:
        found = found * cache.scales.permute(1, 0, 3, 2)[:, block, offset, :, None]
        tol = 0.04  # half of e4m3's last bit, against the largest value
    expected = torch.stack((expected_cache.k.flatten(0, 1)[kept], expected_cache.v.flatten(0, 1)[kept]))
    assert relative_error(found, expected) < tol
    written = torch.zeros_like(untouched, dtype=torch.bool).permute(0, 3, 1, 2, 4)
    written[block, offset] = True
    is_same = (cache.data.view(torch.uint8) == untouched).permute(0, 3, 1, 2, 4)
    assert is_same[~written].all()


def test_unusable_shapes_are_refused_with_the_reason() -> None:
    for spec, reason in (
        (KVCacheSpec(1, 40, 16, torch.float32), "head_dim"),
        (KVCacheSpec(1, 64, 8, torch.float32), "block_size"),
        (KVCacheSpec(1, 64, 16, torch.float64), "float64"),
    ):
        with pytest.raises(ValueError, match=reason):
            OPS.allocate_kv_cache(spec, 4, DEVICE)
    with pytest.raises(ValueError, match="int3"):
        OPS.pack_linear(torch.zeros(4, 4), None, "int3")
