"""Products with weights in 8 bits: against exact sums, and row by row."""

from __future__ import annotations

import pytest
import torch

from llmserve.kernels.triton.gemm import multiply, partition_of, quantize
from tests.kernels.cpu_cases import relative_error
from tests.kernels.triton.triton_cases import DEVICE, IS_INTERPRETED, triton_ops

FP8 = torch.float8_e4m3fn
NEVER, ALWAYS = 0, 10**9  # share partitions out


@pytest.mark.parametrize(("n", "k"), [(1, 1), (40, 600), (130, 1100)])
def test_int8_weights(n: int, k: int) -> None:
    torch.manual_seed(0)
    ops = triton_ops()
    weight, bias = torch.randn(n, k), torch.randn(n)
    for offset in (None, bias):
        packed = ops.pack_linear(weight.to(DEVICE), None if offset is None else offset.to(DEVICE), "int8")
        assert packed.nbytes == ops.linear_bytes("int8", n, k, torch.bfloat16, offset is not None)
        for m in (0, 1, 70):
            x = torch.randn(m, k)
            expected = x.double() @ weight.double().T + (0 if offset is None else offset.double())
            actual = ops.linear(x.to(DEVICE), packed)
            assert actual.shape == (m, n)
            if m:
                assert relative_error(actual.cpu(), expected) < 4e-2, m


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
def test_products_are_exact_where_quantisation_is(dtype: torch.dtype) -> None:
    """Small integers with the largest value present are their own quantisation; bit by bit, split or not."""
    if not IS_INTERPRETED and dtype == FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    largest = 127 if dtype == torch.int8 else 448
    torch.manual_seed(0)
    weight, x = torch.randint(-8, 9, (70, 1100)).float(), torch.randint(-8, 9, (5, 1100)).float()
    weight[:, 0] = x[:, 0] = largest
    packed, scale, bias = weight.to(DEVICE, dtype), torch.ones(70, device=DEVICE), torch.zeros(70, device=DEVICE)
    results = [multiply(x.to(DEVICE), packed, scale, bias, torch.float32, how, 2).cpu() for how in (NEVER, ALWAYS)]
    assert torch.equal(results[0], x @ weight.T)
    assert torch.equal(results[0], results[1])


def test_rows_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    packed = triton_ops().pack_linear(torch.randn(70, 1100).to(DEVICE), torch.randn(70).to(DEVICE), "int8")
    x = torch.randn(70, 1100).to(DEVICE, torch.bfloat16)
    whole = multiply(x, packed.weight, packed.scale, packed.bias, x.dtype, NEVER, 2)
    for first, end in ((0, 1), (3, 9), (65, 70)):
        some = multiply(x[first:end].clone(), packed.weight, packed.scale, packed.bias, x.dtype, ALWAYS, 2)
        assert torch.equal(some, whole[first:end])


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
def test_quantisation_is_per_token_and_extremes_stay_in_their_row(dtype: torch.dtype) -> None:
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    x[1, 7], x[2, 9], x[3] = float("nan"), float("inf"), 0.0
    quantised, scale = (tensor.cpu() for tensor in quantize(x.to(DEVICE), dtype))
    assert scale[1].isnan()
    assert not scale[2].isfinite()
    assert (quantised[3].float() == 0).all()
    back = quantised[[0, 4]].float() * scale[[0, 4], None]
    assert relative_error(back, x[[0, 4]]) < (0.005 if dtype == torch.int8 else 0.04)


def test_partitions_follow_from_the_weight() -> None:
    assert partition_of(4096, 4096) == 512  # 32 tiles of columns x 8 partitions
    assert partition_of(128256, 4096) == 4096  # columns enough
    assert partition_of(10, 100) == 128
