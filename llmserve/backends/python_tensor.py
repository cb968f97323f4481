"""`pb_utils.Tensor`: a named numpy array, or one of any library that speaks DLPack. Knows no requests."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmserve.backends.tensors import Array, datatype_of

_CPU = 1  # of DLPack


class TritonModelException(Exception):
    """What a model raises, or is told, by this module."""


class Tensor:
    """A named array in this process's memory."""

    __slots__ = ("_array", "_name")

    def __init__(self, name: str, numpy_array: Array) -> None:
        if not isinstance(numpy_array, (np.ndarray, np.generic)):
            raise TritonModelException(
                f"Tensor {name!r} must be made of a numpy array, not {type(numpy_array).__name__}"
            )
        self._name = name
        self._array = np.asarray(numpy_array)

    def name(self) -> str:
        """Its name in the model's configuration."""
        return self._name

    def as_numpy(self) -> Array:
        """Its array: of an input, a view of the message that brought it."""
        return self._array

    def shape(self) -> list[int]:
        """Its dimensions."""
        return list(self._array.shape)

    def triton_dtype(self) -> str:
        """TYPE_FP32, TYPE_STRING, ..."""
        datatype = datatype_of(self._array)
        return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"

    def is_cpu(self) -> bool:
        """Always: tensors come from another process, through memory of the host."""
        return True

    def to_dlpack(self) -> Any:
        """A DLPack capsule that shares the tensor's memory."""
        return self.__dlpack__()

    def __dlpack__(self, stream: object = None) -> Any:
        if self._array.dtype == object:
            raise TritonModelException("DLPack does not support string tensors.")
        return np.ascontiguousarray(self._array).__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_CPU, 0)

    @staticmethod
    def from_dlpack(name: str, tensor: Any) -> Tensor:
        """A tensor of any library, or a capsule; one that is on a GPU, or of bfloat16, goes through torch."""
        if type(tensor).__name__ == "PyCapsule":
            return Tensor(name, np.from_dlpack(_Capsule(tensor)))
        if not hasattr(tensor, "__dlpack__"):
            raise TritonModelException(f"Tensor {name!r}: {type(tensor).__name__} has no __dlpack__.")
        if tensor.__dlpack_device__()[0] == _CPU and "bfloat16" not in str(tensor.dtype):
            return Tensor(name, np.from_dlpack(tensor.detach() if hasattr(tensor, "detach") else tensor))
        import torch
        from torch.utils.dlpack import from_dlpack

        on_cpu = from_dlpack(tensor).cpu()
        if on_cpu.dtype == torch.bfloat16:
            import ml_dtypes

            return Tensor(name, on_cpu.view(torch.uint16).numpy().view(ml_dtypes.bfloat16))
        return Tensor(name, on_cpu.numpy())


class _Capsule:
    """A bare DLPack capsule, with the methods numpy looks for."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: object) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_CPU, 0)
