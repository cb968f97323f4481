"""Launches the product kernel: which tiles, which partitions, and whether programs share those out. No arithmetic."""

from __future__ import annotations

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from llmserve.kernels.triton.gemm import add_parts_kernel, gemm_kernel
from llmserve.kernels.triton.quantize import QuantizedRows, quantize
from llmserve.kernels.triton.tables import GemmTiles
from llmserve.kernels.triton.weights import PackedWeight

_PROGRAMS = 264  # that the partitions of a weight should make with one tile of rows: two on each of 132 multiprocessors
_COLUMNS, _DEPTH = 128, 128  # by which partitions are reckoned: outputs and inputs
_ROW_TILES_TOGETHER = 8  # tiles of rows that run at the same time share the weights they read
_LINE_BYTES = 128  # of weights that a tile is deep


def partition_of(out_features: int, in_features: int) -> int:
    """How many inputs are summed from zero: a multiple of every tile's depth."""
    wanted = max(_PROGRAMS // triton.cdiv(out_features, _COLUMNS), 1)
    steps = triton.cdiv(in_features, _DEPTH)
    return int(max(triton.cdiv(steps, wanted), min(steps, 4))) * _DEPTH


def depth_of(weight: PackedWeight) -> int:
    """Inputs of a tile."""
    return weight.depth or _LINE_BYTES // weight.data.dtype.itemsize


def reorder(x: torch.Tensor, input_order: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """x [t, k] with its inputs as the weights have theirs: one order [k], or that of each row's expert [experts, k]."""
    if offsets is None:
        return x.index_select(1, input_order)
    expert = torch.searchsorted(offsets, torch.arange(len(x), device=x.device), right=True) - 1
    return x.gather(1, input_order[expert].long())


def choose_tiles(tiles: tuple[GemmTiles, ...], num_rows: int) -> GemmTiles:
    """The least tile that holds so many rows, or else the largest."""
    return next((tile for tile in tiles if tile.rows >= num_rows), tiles[-1])


def multiply(
    x: torch.Tensor,
    weight: PackedWeight,
    out_dtype: torch.dtype,
    tiles: tuple[GemmTiles, ...],
    min_programs: int,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [t, k] times one matrix, or that of each row's expert, whose rows are offsets[i]:offsets[i + 1] -> [t, n]."""
    if weight.input_order is not None:
        x = reorder(x, weight.input_order, offsets)
    rows = x.contiguous() if weight.input_dtype is None else quantize(x, weight.input_dtype)
    return multiply_rows(rows, weight, out_dtype, tiles, min_programs, offsets)


def multiply_rows(
    rows: torch.Tensor | QuantizedRows,
    weight: PackedWeight,
    out_dtype: torch.dtype,
    tiles: tuple[GemmTiles, ...],
    min_programs: int,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows [t, k] as the weight takes them: of its `input_dtype`, in its order of inputs.

    Partitions are shared out if there would be fewer than `min_programs` programs otherwise. `tiles`: from few rows to
    many. Shapes alone decide what is launched; nothing waits for the device.
    """
    assert (offsets is None) == (weight.num_experts == 0)
    assert isinstance(rows, QuantizedRows) == (weight.input_dtype is not None)
    x = rows.values if isinstance(rows, QuantizedRows) else rows
    num_rows, n, k = x.shape[0], weight.out_features, weight.in_features
    out = torch.empty((num_rows, n), dtype=out_dtype, device=x.device)
    if not num_rows:
        return out
    x_scale = rows.scales if isinstance(rows, QuantizedRows) else out
    tile = choose_tiles(tiles, triton.cdiv(num_rows, max(weight.num_experts, 1)))
    row_tiles = triton.cdiv(num_rows, tile.rows)
    if weight.num_experts:  # each expert's last tile may be partly empty
        row_tiles = num_rows // tile.rows + min(num_rows, weight.num_experts)
    num_tiles = row_tiles * triton.cdiv(n, tile.columns)
    partition, depth = partition_of(n, k), depth_of(weight)
    num_parts = triton.cdiv(k, partition)
    split = num_parts > 1 and num_tiles < min_programs
    parts = torch.empty((num_parts, num_rows, n), dtype=torch.float32, device=x.device) if split else out
    described = tile.descriptors and not weight.depth and k * x.itemsize % 16 == 0
    shape = {
        "N": n,
        "KIND": weight.kind,
        "HAS_BIAS": weight.bias is not None,
        "NUM_EXPERTS": weight.num_experts,
        "EXPERTS": triton.next_power_of_2(max(weight.num_experts, 1)),
    }
    scale, zeros, bias = (out if t is None else t for t in (weight.scale, weight.zeros, weight.bias))
    offsets = out if offsets is None else offsets
    gemm_kernel[(num_tiles, num_parts if split else 1)](
        TensorDescriptor.from_tensor(x, [tile.rows, depth]) if described else x,
        TensorDescriptor.from_tensor(weight.data.view(-1, k), [tile.columns, depth]) if described else weight.data,
        x_scale, scale, zeros, bias, offsets, out, parts, num_rows, K=k, GROUP=weight.group or k,
        PARTITION=partition, SPLIT=split, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=depth,
        TOGETHER=_ROW_TILES_TOGETHER, STAGES=tile.num_stages, DESCRIPTORS=described, num_warps=tile.num_warps, **shape,
    )  # fmt: skip
    if split:
        add_parts_kernel[(num_rows, triton.cdiv(n, 256))](
            parts, x_scale, scale, bias, offsets, out, num_rows, NUM_PARTS=num_parts, BLOCK=256,
            num_warps=2, **shape,
        )  # fmt: skip
    return out
