"""The ops of encoders against plain torch: packed attention, layer norms, activations, pooling."""

from __future__ import annotations

import pytest
import torch

from llmserve.kernels.ops import Activation, PackedSequences
from tests.kernels.cpu_cases import relative_error
from tests.kernels.triton.triton_cases import DEVICE, DTYPES, REFERENCE, tolerance, triton_ops

OPS = triton_ops()
LENGTHS = [1, 40, 17, 65]
ACTIVATIONS: list[Activation] = ["gelu", "gelu_tanh", "silu", "relu", "tanh", "sigmoid"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def packed(lengths: list[int]) -> PackedSequences:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    positions = torch.cat([torch.arange(length) for length in lengths])
    return PackedSequences(
        torch.tensor([0, *ends], dtype=torch.int32, device=DEVICE), positions.to(DEVICE), max(lengths)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dim", "window", "biased"), [(3, 32, 0, False), (2, 48, 0, True), (1, 64, 9, False)]
)
def test_packed_attention(dtype: torch.dtype, heads: int, head_dim: int, window: int, biased: bool) -> None:
    sequences = packed(LENGTHS)
    qkv = torch.randn(sum(LENGTHS), 3 * heads * head_dim).to(DEVICE, dtype)
    bias = torch.randn(heads, 2 * max(LENGTHS) - 1).to(DEVICE) if biased else None
    found = OPS.packed_attention(qkv, sequences, head_dim, 0.2, window, bias)
    expected = REFERENCE.packed_attention(qkv, sequences, head_dim, 0.2, window, bias)
    assert relative_error(found, expected) < tolerance(dtype)
    first = sum(LENGTHS[:2])
    rows = slice(first, first + LENGTHS[2])  # a sequence alone gives the same bits
    alone = OPS.packed_attention(qkv[rows].clone(), packed(LENGTHS[2:3]), head_dim, 0.2, window, bias)
    assert torch.equal(alone, found[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 32), (5, 80)])
def test_rotary_packed(dtype: torch.dtype, heads: int, head_dim: int) -> None:
    sequences = packed(LENGTHS)
    mine = torch.randn(sum(LENGTHS), 3 * heads * head_dim).to(DEVICE, dtype)
    theirs, before = mine.clone(), mine.clone()
    cos_sin = torch.randn(max(LENGTHS), head_dim).to(DEVICE)
    OPS.rotary_packed(mine, cos_sin, sequences, head_dim)
    REFERENCE.rotary_packed(theirs, cos_sin, sequences, head_dim)
    assert relative_error(mine, theirs) < tolerance(dtype)
    values = slice(2 * heads * head_dim, None)
    assert torch.equal(mine[:, values], before[:, values])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 768), (2, 577), (0, 64)])
def test_layer_norms(dtype: torch.dtype, rows: int, width: int) -> None:
    x, weight, bias = torch.randn(rows, width).to(DEVICE, dtype), torch.randn(width).to(DEVICE), torch.ones(width)
    residual = torch.randn(rows, width).to(DEVICE)
    for offset in (None, bias.to(DEVICE)):
        pairs = [(OPS.layer_norm(x, weight, offset, 1e-5), REFERENCE.layer_norm(x, weight, offset, 1e-5))]
        for name in ("add_layer_norm", "post_layer_norm"):
            mine, theirs = residual.clone(), residual.clone()
            pairs.append(
                (
                    getattr(OPS, name)(x, mine, weight, offset, 1e-5),
                    getattr(REFERENCE, name)(x, theirs, weight, offset, 1e-5),
                )
            )
            pairs.append((mine, theirs))
        for actual, expected in pairs:
            assert actual.shape == expected.shape
            assert actual.dtype == expected.dtype
            if rows and width > 1:
                assert relative_error(actual, expected) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(dtype: torch.dtype, activation: Activation) -> None:
    x = (torch.randn(3, 700) * 3).to(DEVICE, dtype)
    x[0, :4] = torch.tensor([-60.0, 60.0, 0.0, float("nan")])
    mine, theirs = x.clone(), x.clone()
    assert OPS.activate(mine, activation) is mine
    REFERENCE.activate(theirs, activation)
    assert torch.equal(mine.isnan(), theirs.isnan())
    assert relative_error(mine.nan_to_num(), theirs.nan_to_num()) < tolerance(dtype)
    gate_up = torch.randn(3, 700).to(DEVICE, dtype)
    assert relative_error(OPS.gelu_erf_and_mul(gate_up), REFERENCE.gelu_erf_and_mul(gate_up)) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_segment_sum(dtype: torch.dtype) -> None:
    x, weights = torch.randn(sum(LENGTHS), 300).to(DEVICE, dtype), torch.rand(sum(LENGTHS)).to(DEVICE)
    starts = packed(LENGTHS).cu_seqlens
    found = OPS.segment_sum(x, weights, starts)
    assert found.dtype is torch.float32
    assert relative_error(found, REFERENCE.segment_sum(x, weights, starts)) < 2e-5
    alone = OPS.segment_sum(x[1:41].clone(), weights[1:41].clone(), starts[:2] * 40)
    assert torch.equal(alone[0], found[1])
