"""Triton's interpreter, corrected and made a sanitiser: how the kernels are run without a GPU. Knows none of them.

The interpreter that comes with Triton 3.6 is silently wrong where a type has no numpy equal: arithmetic, comparisons,
products and sums of bfloat16 work on its bit patterns, casts to it truncate, casts to fp8 wrap around. And it hides
what a GPU would not forgive: accesses outside a tensor, masked lanes that are used although nothing was loaded,
programs of one launch that touch the same bytes. `install` replaces the interpreter's builder and executor by the
classes below, for the life of the process; `TRITON_INTERPRET=1` must have been set before Triton was first imported.

What it cannot show: types and shapes the compiler refuses, shared memory, registers, the order of sums within a tensor
core, and races between the threads of one program. `test_compile.py` and the tests marked `gpu` are for those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton.language import core  # beside `tl`, for `install`
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

_FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
_SEVERAL_READERS, _NOBODY = -2, -1


class KernelFault(RuntimeError):
    """A kernel did what a GPU would punish, or worse, let pass."""


def _is_odd(dtype: Any) -> bool:
    """Whether numpy has no such type, so that the interpreter keeps its bits in integers."""
    return dtype.scalar == tl.bfloat16 or dtype.scalar in _FP8


def _to_float(data: Any, dtype: Any) -> Any:
    scalar = dtype.scalar
    if scalar == tl.bfloat16:
        return (np.asarray(data).astype(np.uint32) << 16).view(np.float32)
    if scalar in _FP8:
        return torch.from_numpy(np.array(data, dtype=np.uint8)).view(_FP8[scalar]).float().numpy()
    return data


def _from_float(data: Any, dtype: Any) -> Any:
    """Rounds to nearest, ties to even; fp8 saturates, as the hardware's conversions do."""
    scalar, values = dtype.scalar, np.array(data, dtype=np.float32)
    if scalar == tl.bfloat16:
        return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    if scalar in _FP8:
        most = torch.finfo(_FP8[scalar]).max
        return torch.from_numpy(values).clamp(-most, most).to(_FP8[scalar]).view(torch.uint8).numpy()
    return data.astype(interpreter._get_np_dtype(scalar))


class Memory:
    """The storages a launch was given, byte by byte: where they are, and which program read or wrote each byte."""

    def __init__(self, kernel: str, tensors: list[torch.Tensor]) -> None:
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
        self._kernel = kernel
        self._starts = np.array(sorted(sizes), dtype=np.uint64)
        self._ends = np.array([start + sizes[int(start)] for start in self._starts], dtype=np.uint64)
        self._writer = [np.full(sizes[int(start)], _NOBODY, np.int32) for start in self._starts]
        self._reader = [np.full(sizes[int(start)], _NOBODY, np.int32) for start in self._starts]

    def access(self, what: str, pointers: Any, mask: Any, num_bytes: int, program: int, *, plain: bool = True) -> None:
        """Raises KernelFault for lanes outside a storage or misaligned, and, if `plain`, for a race."""
        shape = np.broadcast_shapes(pointers.shape, mask.shape)
        addresses = np.broadcast_to(pointers, shape)[np.broadcast_to(mask, shape)]
        if not addresses.size:
            return
        if not len(self._starts):
            raise KernelFault(f"{self._kernel}: {what} without any tensor")
        which = np.searchsorted(self._starts, addresses, side="right").astype(np.int64) - 1
        outside = (which < 0) | (addresses + np.uint64(num_bytes) > self._ends[np.maximum(which, 0)])
        if outside.any():
            raise KernelFault(
                f"{self._kernel}: {what} out of bounds, {int(outside.sum())} of {addresses.size} lanes, #{program}"
            )
        if (addresses % np.uint64(num_bytes)).any():
            raise KernelFault(f"{self._kernel}: misaligned {what}, program #{program}")
        if plain:
            for index in np.unique(which):
                offsets = (addresses[which == index] - self._starts[index]).astype(np.int64)
                self._note(what, index, offsets, program)

    def _note(self, what: str, index: int, offsets: Any, program: int) -> None:
        writer, reader = self._writer[index], self._reader[index]
        wrote = writer[offsets]
        if ((wrote != _NOBODY) & (wrote != program)).any():
            raise KernelFault(f"{self._kernel}: race: program #{program} has a {what} where another one wrote")
        if what == "load":
            read = reader[offsets]
            reader[offsets] = np.where((read == _NOBODY) | (read == program), program, _SEVERAL_READERS)
            return
        read = reader[offsets]
        if ((read != _NOBODY) & (read != program)).any():
            raise KernelFault(f"{self._kernel}: race: program #{program} has a {what} where another one read")
        writer[offsets] = program


