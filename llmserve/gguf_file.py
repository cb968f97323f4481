"""A GGUF file's header: its metadata and where its tensors lie. Knows no tokenizer, no model and no arithmetic.

`gguf.GGUFReader` wraps every string of the vocabulary in numpy arrays, which takes seconds (2 s for 49k tokens, 9 s for
262k); a tokenizer needs the metadata alone, and this reads it in tens of milliseconds.
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor. `shape` is in numpy's order (outermost first), `ggml_type` a `gguf.GGMLQuantizationType` value."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int  # bytes from the start of the file


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
    return GGUFFile(path, metadata, tensors)


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    num_dims = cursor.scalar("I")
    if num_dims > _MAX_DIMS:
        raise ValueError(f"tensor {name!r} has {num_dims} dimensions")
    shape = cursor.scalars("Q", num_dims)[::-1]  # the file lists the innermost dimension first
    return name, shape, cursor.scalar("I"), cursor.scalar("Q")
