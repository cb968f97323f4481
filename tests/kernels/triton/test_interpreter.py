"""The interpreter the kernels are tested in: right where the stock one is wrong, and blind to no planted fault."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs

from tests.kernels.triton.interpreter import KernelFault, install

if not knobs.runtime.interpret:
    pytest.skip("the tests run on a device", allow_module_level=True)
install()
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@triton.jit
def _arithmetic(x_ptr, y_ptr, out_ptr, flag_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, x * y + x - y)
    tl.store(flag_ptr + at, (x < y).to(tl.int8))


@triton.jit
def _cast(x_ptr, out_ptr, size, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < size, other=0.0).to(out_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _product(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def _copy(x_ptr, out_ptr, shift, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at + shift))


@triton.jit
def _as_floats(raw_ptr, SIZE: tl.constexpr):
    tl.load((raw_ptr + 1).to(tl.pointer_type(tl.float32)) + tl.arange(0, SIZE))


@triton.jit
def _all_write_one(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


@triton.jit
def _read_the_neighbour(x_ptr, num_programs):
    own = tl.program_id(0)
    other = tl.load(x_ptr + (own + 1) % num_programs)
    tl.store(x_ptr + own, other)


@triton.jit
def _forget_other(x_ptr, out_ptr, size, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + at, mask=at < size), axis=0))


@triton.jit
def _add_up(out_ptr):
    tl.atomic_add(out_ptr, 1)


def test_bfloat16_is_computed_as_numbers() -> None:
    x, y = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    out, flag = torch.empty_like(x), torch.empty(64, dtype=torch.int8)
    _arithmetic[(1,)](x, y, out, flag, 64)
    assert torch.equal(out, x * y + x - y)
    assert torch.equal(flag.bool(), x < y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *FP8])
def test_products_are_summed_in_float32(dtype: torch.dtype) -> None:
    a, b = (torch.randn(16, 16).to(dtype) for _ in range(2))
    out = torch.empty(16, 16)
    _product[(1,)](a, b, out, 16)
    assert torch.allclose(out, a.float() @ b.float(), atol=1e-5)


def test_products_of_bytes_are_exact() -> None:
    a, b = (torch.randint(-127, 128, (16, 16), dtype=torch.int8) for _ in range(2))
    out = torch.empty(16, 16, dtype=torch.int32)
    _product[(1,)](a, b, out, 16)
    assert torch.equal(out, (a.double() @ b.double()).int())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *FP8])
def test_casts_round_to_nearest_and_fp8_saturates(dtype: torch.dtype) -> None:
    x = torch.cat((torch.randn(200) * 100, torch.tensor([0.0, -0.0, 1e-6, 500.0, -1e9, 7e4])))
    out = torch.empty(len(x), dtype=dtype)
    _cast[(1,)](x, out, len(x), 256)
    most = torch.finfo(dtype).max
    expected = (x.clamp(-most, most) if dtype in FP8 else x).to(dtype)
    assert torch.equal(out.float(), expected.float())
    back = torch.empty(len(x))
    _cast[(1,)](out, back, len(x), 256)
    assert torch.equal(back, expected.float())


@pytest.mark.parametrize("dtype", FP8)
def test_every_fp8_pattern_is_read_as_torch_reads_it(dtype: torch.dtype) -> None:
    x, out = torch.arange(256, dtype=torch.uint8).view(dtype), torch.empty(256)
    _cast[(1,)](x, out, 256, 256)
    assert torch.equal(out.nan_to_num(1e9), x.float().nan_to_num(1e9))


@pytest.mark.parametrize("shift", [1, -1, 1000])
def test_an_access_outside_a_tensor_is_found(shift: int) -> None:
    x, out = torch.zeros(32), torch.zeros(32)
    _copy[(2,)](x, out, 0, 16)
    with pytest.raises(KernelFault, match="load out of bounds"):
        _copy[(2,)](x, out, shift, 16)
    with pytest.raises(KernelFault, match="store out of bounds"):
        _copy[(2,)](torch.zeros(64), out[:16].clone(), 0, 16)


def test_an_access_across_elements_is_found() -> None:
    with pytest.raises(KernelFault, match="misaligned"):
        _as_floats[(1,)](torch.zeros(68, dtype=torch.uint8), 16)


def test_two_programs_that_write_one_place_are_found() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    _all_write_one[(1,)](out)
    with pytest.raises(KernelFault, match="race"):
        _all_write_one[(2,)](out)


def test_a_program_that_reads_what_another_writes_is_found() -> None:
    _read_the_neighbour[(1,)](torch.zeros(1), 1)
    with pytest.raises(KernelFault, match="race"):
        _read_the_neighbour[(4,)](torch.zeros(4), 4)


def test_lanes_that_were_not_loaded_hold_nothing_sensible() -> None:
    out = torch.zeros(1)
    _forget_other[(1,)](torch.ones(16), out, 16, 16)
    assert out.item() == 16
    _forget_other[(1,)](torch.ones(16), out, 15, 16)
    assert out.isnan().item()


def test_atomics_of_many_programs_are_no_race() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    _add_up[(7,)](out)
    assert out.item() == 7
