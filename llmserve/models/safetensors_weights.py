"""A folder's safetensors as a source of weights, every tensor copied straight into its place. Knows no quantisation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from llmserve.errors import ModelLoadError
from llmserve.models.config import MoEConfig
from llmserve.models.moe import TensorPiece, split_fused
from llmserve.models.safetensors_file import SafetensorsFile, SafetensorsTensor, open_shards

BUFFER_TYPE = "I64"  # of what is stored beside weights: positions, shapes
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}


class StoredTensors:
    """The safetensors files of a folder, of any type. Fused experts are seen as the tensors of each."""

    def __init__(self, folder: Path, moe: MoEConfig | None = None) -> None:
        self.where = str(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        self._tensors: dict[str, _StoredTensor] = {}
        for file in open_shards(folder):
            for name, tensor in file.tensors.items():
                pieces = split_fused(name, tensor.shape, moe) if moe is not None else []
                for piece in pieces or [TensorPiece(name, ())]:
                    self._add(file, tensor, piece)

    def _add(self, file: SafetensorsFile, tensor: SafetensorsTensor, piece: TensorPiece) -> None:
        stored = _StoredTensor(file, tensor, piece)
        self._tensors[piece.name] = stored
        self.shapes[piece.name] = stored.shape
        self.types[piece.name] = tensor.dtype

    def nbytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * _TORCH_DTYPES[self.types[name]].itemsize

    def read(self, name: str, out: torch.Tensor) -> None:
        out.copy_(self.view(name))

    def read_raw(self, name: str, out: torch.Tensor) -> None:
        out.copy_(self.view(name).contiguous().view(torch.uint8).view(out.shape))

    def input_order(self, name: str) -> torch.Tensor | None:
        """Always None: inputs stand in order."""
        return None

    def view(self, name: str) -> torch.Tensor:
        """The tensor as it lies in the mapped file, of its own type."""
        return self._tensors[name].view()

    def is_float(self, name: str) -> bool:
        """Whether it is of a type that needs no scale."""
        return self.types[name] in _FLOAT_TYPES

    def require_float(self, name: str) -> None:
        """Raises ModelLoadError if it is not: nothing says what its numbers mean."""
        if not self.is_float(name):
            raise ModelLoadError(
                f"{self.where}: the tensor {name!r} is of type {self.types[name]}, which is not supported without a "
                f"quantization_config that says what it means. Supported: {', '.join(_FLOAT_TYPES)}."
            )


class SafetensorsWeights(StoredTensors):
    """Those of a folder whose weights are all floating-point numbers.

    Position ids, which old checkpoints of encoders carry, are no weights and are left out; raises ModelLoadError for
    any other type.
    """

    def __init__(self, folder: Path, moe: MoEConfig | None = None) -> None:
        super().__init__(folder, moe)
        for name in [name for name, kind in self.types.items() if kind == BUFFER_TYPE]:
            del self.shapes[name], self.types[name]
        for name in self.shapes:
            self.require_float(name)


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    """A tensor as it lies in a file, or the piece of it that one expert is."""

    file: SafetensorsFile
    tensor: SafetensorsTensor
    piece: TensorPiece

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = (len(range(*part.indices(n))) for part, n in self._parts() if isinstance(part, slice))
        shape = (*sizes, *self.tensor.shape[len(self.piece.index) :])
        return shape[::-1] if self.piece.transposed else shape

    def view(self) -> torch.Tensor:
        """It, without a copy."""
        dtype, tensor = _TORCH_DTYPES[self.tensor.dtype], self.tensor
        count = tensor.nbytes // dtype.itemsize
        stored = torch.frombuffer(self.file.buffer, dtype=dtype, count=count, offset=tensor.offset).view(tensor.shape)
        stored = stored[self.piece.index] if self.piece.index else stored
        return stored.T if self.piece.transposed else stored

    def _parts(self) -> Iterator[tuple[int | slice, int]]:
        return zip(self.piece.index, self.tensor.shape, strict=False)
