"""A quantised Hugging Face folder as a source of plain tensors: finds each packed matrix's parts. Knows no layout."""

from __future__ import annotations

from collections.abc import Collection

import torch

from llmserve.errors import ModelLoadError
from llmserve.models.checkpoint_quantization import CheckpointQuantization
from llmserve.models.packed_weights import IGNORED_SUFFIXES, PackedMatrix, companions, word_tensor
from llmserve.models.safetensors_weights import BUFFER_TYPE, StoredTensors

_SLICE_ELEMENTS = 1 << 22  # unpacked at once: 16 MiB of float32


class QuantizedWeights:
    """Wraps the folder's tensors: what is packed appears as `<module>.weight`, all else as it is.

    Raises ModelLoadError, naming the tensor, for a part that is missing or of a shape that does not belong.
    """

    def __init__(
        self, stored: StoredTensors, quantization: CheckpointQuantization, formats: Collection[str] = ()
    ) -> None:
        """`formats`: see `open_weights`."""
        self.where = stored.where
        self._formats = formats
        self._stored = stored
        self._matrices: dict[str, PackedMatrix] = {}
        parts: set[str] = set()
        for name in stored.shapes:
            module, _, last = name.rpartition(".")
            if last == word_tensor(quantization) and _is_packed(stored, name, quantization):
                parts |= self._add(module, last, quantization)
        plain = [
            name
            for name, kind in stored.types.items()
            if name not in parts and kind != BUFFER_TYPE and not name.endswith(IGNORED_SUFFIXES)
        ]
        for name in plain:
            stored.require_float(name)
        self.shapes = {name: stored.shapes[name] for name in plain}
        self.shapes |= {name: matrix.shape for name, matrix in self._matrices.items()}
        self.types = {name: stored.types[name] for name in plain}
        self.types |= {name: matrix.type_name for name, matrix in self._matrices.items()}

    def _add(self, module: str, last: str, quantization: CheckpointQuantization) -> set[str]:
        """Adds a matrix, and returns the names of its tensors."""
        names = {last: f"{module}.{last}"}
        for part, is_required in companions(quantization).items():
            if f"{module}.{part}" in self._stored.shapes:
                names[part] = f"{module}.{part}"
            elif is_required:
                raise ModelLoadError(
                    f"{self.where}: the tensor '{module}.{part}' is missing beside '{module}.{last}', "
                    f"which {quantization} needs."
                )
        tensors = {part: self._stored.view(name) for part, name in names.items()}
        self._matrices[f"{module}.weight"] = PackedMatrix(
            f"{self.where}: {module!r}", tensors, quantization, self._formats
        )
        return set(names.values())

    def nbytes(self, name: str) -> int:
        return self._matrices[name].nbytes if name in self._matrices else self._stored.nbytes(name)

    def input_order(self, name: str) -> torch.Tensor | None:
        return self._matrices[name].input_order if name in self._matrices else None

    def read(self, name: str, out: torch.Tensor) -> None:
        matrix = self._matrices.get(name)
        if matrix is None:
            self._stored.read(name, out)
            return
        for part in _slices(*matrix.shape):
            matrix.read(out[part], part)

    def read_raw(self, name: str, out: torch.Tensor) -> None:
        matrix = self._matrices.get(name)
        if matrix is None:
            self._stored.read_raw(name, out)
            return
        for part in _slices(*matrix.shape):
            matrix.read_raw(out[part], part)


def _is_packed(stored: StoredTensors, name: str, quantization: CheckpointQuantization) -> bool:
    """Layouts whose matrix is called `weight` tell it from a plain one by its type."""
    return word_tensor(quantization) != "weight" or not stored.is_float(name)


def _slices(rows: int, columns: int) -> list[slice]:
    """Rows in slices of whole words, of a bounded number of elements."""
    step = max(_SLICE_ELEMENTS // columns // 32, 1) * 32
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
