"""Reads the header of a GGUF file: metadata and where its tensors lie. Knows no model and decodes no weights.

The format is documented in ggml's docs/gguf.md. Written here rather than taken from the `gguf` package because that
one builds several numpy arrays for each string (two seconds for a vocabulary of 50k tokens), and because damage must
be reported by what is damaged. Versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmserve.errors import ModelLoadError

_SCALARS: dict[int, str] = {  # value type -> struct code
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

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
class GgufTensor:
    """Where one tensor lies. `shape` is row-major, as torch has it; GGUF itself writes it backwards."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int  # from the start of the file
    nbytes: int

    @property
    def type_name(self) -> str:
        return GGML_TYPES[self.type_id][0]


@dataclass(frozen=True, slots=True)
class _ArrayValue:
    """An array of the metadata, decoded only when asked for: vocabularies are long."""

    item_type: int
    count: int
    offset: int


class GgufFile:
    """An open GGUF file, mapped into memory.

    Raises ModelLoadError for a file that is no GGUF, of another version, truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                # Copy-on-write and never written: torch and numpy take a writable buffer without complaint.
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{path} cannot be read: {error}.") from error
        self._offset = 0
        self._metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            self._read_header()
        except (struct.error, IndexError) as error:
            raise ModelLoadError(
                f"{path} is truncated or damaged: its header does not end within {len(self.buffer)} bytes ({error})."
            ) from error

    def __contains__(self, key: str) -> bool:
        return key in self._metadata

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value: int, float, bool, str or a list of one of them."""
        value = self._metadata.get(key, default)
        if not isinstance(value, _ArrayValue):
            return value
        self._offset = value.offset
        return [self._read_value(value.item_type, key) for _ in range(value.count)]

    def _read_header(self) -> None:
        if self.buffer[:4] != b"GGUF":
            raise ModelLoadError(f"{self.path} is not a GGUF file: it does not begin with 'GGUF'.")
        self._offset = 4
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ModelLoadError(f"{self.path} is GGUF version {version}; versions 2 and 3, little-endian, are read.")
        num_tensors, num_values = self._scalar("<Q"), self._scalar("<Q")
        for _ in range(num_values):
            key = self._string()
            self._metadata[key] = self._read_value(self._scalar("<I"), key)
        tensors = [self._read_tensor_info() for _ in range(num_tensors)]
        alignment = self._metadata.get("general.alignment", 32)
        data_start = -(-self._offset // alignment) * alignment
        for name, shape, type_id, offset in tensors:
            self.tensors[name] = self._locate(name, shape, type_id, data_start + offset)

    def _read_value(self, value_type: int, key: str) -> Any:
        if value_type in _SCALARS:
            return self._scalar(_SCALARS[value_type])
        if value_type == _STRING:
            return self._string()
        if value_type != _ARRAY:
            raise ModelLoadError(f"{self.path}: the metadata key {key!r} has the unknown value type {value_type}.")
        item_type, count = self._scalar("<I"), self._scalar("<Q")
        array = _ArrayValue(item_type, count, self._offset)
        if item_type in _SCALARS:
            self._skip(count * struct.calcsize(_SCALARS[item_type]))
        elif item_type == _STRING:
            for _ in range(count):
                self._skip(self._scalar("<Q"))
        else:
            raise ModelLoadError(
                f"{self.path}: the metadata key {key!r} is an array of type {item_type}: not supported."
            )
        return array

    def _read_tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dims = self._scalar("<I")
        if num_dims > 4:
            raise ModelLoadError(f"{self.path}: the tensor {name!r} has {num_dims} dimensions; GGUF allows 4.")
        shape = tuple(reversed([self._scalar("<Q") for _ in range(num_dims)]))
        return name, shape, self._scalar("<I"), self._scalar("<Q")

    def _locate(self, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> GgufTensor:
        if type_id not in GGML_TYPES:
            raise ModelLoadError(
                f"{self.path}: the tensor {name!r} has the ggml type {type_id}, which is not supported."
            )
        type_name, block_size, block_bytes = GGML_TYPES[type_id]
        if not shape or shape[-1] % block_size:
            raise ModelLoadError(f"{self.path}: the tensor {name!r} of shape {shape} cannot be {type_name}: damaged.")
        nbytes = math.prod(shape) // block_size * block_bytes
        if offset + nbytes > len(self.buffer):
            raise ModelLoadError(
                f"{self.path} is truncated: the tensor {name!r} ends at byte {offset + nbytes}, "
                f"the file at {len(self.buffer)}. Fetch it again."
            )
        return GgufTensor(name, shape, type_id, offset, nbytes)

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self.buffer, self._offset)
        self._offset += struct.calcsize(code)
        return value

    def _string(self) -> str:
        length = self._scalar("<Q")
        start = self._offset
        self._skip(length)
        # Vocabularies do hold broken UTF-8, and a broken key is as good as a missing one.
        return self.buffer[start : start + length].decode("utf-8", errors="replace")

    def _skip(self, num_bytes: int) -> None:
        self._offset += num_bytes
        if self._offset > len(self.buffer):
            raise IndexError(f"a value ends at byte {self._offset}")