class CorrectedBuilder(InterpreterBuilder):  # type: ignore[misc]
    """Computes as the hardware does, and asks `memory` before each access. Programs run in a shuffled order."""

    memory: Memory
    other_is_given = False
    _order: Any = None
    _program = 0

    def set_grid_dim(self, nx: int, ny: int, nz: int) -> None:
        super().set_grid_dim(nx, ny, nz)
        self._order = np.random.default_rng(nx * ny * nz).permutation(nx * ny * nz)

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        _, num_y, num_z = self.grid_dim
        self._program = int(self._order[(x * num_y + y) * num_z + z])
        rest, z = divmod(self._program, num_z)
        super().set_grid_idx(*divmod(rest, num_y), z)

    # conversions

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        if not (_is_odd(src.dtype) or _is_odd(dst_type)):
            return super().cast_impl(src, dst_type)
        return TensorHandle(_from_float(_to_float(src.data, src.dtype), dst_type), dst_type.scalar)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        return self.cast_impl(src, dst_type)

    # arithmetic

    def binary_op(self, lhs: Any, rhs: Any, op: Any) -> Any:
        op = {np.maximum: np.fmax, np.minimum: np.fmin}.get(op, op)  # as max.f32: a number wins over a NaN
        if not (_is_odd(lhs.dtype) or _is_odd(rhs.dtype)):
            out = super().binary_op(lhs, rhs, op)
            return (
                TensorHandle(out.data, tl.int1) if out.data.dtype == bool else out
            )  # stock: typed as what it compares
        values = op(_to_float(lhs.data, lhs.dtype), _to_float(rhs.data, rhs.dtype))
        dtype = lhs.dtype.scalar
        return (
            TensorHandle(values, tl.int1) if values.dtype == bool else TensorHandle(_from_float(values, dtype), dtype)
        )

    def unary_op(self, arg: Any, op: Any) -> Any:
        if not _is_odd(arg.dtype):
            return super().unary_op(arg, op)
        return TensorHandle(_from_float(op(_to_float(arg.data, arg.dtype)), arg.dtype), arg.dtype.scalar)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        """One rounding, by way of float64, for float32."""
        if z.dtype.scalar != tl.float32:
            raise KernelFault("fma of another type than float32: convert first")
        wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return TensorHandle(wide.astype(np.float32), tl.float32)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        """Summed in float64 and rounded once: exact for integers, and no row depends on its place, as it does with
        the float32 kernels of a CPU's matrix library."""
        left, right = _to_float(a.data, a.dtype), _to_float(b.data, b.dtype)
        product = np.matmul(left.astype(np.float64), right.astype(np.float64))
        return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    # memory

    def create_masked_load(
        self, ptrs: Any, mask: Any, other: Any, cache_modifier: Any, eviction_policy: Any, is_volatile: Any
    ) -> Any:
        element = ptrs.get_element_ty()
        dtype = interpreter._get_np_dtype(element)
        self.memory.access("load", ptrs.data, mask.data, dtype.itemsize, self._program)
        if other is None and not self.other_is_given and not mask.data.all():
            # nothing was loaded there, so nothing sensible may be found there
            poison = (
                _from_float(np.float32(np.nan), element) if _is_odd(element) else np.nan if dtype.kind == "f" else 85
            )
            other = TensorHandle(np.full(ptrs.data.shape, poison, dtype), element)
        return super().create_masked_load(ptrs, mask, other, cache_modifier, eviction_policy, is_volatile)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *hints: Any) -> Any:
        num_bytes = interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize
        self.memory.access("store", ptrs.data, mask.data, num_bytes, self._program)
        return super().create_masked_store(ptrs, value, mask, *hints)

    def create_atomic_rmw(self, op: Any, ptr: Any, val: Any, mask: Any, *how: Any) -> Any:
        num_bytes = interpreter._get_np_dtype(ptr.get_element_ty()).itemsize
        self.memory.access("atomic", ptr.data, mask.data, num_bytes, self._program, plain=False)
        return super().create_atomic_rmw(op, ptr, val, mask, *how)


class CorrectedSemantic(TritonSemantic):  # type: ignore[misc]
    """Remembers whether a load has an `other`: the stock one drops it if it is a single zero, taking it for false."""

    def load(self, ptr: Any, mask: Any, other: Any, *hints: Any) -> Any:
        self.builder.other_is_given = other is not None
        return super().load(ptr, mask, other, *hints)


@contextmanager
def reachable(tensors: list[torch.Tensor]) -> Iterator[None]:
    """Launches may touch these beside their arguments: they load the addresses."""
    CheckedExecutor.by_address = tuple(tensors)
    yield
    CheckedExecutor.by_address = ()


class CheckedExecutor(GridExecutor):  # type: ignore[misc]
    """Tells the builder which storages a launch may touch, and raises a fault as what it is."""

    by_address: tuple[torch.Tensor, ...] = ()
    launches: ClassVar[list[str]] = []  # names of the kernels, as they were launched

    def _init_args_hst(self, args_dev: Any, kwargs: Any) -> Any:
        given = [arg.base if isinstance(arg, TensorDescriptor) else arg for arg in [*args_dev, *kwargs.values()]]
        tensors = [value for value in [*given, *self.by_address] if isinstance(value, torch.Tensor)]
        interpreter.interpreter_builder.memory = Memory(self.fn.__name__, tensors)
        return super()._init_args_hst(args_dev, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.launches.append(self.fn.__name__)
        try:
            with np.errstate(all="ignore"):  # infinities and NaN are data
                super().__call__(*args, **kwargs)
        except InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, KernelFault):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None


class _NoScope:
    """The language stays replaced for the life of the process: doing it anew at each call takes most of the time."""

    def restore(self) -> None:
        pass


def install() -> None:
    """Once a process; before any kernel runs."""
    assert knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton is imported"
    if isinstance(interpreter.interpreter_builder, CorrectedBuilder):
        return
    builder = CorrectedBuilder()
    semantic = CorrectedSemantic(builder)
    interpreter.interpreter_builder = builder
    interpreter.interpreter_semantic = semantic
    interpreter.GridExecutor = CheckedExecutor

    def patch_attr(obj: Any, name: str, member: Any, _builder: Any, scope: Any) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            return member(*args, **(kwargs | {"_semantic": semantic}))

        scope.set_attr(obj, name, call)

    interpreter._patch_attr = patch_attr
    assert core is tl.core
    interpreter._patch_lang(install)  # replaces what it finds of the language among this function's globals
    # One element of an array is no number to numpy 2.4; bounds of loops are such.
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())
    interpreter._patch_lang = lambda fn: _NoScope()
