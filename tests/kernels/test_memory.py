"""Where weights lie: apart from each other, aligned, and given back with their last tensor."""

from __future__ import annotations

import gc
import weakref

import torch

from llmserve.kernels.memory import WeightMemory


def test_pieces_are_aligned_and_do_not_overlap() -> None:
    memory = WeightMemory()
    shapes = [((3, 5), torch.uint8), ((7,), torch.int32), ((0, 4), torch.float32), ((1 << 20, 9), torch.float64)]
    pieces = [memory.empty(shape, dtype) for shape, dtype in shapes for _ in range(3)]
    for number, piece in enumerate(pieces):
        piece.fill_(number)
    for number, (piece, (shape, dtype)) in enumerate(
        zip(pieces, [each for each in shapes for _ in range(3)], strict=True)
    ):
        assert (piece.shape, piece.dtype) == (shape, dtype)
        assert piece.data_ptr() % 64 == 0
        assert (piece == number).all()


def test_a_mapping_goes_when_its_last_tensor_has_gone() -> None:
    memory = WeightMemory()
    first, second = memory.empty((100,), torch.uint8), memory.empty((100,), torch.uint8)
    mapping = weakref.ref(memory._mapping)
    del memory, first
    gc.collect()
    assert mapping() is not None
    second.fill_(1)
    del second
    gc.collect()
    assert mapping() is None
