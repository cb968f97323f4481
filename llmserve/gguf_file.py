"""A GGUF file's header: its metadata and where its tensors lie. Knows no tokenizer, no model and no arithmetic.

`gguf.GGUFReader` wraps every string of the vocabulary in numpy arrays, which takes seconds (2 s for 49k tokens, 9 s for
262k); a tokenizer needs the metadata alone, and this reads it in tens of milliseconds.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llmserve.errors import ModelLoadError

T = TypeVar("T")

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
# Value types of the GGUF specification (ggml/docs/gguf.md), as `struct` codes.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

# ggml type -> (name, elements in a block, bytes of a block)
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor. `shape` is in numpy's order (outermost first), `ggml_type` a `gguf.GGMLQuantizationType` value."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int  # a key of GGML_TYPES
    offset: int  # bytes from the start of the file

    @property
    def type_name(self) -> str:
        """As ggml writes it: "Q4_1"."""
        return GGML_TYPES[self.ggml_type][0]

    @property
    def nbytes(self) -> int:
        _, block_size, block_bytes = GGML_TYPES[self.ggml_type]
        return math.prod(self.shape) // block_size * block_bytes


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """What the header says."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def require(self, key: str, kind: type[T]) -> T:
        """The metadata value of `key`. Raises ModelLoadError if the file does not have it, or has something else."""
        value = self.metadata.get(key)
        if value is None:
            raise ModelLoadError(f"{self.path}: the GGUF metadata lacks {key!r}; convert the model again.")
        if not isinstance(value, kind):
            raise ModelLoadError(f"{self.path}: {key!r} must be of type {kind.__name__}, not {type(value).__name__}.")
        return value

    def hparam(self, name: str, kind: type[T]) -> T:
        """A hyperparameter of the file's own architecture: `hparam("block_count", int)` is `llama.block_count`."""
        return self.require(f"{self.require('general.architecture', str)}.{name}", kind)

    def map(self) -> mmap.mmap:
        """The whole file as memory. Raises ModelLoadError if it is gone."""
        try:
            with self.path.open("rb") as file:
                # Copy-on-write and never written: torch and numpy take a writable buffer without complaint.
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{self.path}: cannot be read: {error}.") from error


def is_gguf(path: Path) -> bool:
    """Whether the file says of itself that it is GGUF."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_gguf(path: str | Path) -> GGUFFile:
    """Reads the header. Raises ModelLoadError, naming the file, if it is missing, damaged or of a foreign version."""
    path = Path(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _read(path, _Cursor(view))
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (struct.error, UnicodeDecodeError, ValueError, OverflowError, RecursionError) as error:
        raise ModelLoadError(
            f"{path}: the GGUF header is damaged or cut short ({error}); fetch the file again."
        ) from error


class _Cursor:
    """A position in the file. Every read checks the file's end: a damaged length must not be believed."""

    def __init__(self, view: mmap.mmap) -> None:
        self.view = view
        self.size = len(view)
        self.position = 0

    def take(self, num_bytes: int) -> bytes:
        start = self.position
        if num_bytes > self.size - start:
            raise ValueError(f"{num_bytes} bytes wanted at {start} of {self.size}")
        self.position = start + num_bytes
        return self.view[start : self.position]

    def scalar(self, code: str) -> Any:
        return self.scalars(code, 1)[0]

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def strings(self, count: int) -> list[str]:
        """`count` strings; the loop of the 10^5 tokens of a vocabulary, hence without the helpers."""
        view, size, position = self.view, self.size, self.position
        unpack = struct.Struct("<Q").unpack_from
        out: list[str] = []
        for _ in range(count):
            start = position + 8
            position = start + unpack(view, position)[0]
            if position > size:
                raise ValueError(f"a string at {start} ends at {position} of {size}")
            out.append(view[start:position].decode("utf-8"))
        self.position = position
        return out

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.scalar("I"), self.scalar("Q")
            if element == _STRING:
                return self.strings(count)
            if element == _ARRAY:
                return [self.value(_ARRAY) for _ in range(count)]
            return list(self.scalars(_code(element), count))
        return self.scalar(_code(kind))


def _code(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"unknown value type {kind}")
    return _SCALARS[kind]


def _read(path: Path, cursor: _Cursor) -> GGUFFile:
    if cursor.take(len(_MAGIC)) != _MAGIC:
        raise ModelLoadError(f"{path}: not a GGUF file (it does not begin with 'GGUF').")
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        hint = " It is big-endian." if version.to_bytes(4, "little")[::-1][0] in _VERSIONS else ""
        raise ModelLoadError(f"{path}: GGUF version {version} is not supported (2 and 3 are).{hint}")
    num_tensors, num_pairs = cursor.scalars("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    described = [_tensor(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    tensors = {name: TensorInfo(name, shape, ggml_type, start + offset) for name, shape, ggml_type, offset in described}
    for tensor in tensors.values():
        _check(path, tensor, cursor.size)
    return GGUFFile(path, metadata, tensors)


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    num_dims = cursor.scalar("I")
    if num_dims > _MAX_DIMS:
        raise ValueError(f"tensor {name!r} has {num_dims} dimensions")
    shape = cursor.scalars("Q", num_dims)[::-1]  # the file lists the innermost dimension first
    return name, shape, cursor.scalar("I"), cursor.scalar("Q")


def _check(path: Path, tensor: TensorInfo, file_bytes: int) -> None:
    if tensor.ggml_type not in GGML_TYPES:
        raise ModelLoadError(
            f"{path}: the tensor {tensor.name!r} has the ggml type {tensor.ggml_type}, which is not supported."
        )
    block_size = GGML_TYPES[tensor.ggml_type][1]
    if not tensor.shape or tensor.shape[-1] % block_size:
        shape = list(tensor.shape)
        raise ModelLoadError(
            f"{path}: the tensor {tensor.name!r} of shape {shape} cannot be {tensor.type_name}: damaged."
        )
    if tensor.offset + tensor.nbytes > file_bytes:
        raise ModelLoadError(
            f"{path} is cut short: the tensor {tensor.name!r} ends at byte {tensor.offset + tensor.nbytes}, "
            f"the file at {file_bytes}. Fetch it again."
        )
