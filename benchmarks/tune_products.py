"""Candidates of the product kernel's tiles, and what they are tried on. Prints nothing; see `tune_kernels.py`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from benchmarks.tuning import Place, best
from llmserve.kernels.reference import DenseLinearWeight
from llmserve.kernels.triton.products import multiply
from llmserve.kernels.triton.tables import GemmTiles
from llmserve.kernels.triton.weights import PackedWeight, pack_bytes, pack_group_rows, stack_experts
from llmserve.kernels.weight_formats import row_bytes

BITS = (4, 8, 16)
_MATRICES = ((6144, 4096), (4096, 14336))  # Llama-3.1-8B: queries, keys and values; the way down
_EXPERTS, _EXPERT = 128, (1536, 2048)  # Qwen3-30B-A3B: gates and ups
# Rows of a tile -> rows of the calls it is for, and for a tile of the experts' rows likewise.
_ROWS = {16: (1, 16), 64: (64,), 128: (512, 4096)}


def candidates(rows: int, bits: int, place: Place) -> Iterator[GemmTiles]:
    """What the design allows with so many rows: an accumulator of at most 128 registers a thread."""
    if place.is_dry:
        yield GemmTiles(rows, 64, 4, 2, descriptors=bits != 4)
        return
    for columns, warps, stages, descriptors in product((64, 128, 256), (4, 8), (3, 4, 5), (False, True)):
        if rows * columns <= warps * 32 * 128 and not (bits == 4 and descriptors):
            yield GemmTiles(rows, columns, warps, stages, descriptors)


def _weight(bits: int, shape: tuple[int, int], place: Place, experts: int) -> PackedWeight:
    """Random numbers of whatever meaning: only their bytes count."""

    def one() -> PackedWeight | DenseLinearWeight:
        if bits == 4:
            raw = torch.randint(0, 16, (shape[0], row_bytes("w4a16_g128", shape[1])), device=place.device)
            return pack_group_rows(raw.to(torch.uint8), None, "w4a16_g128")
        dense = torch.randn(shape, device=place.device, dtype=torch.bfloat16)
        if bits == 16:
            return DenseLinearWeight(dense, None)
        return pack_bytes(dense, None, "fp8" if "fp8" in place.ops.weight_formats else "int8")

    if experts:
        return stack_experts((one() for _ in range(experts)), experts)
    weight = one()
    assert isinstance(weight, PackedWeight)
    return weight


def _cases(bits: int, rows: int, place: Place) -> list[tuple[torch.Tensor, PackedWeight, torch.Tensor | None]]:
    """Activations, weights, and where each expert's rows begin: dense weights are only those of experts."""
    experts, expert = (2, (64, 256)) if place.is_dry else (_EXPERTS, _EXPERT)
    matrices = ((64, 256),) if place.is_dry else _MATRICES
    calls = (3,) if place.is_dry else _ROWS[rows]
    cases: list[tuple[torch.Tensor, PackedWeight, torch.Tensor | None]] = []
    for shape, count in () if bits == 16 else product(matrices, calls):
        x = torch.randn(count, shape[1], device=place.device, dtype=torch.bfloat16)
        cases.append((x, _weight(bits, shape, place, 0), None))
    mixture = _weight(bits, expert, place, experts)
    for count in calls:
        x = torch.randn(count * experts, expert[1], device=place.device, dtype=torch.bfloat16)
        cases.append((x, mixture, torch.arange(0, count * experts + 1, count, device=place.device)))
    return cases


def best_row(bits: int, rows: int, place: Place) -> GemmTiles:
    """Of the tiles with so many rows."""

    def run(tiles: GemmTiles, case: tuple[torch.Tensor, PackedWeight, torch.Tensor | None]) -> torch.Tensor:
        x, weight, offsets = case
        return multiply(x, weight, x.dtype, (tiles,), place.min_programs, offsets)

    return best(place, candidates(rows, bits, place), _cases(bits, rows, place), run)
