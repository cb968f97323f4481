"""Weights under other names than their file's: prefixes and old spellings taken care of before a model asks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmserve.models.weights import WeightSource


class RenamedWeights:
    """A `WeightSource` over another one."""

    def __init__(self, source: WeightSource, rename: Callable[[str], str]) -> None:
        """`rename` maps a name in the file to the one it is known by here, no two to the same; "" leaves it out."""
        self._source = source
        self._original = {new: old for old in source.shapes if (new := rename(old))}
        self.where = source.where
        self.shapes = {new: source.shapes[old] for new, old in self._original.items()}
        self.types = {new: source.types[old] for new, old in self._original.items()}

    def nbytes(self, name: str) -> int:
        return self._source.nbytes(self._original[name])

    def read(self, name: str, out: torch.Tensor) -> None:
        self._source.read(self._original[name], out)

    def input_order(self, name: str) -> torch.Tensor | None:
        return self._source.input_order(self._original[name])

    def read_raw(self, name: str, out: torch.Tensor) -> None:
        self._source.read_raw(self._original[name], out)
