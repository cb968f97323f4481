"""The ops of encoders: the C kernels of every instruction set against plain torch, and their bits in any batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from llmserve.kernels.ops import Activation, Ops, PackedSequences
from llmserve.kernels.reference import ReferenceOps
from tests.kernels.cpu_cases import DTYPES, ISA_NAMES, cpu_ops, needs_compiler, relative_error, tolerance

pytestmark = needs_compiler
REFERENCE = ReferenceOps()
ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pack(lengths: list[int]) -> PackedSequences:
    """The sequences of a batch."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedSequences(bounds, torch.cat([torch.arange(length) for length in lengths]), max(lengths))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISA_NAMES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 384), (3, 577), (60, 1030), (0, 64)])
def test_layer_norms(isa: str, dtype: torch.dtype, rows: int, width: int) -> None:
    ops, tol = cpu_ops(isa), tolerance(dtype)
    x, residual = (torch.randn(rows, width) * 3 + 5).to(dtype), torch.randn(rows, width)
    weight, bias = torch.randn(width), torch.randn(width)
    for offset in (bias, None):
        pairs = [tuple(each.layer_norm(x, weight, offset, 1e-5) for each in (ops, REFERENCE))]
        for name in ("add_layer_norm", "post_layer_norm"):
            residuals = (residual.clone(), residual.clone())
            outs = tuple(
                getattr(each, name)(x, stream, weight, offset, 1e-5)
                for each, stream in zip((ops, REFERENCE), residuals, strict=True)
            )
            pairs += [outs, residuals]
        for actual, expected in pairs:
            assert actual.shape == expected.shape
            assert actual.dtype == expected.dtype
            if rows and width > 1:
                assert relative_error(actual, expected) < tol


@pytest.mark.parametrize("isa", ISA_NAMES)
def test_layer_norm_of_a_large_mean(isa: str) -> None:
    """The variance is not a difference of squares: those of 1e4 would swallow it."""
    x = torch.randn(4, 384, dtype=torch.float64) + 1e4
    expected = F.layer_norm(x.float().double(), (384,), eps=1e-12)
    assert relative_error(cpu_ops(isa).layer_norm(x.float(), torch.ones(384), None, 1e-12), expected) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISA_NAMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(isa: str, dtype: torch.dtype, activation: Activation) -> None:
    ops = cpu_ops(isa)
    for rows, width in ((1, 1), (3, 77), (40, 1536)):
        x = (torch.randn(rows, width) * 4).to(dtype)
        x[0, 0] = -100.0
        expected = ACTIVATIONS[activation](x.double())
        for each in (ops, REFERENCE):
            actual = x.clone()
            assert each.activate(actual, activation) is actual
            absolute = (actual.double() - expected).abs() / expected.abs().clamp(min=1)
            assert absolute.max() < (1e-6 if dtype == torch.float32 else 4e-3)
    assert ops.activate(torch.tensor([[float("nan"), 1.0]]), activation)[0, 0].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISA_NAMES)
def test_gelu_erf_and_mul(isa: str, dtype: torch.dtype) -> None:
    x = torch.randn(33, 2 * 77).to(dtype) * 3
    assert relative_error(cpu_ops(isa).gelu_erf_and_mul(x), REFERENCE.gelu_erf_and_mul(x)) < tolerance(dtype)


def naive_attention(
    qkv: torch.Tensor, lengths: list[int], head_dim: int, scale: float, window: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """Sequence by sequence, by the formula, in float64."""
    heads = qkv.double().view(len(qkv), 3, -1, head_dim)
    parts = []
    for part in torch.split(heads, lengths):
        q, k, v = part.unbind(1)
        scores = torch.einsum("ihd,jhd->hij", q, k) * scale
        distance = torch.arange(len(part)) - torch.arange(len(part))[:, None]  # key - query
        if bias is not None:
            scores = scores + bias[:, bias.shape[1] // 2 + distance].double()
        if window:
            scores = scores.masked_fill(distance.abs() > window, -torch.inf)
        parts.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v))
    return torch.cat(parts).flatten(1)


