"""A PyTorch program out of a file, and what the file records of its inputs and outputs. Knows no requests."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.jit._pickle import restore_type_tag

from llmserve.backends.model_messages import TensorSpec
from llmserve.errors import ModelLoadError

DATATYPES = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.uint16: "UINT16",
    torch.uint32: "UINT32",
    torch.uint64: "UINT64",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.bfloat16: "BF16",
    torch.float32: "FP32",
    torch.float64: "FP64",
}


class Program(Protocol):
    """Tensors in, tensors out."""

    argument_names: list[str]

    def __call__(self, arguments: Sequence[torch.Tensor]) -> Any:
        """A tensor, a sequence of them, or a dictionary."""
        ...

    def signature(self) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """Inputs and outputs with every dimension. Raises ModelLoadError if the file does not record them."""
        ...


class ScriptModel:
    """One method of a TorchScript module. A traced one keeps the shapes it was traced with: they tell the signature."""

    def __init__(self, path: Path, device: torch.device, method: str = "forward") -> None:
        self._path = path
        self._device = device
        module = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
        self._method = getattr(module, method)
        arguments = self._method.schema.arguments
        self.argument_names = [argument.name for argument in arguments[1:]]  # without self

    def __call__(self, arguments: Sequence[torch.Tensor]) -> Any:
        return self._method(*arguments)

    def signature(self) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """Runs the model on zeros shaped as its trace was, and on twice the rows, to see whether it batches."""
        traced = traced_inputs(self._path)
        if not traced or not all(isinstance(value, torch.Tensor) for value in traced):
            raise ModelLoadError(
                f"{self._path} does not record what its inputs are (only traced TorchScript does). "
                "Write a config.pbtxt with its input and output."
            )
        inputs = [torch.zeros(value.shape, dtype=value.dtype, device=self._device) for value in traced]
        single = self._run(inputs)
        shapes = [list(value.shape) for value in inputs]
        out_shapes = [list(value.shape) for value in single.values()]
        if self._batches(inputs, single):
            shapes = [[-1, *shape[1:]] for shape in shapes]
            out_shapes = [[-1, *shape[1:]] for shape in out_shapes]
        return (
            [_spec(*each) for each in zip(self.argument_names, inputs, shapes, strict=False)],
            [_spec(*each) for each in zip(single, single.values(), out_shapes, strict=True)],
        )

    def _batches(self, inputs: list[torch.Tensor], single: dict[str, torch.Tensor]) -> bool:
        """Whether twice the rows in give twice the rows out."""
        if not all(value.ndim for value in (*inputs, *single.values())):
            return False
        try:
            double = self._run([torch.cat([value, value]) for value in inputs])
        except RuntimeError:
            return False
        return all(
            value.shape == (2 * single[name].shape[0], *single[name].shape[1:]) for name, value in double.items()
        )

    def _run(self, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            returned = self(inputs)
        return _named(returned, self._path)


class ExportedModel:
    """A `torch.export` program, which records every tensor's type, shape and varying dimensions."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path = path
        self._program = torch.export.load(str(path))
        self.argument_names = list(self._program.graph_signature.user_inputs)
        self._module = self._program.module().to(device)

    def __call__(self, arguments: Sequence[torch.Tensor]) -> Any:
        return self._module(*arguments)

    def signature(self) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """As the program's graph has them."""
        values = {node.name: node.meta.get("val") for node in self._program.graph.nodes}
        outputs = [values.get(str(name)) for name in self._program.graph_signature.user_outputs]
        named = _named([value for value in outputs if value is not None], self._path)
        return (
            [_spec(name, values[name], _sizes(values[name])) for name in self.argument_names],
            [_spec(name, value, _sizes(value)) for name, value in named.items()],
        )


def traced_inputs(path: Path) -> list[Any]:
    """The arguments a TorchScript file was traced with, as tensors without values; none if it was not traced.

    `torch.jit.load` leaves them where they are: in the archive's `traced_inputs`, in the format of a checkpoint whose
    storages are empty.
    """
    checkpoint = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(checkpoint, "w") as copy:
        for name in archive.namelist():
            member = name.partition("/")[2]
            if member.startswith("traced_inputs") or member in ("version", "byteorder"):
                copy.writestr(f"archive/{member.replace('traced_inputs', 'data')}", archive.read(name))
        if "archive/data.pkl" not in copy.namelist():
            return []
    checkpoint.seek(0)
    with torch.serialization.safe_globals([restore_type_tag]):
        recorded = torch.load(checkpoint, weights_only=True, map_location="meta")
    return list(recorded.get("forward", ()))


def _named(returned: Any, path: Path) -> dict[str, torch.Tensor]:
    """Results by name: a dictionary's keys, else OUTPUT__0, OUTPUT__1, ... Raises ModelLoadError for non-tensors."""
    if isinstance(returned, Mapping):
        named = {str(name): value for name, value in returned.items()}
    else:
        results = [returned] if isinstance(returned, torch.Tensor) else list(returned)
        named = {f"OUTPUT__{index}": value for index, value in enumerate(results)}
    if not all(isinstance(value, torch.Tensor) for value in named.values()):
        raise ModelLoadError(f"{path} returns something else than tensors; write a config.pbtxt, or wrap the model.")
    return named


def _sizes(value: torch.Tensor) -> list[int]:
    """-1 where a dimension varies."""
    return [size if type(size) is int else -1 for size in value.shape]


def _spec(name: str, value: torch.Tensor, shape: list[int]) -> TensorSpec:
    if value.dtype not in DATATYPES:
        raise ModelLoadError(f"The tensor {name!r} is of {value.dtype}, which cannot be served.")
    return TensorSpec(name, DATATYPES[value.dtype], shape)
