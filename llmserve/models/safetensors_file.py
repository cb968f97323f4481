"""Reads the headers of safetensors files: which tensors lie where. Knows no model and no torch.

The format is Hugging Face's: eight bytes of length, a JSON header, then the tensors. Written here rather than taken
from the `safetensors` package so that one mapping of the file serves all its tensors, and damage is named.
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmserve.errors import ModelLoadError
from llmserve.json_fields import read_json

_INDEX = "model.safetensors.index.json"
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1, "I32": 4, "I64": 8}


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """Where one tensor lies. `dtype` is the format's own name: "BF16", "I32"."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int  # from the start of the file
    nbytes: int


class SafetensorsFile:
    """An open safetensors file, mapped into memory.

    Raises ModelLoadError for a file that is truncated or damaged, or holds types that no model we know has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                # Copy-on-write and never written: torch takes a writable buffer without complaint.
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise ModelLoadError(f"{path} is missing: the model's index names it. Fetch the model again.") from None
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{path} cannot be read: {error}.") from error
        header_bytes = int.from_bytes(self.buffer[:8], "little")
        self._data_start = 8 + header_bytes
        if self._data_start > len(self.buffer):
            raise ModelLoadError(f"{path} is truncated or no safetensors file: its header does not fit in it.")
        try:
            header = json.loads(self.buffer[8 : self._data_start])
        except ValueError as error:
            raise ModelLoadError(f"{path} is damaged: its header is not JSON ({error}).") from error
        if not isinstance(header, dict):
            raise ModelLoadError(f"{path} is damaged: its header is not a JSON object.")
        self.tensors = {name: self._locate(name, entry) for name, entry in header.items() if name != "__metadata__"}

    def _locate(self, name: str, entry: Any) -> SafetensorsTensor:
        try:
            dtype, shape = entry["dtype"], tuple(int(size) for size in entry["shape"])
            start, end = (int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelLoadError(f"{self.path} is damaged: the header's entry of {name!r} is malformed.") from error
        if dtype not in _DTYPE_BYTES:
            raise ModelLoadError(
                f"{self.path}: the tensor {name!r} is of type {dtype}, which is not supported. "
                f"Supported: {', '.join(_DTYPE_BYTES)}. Use the unquantised model or a GGUF."
            )
        nbytes = math.prod(shape) * _DTYPE_BYTES[dtype]
        if start < 0 or end - start != nbytes:
            raise ModelLoadError(
                f"{self.path} is damaged: the tensor {name!r}, {dtype} {list(shape)}, cannot take {end - start} bytes."
            )
        if self._data_start + end > len(self.buffer):
            raise ModelLoadError(
                f"{self.path} is truncated: the tensor {name!r} ends at byte {self._data_start + end}, "
                f"the file at {len(self.buffer)}. Fetch it again."
            )
        return SafetensorsTensor(name, shape, dtype, self._data_start + start, nbytes)


def open_shards(folder: Path) -> list[SafetensorsFile]:
    """The files of a model folder: those its index names, or the single one there is."""
    index_path = folder / _INDEX
    if index_path.is_file():
        weight_map = read_json(index_path).child("weight_map").values
        if not all(isinstance(name, str) and Path(name).name == name for name in weight_map.values()):
            raise ModelLoadError(f"{index_path}: 'weight_map' must map tensors to names of files in the same folder.")
        return [SafetensorsFile(folder / name) for name in sorted(set(weight_map.values()))]
    paths = sorted(folder.glob("*.safetensors"))
    if (folder / "model.safetensors") in paths:
        paths = [folder / "model.safetensors"]
    if len(paths) != 1:
        raise ModelLoadError(
            f"{folder} holds {len(paths)} *.safetensors files and no {_INDEX}: one file or an index is needed. "
            "Weights in pickles (*.bin, *.pth) are not read, because reading them can run code."
        )
    return [SafetensorsFile(paths[0])]
