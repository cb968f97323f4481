"""Every C kernel, for every instruction set of this machine, against the plain torch meaning of the op."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.kernels.ops import KVCacheSpec
from llmserve.kernels.reference import ReferenceOps
from tests.kernels.cpu_cases import (
    CPU,
    DTYPES,
    ISA_NAMES,
    PagedBatch,
    cpu_ops,
    needs_compiler,
    relative_error,
    tolerance,
)

pytestmark = needs_compiler
REFERENCE = ReferenceOps()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISA_NAMES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 576), (3, 577), (33, 2048), (0, 64)])
def test_norms_and_gates(isa: str, dtype: torch.dtype, rows: int, width: int) -> None:
    ops, tol = cpu_ops(isa), tolerance(dtype)
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(width)
    residual = torch.randn(rows, width)
    mine, theirs = residual.clone(), residual.clone()
    pairs = [
        (ops.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5)),
        (ops.add_rms_norm(x, mine, weight, 1e-5), REFERENCE.add_rms_norm(x, theirs, weight, 1e-5)),
        (mine, theirs),
    ]
    gate_up = torch.randn(rows, 2 * width).to(dtype) * 4
    pairs.append((ops.silu_and_mul(gate_up), REFERENCE.silu_and_mul(gate_up)))
    pairs.append((ops.gelu_and_mul(gate_up), REFERENCE.gelu_and_mul(gate_up)))
    for actual, expected in pairs:
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        if rows:
            assert relative_error(actual, expected) < tol


@pytest.mark.parametrize("isa", ISA_NAMES)
def test_extreme_values_stay_in_their_row(isa: str) -> None:
    ops = cpu_ops(isa)
    x = torch.randn(6, 96)
    x[1, 5], x[2, 17], x[3], x[4] = float("nan"), float("inf"), 0.0, 1e-40
    clean = [0, 3, 4, 5]
    weight = torch.randn(96)
    dense, int8 = (ops.pack_linear(torch.randn(40, 96), None, fmt) for fmt in ("dense", "int8"))
    for result in (ops.rms_norm(x, weight, 1e-5), ops.linear(x, dense), ops.linear(x, int8)):
        assert result[clean].isfinite().all()
        assert not result[1].isfinite().any()
    assert ops.linear(x, int8)[2].isnan().all()
    assert (ops.linear(x, int8)[3] == 0).all()
    big = torch.tensor([[-1e4, 1e4, float("nan"), 1.0, 1.0, 1.0]])
    gated = ops.silu_and_mul(big)
    assert gated[0, 0].abs() < 1e-30
    assert gated[0, 1] == 1e4
    assert gated[0, 2].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISA_NAMES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 32), (203, 131), (960, 576)])
def test_linear(isa: str, dtype: torch.dtype, n: int, k: int) -> None:
    ops = cpu_ops(isa)
    weight, bias = torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    for fmt, tol in (("dense", 2e-5), ("int8", 4e-2)):
        for offset in (None, bias):
            packed = ops.pack_linear(weight, offset, fmt)
            assert (packed.out_features, packed.in_features, packed.format) == (n, k, fmt)
            for m in (0, 1, 2, 7, 13, 100):
                x = torch.randn(m, k).to(dtype)
                expected = x.double() @ weight.double().T + (0 if offset is None else offset.double())
                actual = ops.linear(x, packed)
                wide = ops.linear(x, packed, torch.float32)
                assert actual.shape == wide.shape == (m, n)
                assert torch.equal(wide.to(dtype), actual)  # what was accumulated, rounded once
                if m:
                    assert relative_error(wide, expected) < tol, (fmt, m)


@pytest.mark.parametrize("isa", ISA_NAMES)
def test_int8_is_exact_where_quantisation_is(isa: str) -> None:
    """Integers up to 127 with the extremes present are their own quantisation: the product must be exact."""
    ops = cpu_ops(isa)
    weight = torch.randint(-127, 128, (48, 512)).float()
    x = torch.randint(-127, 128, (9, 512)).float()
    weight[:, 0], x[:, 0] = 127, 127
    weight[0], x[0] = 127, 127  # the largest sums
    assert torch.equal(ops.linear(x, ops.pack_linear(weight, None, "int8")), x @ weight.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISA_NAMES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"), [(9, 3, 64, 16), (8, 1, 48, 32), (4, 4, 128, 16), (3, 1, 256, 48)]
)
def test_attention(isa: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_size: int) -> None:
    spec = KVCacheSpec(kv_heads, head_dim, block_size, dtype)
    batch = PagedBatch.random(spec, heads, [1, 97, 1100, 64])
    steps = [[(0, 0, 1), (1, 0, 90), (2, 0, 1099), (3, 0, 50)], [(0, 0, 1), (1, 90, 97), (2, 1099, 1100), (3, 50, 64)]]
    norm = torch.rand(head_dim) + 0.5
    for window, soft_cap, with_norm in ((0, 0.0, None), (37, 0.0, norm), (600, 20.0, None)):
        actual, expected = (
            batch.run(ops, steps, window=window, soft_cap=soft_cap, norm=with_norm) for ops in (cpu_ops(isa), REFERENCE)
        )
        assert actual.isfinite().all()
        roundings = 1 if with_norm is None else 2  # the reference rounds normed heads once more than the kernel
        assert relative_error(actual, expected) < roundings * tolerance(dtype)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_attention_of_any_ragged_batch(data: st.DataObject) -> None:
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    spec = KVCacheSpec(
        kv_heads, data.draw(st.sampled_from((16, 32, 80))), data.draw(st.sampled_from((16, 64))), torch.float32
    )
    seq_lens = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=4))
    batch = PagedBatch.random(spec, kv_heads * group, seq_lens)
    cuts = [data.draw(st.integers(0, length - 1)) for length in seq_lens]
    first = [(seq, 0, cut) for seq, cut in enumerate(cuts) if cut]
    second = [(seq, cut, seq_lens[seq]) for seq, cut in enumerate(cuts)]
    steps = [step for step in (first, second) if step]
    window = data.draw(st.sampled_from((0, 1, 20, 64, 100)))
    actual, expected = (batch.run(ops, steps, window=window) for ops in (cpu_ops(ISA_NAMES[0]), REFERENCE))
    assert relative_error(actual, expected) < 2e-5


@pytest.mark.parametrize("isa", ISA_NAMES)
def test_embedding(isa: str) -> None:
    ops, table = cpu_ops(isa), torch.randn(50, 24).bfloat16()
    ids = torch.tensor([0, 49, 7, 7])
    assert torch.equal(ops.embedding(ids, table), table[ids])
    for wrong in (-1, 50):
        with pytest.raises(IndexError, match=str(wrong)):
            ops.embedding(torch.tensor([3, wrong]), table)


def test_unusable_shapes_are_refused_with_the_reason() -> None:
    ops = cpu_ops(ISA_NAMES[0])
    for spec, reason in (
        (KVCacheSpec(1, 40, 16, torch.float32), "head_dim"),
        (KVCacheSpec(1, 64, 8, torch.float32), "block_size"),
        (KVCacheSpec(1, 64, 16, torch.float16), "float16"),
    ):
        with pytest.raises(ValueError, match=reason):
            ops.allocate_kv_cache(spec, 4, CPU)
    with pytest.raises(ValueError, match="float16"):
        ops.pack_linear(torch.zeros(4, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match="int3"):
        ops.pack_linear(torch.zeros(4, 4), None, "int3")