CASES = [(0, False), (0, True), (8, False), (70, True)]
LENGTHS = [1, 17, 2, 300, 64, 65, 31, 128, 16, 49]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", [*ISA_NAMES, "reference"])
@pytest.mark.parametrize(("heads", "head_dim"), [(12, 32), (3, 64), (2, 48), (1, 128)])
def test_packed_attention(isa: str, dtype: torch.dtype, heads: int, head_dim: int) -> None:
    ops: Ops = REFERENCE if isa == "reference" else cpu_ops(isa)
    qkv = torch.randn(sum(LENGTHS), 3 * heads * head_dim).to(dtype)
    for window, biased in CASES:
        bias = torch.randn(heads, 2 * 310 - 1) if biased else None
        actual = ops.packed_attention(qkv, pack(LENGTHS), head_dim, head_dim**-0.5, window, bias)
        expected = naive_attention(qkv, LENGTHS, head_dim, head_dim**-0.5, window, bias)
        assert actual.shape == expected.shape
        assert relative_error(actual, expected) < tolerance(dtype), (window, biased)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", [*ISA_NAMES, "reference"])
@pytest.mark.parametrize(("window", "biased"), CASES)
def test_a_sequence_attends_to_the_same_bits_in_any_batch(
    isa: str, dtype: torch.dtype, window: int, biased: bool
) -> None:
    ops: Ops = REFERENCE if isa == "reference" else cpu_ops(isa)
    alone = REFERENCE if isa == "reference" else cpu_ops(isa, 1)
    qkv = torch.randn(sum(LENGTHS), 3 * 3 * 32).to(dtype)
    bias = torch.randn(3, 2 * 300 - 1) if biased else None
    whole = ops.packed_attention(qkv, pack(LENGTHS), 32, 0.2, window, bias)
    for part, rows in zip(torch.split(whole, LENGTHS), torch.split(qkv, LENGTHS), strict=True):
        assert torch.equal(alone.packed_attention(rows, pack([len(rows)]), 32, 0.2, window, bias), part)


@pytest.mark.parametrize("isa", ISA_NAMES)
def test_nothing_of_a_neighbour_is_seen(isa: str) -> None:
    """Sequences of NaN on both sides of one of odd length."""
    qkv = torch.full((40, 3 * 32), float("nan")).bfloat16()
    qkv[7:20] = 1.0
    out = cpu_ops(isa).packed_attention(qkv, pack([7, 13, 20]), 32, 0.2)
    assert (out[7:20] == 1.0).all()
    assert out[:7].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISA_NAMES)
def test_rotary_packed(isa: str, dtype: torch.dtype) -> None:
    sequences, qkv = pack([5, 1, 30]), torch.randn(36, 3 * 2 * 48).to(dtype)
    cos_sin = torch.randn(30, 48)
    rotated = [qkv.clone(), qkv.clone()]
    for ops, each in zip((cpu_ops(isa), REFERENCE), rotated, strict=True):
        ops.rotary_packed(each, cos_sin, sequences, 48)
    assert relative_error(rotated[0], rotated[1]) < tolerance(dtype)
    assert torch.equal(rotated[0][:, 2 * 96 :], qkv[:, 2 * 96 :])  # values stay


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISA_NAMES)
def test_segment_sum(isa: str, dtype: torch.dtype) -> None:
    lengths = [1, 5, 77, 2]
    x, weights = torch.randn(85, 37).to(dtype), torch.rand(85)
    bounds = pack(lengths).cu_seqlens
    actual = cpu_ops(isa).segment_sum(x, weights, bounds)
    expected = [
        (p.double() * w.double()[:, None]).sum(0) for p, w in zip(x.split(lengths), weights.split(lengths), strict=True)
    ]
    assert relative_error(actual, torch.stack(expected)) < 1e-5
    assert relative_error(REFERENCE.segment_sum(x, weights, bounds), torch.stack(expected)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISA_NAMES)
def test_rows_do_not_depend_on_the_batch(isa: str, dtype: torch.dtype) -> None:
    one, two = cpu_ops(isa, 1), cpu_ops(isa, 2)
    x, weight, bias = torch.randn(64, 1154).to(dtype), torch.randn(1154), torch.randn(1154)
    computations: list[Callable[[Ops, torch.Tensor], torch.Tensor]] = [
        lambda ops, rows: ops.layer_norm(rows, weight, bias, 1e-5),
        lambda ops, rows: ops.add_layer_norm(rows, rows.to(torch.float32, copy=True), weight, bias, 1e-5),
        lambda ops, rows: ops.post_layer_norm(rows, rows.to(torch.float32, copy=True), weight, bias, 1e-5),
        lambda ops, rows: ops.activate(rows.clone(), "gelu"),
        lambda ops, rows: ops.gelu_erf_and_mul(rows),
    ]
    for compute in computations:
        whole = compute(two, x)
        for row in (0, 31, 63):
            assert torch.equal(compute(one, x[row : row + 1]), whole[row : row + 1])
