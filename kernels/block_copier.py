"""Copies of whole KV blocks between two memories, all layers at once: the interface, and its meaning in plain torch.

Knows no layout and no requests. A memory is a list of tensors, a layer's parts after another's, [blocks, ...] each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class BlockCopier(Protocol):
    """From one memory to another. Both stay where they are for as long as it lives."""

    def copy(self, pairs: torch.Tensor) -> None:
        """Copies blocks: pairs int64 [n, 2] of source and target, in the device's memory. No target stands twice: the
        pairs are copied at once. Nothing waits."""
        ...


def as_words(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each as int32 [blocks, words]."""
    return [part.flatten(1).view(torch.int32) for part in parts]


class ReferenceBlockCopier:
    """Implements `BlockCopier` in plain torch, where both memories are of one kind."""

    def __init__(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
        self._layers = list(zip(as_words(sources), as_words(targets), strict=True))

    def copy(self, pairs: torch.Tensor) -> None:
        source_ids, target_ids = pairs.unbind(1)
        for source, target in self._layers:
            target.index_copy_(0, target_ids, source.index_select(0, source_ids))
