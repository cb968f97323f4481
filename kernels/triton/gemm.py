"""Products with weights in 8 bits: activations quantised per token, weights per output, int8 or fp8 (e4m3). No packing.

x [t, k] -> x' [t, k] in 8 bits with scale [t], times W' [n, k] with scale [n], -> [t, n]. Bytes of a decode: n * k,
half of those in 16 bits; operations 2 * t * n * k on tensor cores, twice as fast as in 16 bits.

A row's result does not depend on the rows beside it: a token's scale is its own; tiles are the same for any number of
rows; and k is summed in partitions of a length that follows from the weight's shape, each from zero, added from left to
right. With few rows each program takes one partition, or a few columns of weights could not keep the GPU busy, and a
second kernel adds them in the same order; with many, a program walks through all of them.
"""

import torch
import triton
import triton.language as tl

_ROWS, _COLUMNS, _DEPTH, _WARPS = 64, 128, 128, 4
_PROGRAMS = 264  # that the partitions of a weight should make with one tile of rows: two on each of 132 multiprocessors
_ROW_TILES_TOGETHER = 8  # tiles of rows that run at the same time share the weights they read


@triton.jit
def quantize_kernel(x_ptr, out_ptr, scale_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    """Grid: tokens. A token with a NaN or an infinity gets a scale of NaN, so that all its results are NaN."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    x = tl.load(x_ptr + row * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    amount = tl.max(tl.abs(x), axis=0)
    scale = tl.where(amount > 0, amount / LARGEST, 1.0)
    spoilt = tl.sum(x * 0.0, axis=0)  # NaN if anything is not finite
    scaled = x / scale
    if out_ptr.dtype.element_ty == tl.int8:
        scaled = tl.floor(tl.where(scaled == scaled, scaled, 0.0) + 0.5)
    tl.store(out_ptr + row * SIZE + column, scaled.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale + spoilt)


@triton.jit
def finish(total, row_scale, column_scale, bias):
    """[rows, columns] from sums, scales and bias; fma is spelt out, so that every kernel rounds alike."""
    wide = tl.broadcast_to(column_scale[None, :], total.shape)
    return tl.fma(total * row_scale[:, None], wide, tl.broadcast_to(bias[None, :], total.shape))


@triton.jit(do_not_specialize=["num_rows"])
def gemm_kernel(
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, parts_ptr, num_rows, N: tl.constexpr, K: tl.constexpr,
    PARTITION: tl.constexpr, SPLIT: tl.constexpr, INTEGER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, TOGETHER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: tiles, and partitions if SPLIT: parts float32 [partitions, t, n]."""
    num_row_tiles = tl.cdiv(num_rows, ROWS)
    a_band = TOGETHER * tl.cdiv(N, COLUMNS)
    band = tl.program_id(0) // a_band
    height = tl.minimum(num_row_tiles - band * TOGETHER, TOGETHER)
    row = (band * TOGETHER + tl.program_id(0) % a_band % height) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % a_band // height * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    x_row_ptr = x_ptr + row[:, None].to(tl.int64) * K
    w_row_ptr = w_ptr + column[None, :].to(tl.int64) * K
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    first_part = 0
    end_part = tl.cdiv(K, PARTITION)
    if SPLIT:
        first_part = tl.program_id(1)
        end_part = first_part + 1
    for part in range(first_part, end_part):
        sums = tl.zeros([ROWS, COLUMNS], tl.int32 if INTEGER else tl.float32)
        for start in tl.range(part * PARTITION, tl.minimum(part * PARTITION + PARTITION, K), DEPTH, num_stages=STAGES):
            at = start + depth
            x = tl.load(x_row_ptr + at[None, :], mask=(row < num_rows)[:, None] & (at < K)[None, :], other=0.0)
            w = tl.load(w_row_ptr + at[:, None], mask=(column < N)[None, :] & (at < K)[:, None], other=0.0)
            sums = tl.dot(x, w, sums, out_dtype=sums.dtype)
        total += sums.to(tl.float32)
    inside = (row < num_rows)[:, None] & (column < N)[None, :]
    at_out = row[:, None].to(tl.int64) * N + column[None, :]
    if SPLIT:
        tl.store(parts_ptr + tl.program_id(1) * num_rows.to(tl.int64) * N + at_out, total, mask=inside)
    else:
        row_scale = tl.load(x_scale_ptr + row, mask=row < num_rows, other=0.0)
        column_scale = tl.load(w_scale_ptr + column, mask=column < N, other=0.0)
        bias = tl.load(bias_ptr + column, mask=column < N, other=0.0)
        out = finish(total, row_scale, column_scale, bias)
        tl.store(out_ptr + at_out, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def add_parts_kernel(
    parts_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, num_rows, N: tl.constexpr, NUM_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: rows, and blocks of columns. Adds the partitions from left to right."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * N + column[None, :]
    total = tl.zeros([1, BLOCK], tl.float32)
    for part in tl.static_range(NUM_PARTS):
        total += tl.load(parts_ptr + part * num_rows.to(tl.int64) * N + at, mask=(column < N)[None, :], other=0.0)
    column_scale = tl.load(w_scale_ptr + column, mask=column < N, other=0.0)
    bias = tl.load(bias_ptr + column, mask=column < N, other=0.0)
    out = finish(total, tl.load(x_scale_ptr + row + tl.arange(0, 1)), column_scale, bias)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=(column < N)[None, :])


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [t, k] -> x' [t, k] of int8 or float8_e4m3fn, and its scales float32 [t]."""
    assert x.is_contiguous()
    num_rows, size = x.shape
    out = torch.empty((num_rows, size), dtype=dtype, device=x.device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if num_rows:
        block = triton.next_power_of_2(size)
        largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
        warps = min(max(block // 512, 1), 16)
        quantize_kernel[(num_rows,)](x, out, scale, SIZE=size, BLOCK=block, LARGEST=largest, num_warps=warps)
    return out, scale


def partition_of(out_features: int, in_features: int) -> int:
    """How many inputs are summed from zero: a multiple of the tile's depth."""
    wanted = max(_PROGRAMS // triton.cdiv(out_features, _COLUMNS), 1)
    steps = triton.cdiv(in_features, _DEPTH)
    return int(max(triton.cdiv(steps, wanted), min(steps, 4))) * _DEPTH


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    out_dtype: torch.dtype,
    min_programs: int,
    num_stages: int,
) -> torch.Tensor:
    """x [t, k] @ weight'[n, k]^T * weight_scale[n] + bias float32 [n] -> [t, n]. Partitions are shared out if there
    would be fewer than `min_programs` programs otherwise."""
    (num_rows, in_features), out_features = x.shape, weight.shape[0]
    out = torch.empty((num_rows, out_features), dtype=out_dtype, device=x.device)
    if not num_rows:
        return out
    quantised, scale = quantize(x, weight.dtype)
    partition = partition_of(out_features, in_features)
    num_parts = triton.cdiv(in_features, partition)
    num_tiles = triton.cdiv(num_rows, _ROWS) * triton.cdiv(out_features, _COLUMNS)
    split = num_parts > 1 and num_tiles < min_programs
    parts = out
    if split:
        parts = torch.empty((num_parts, num_rows, out_features), dtype=torch.float32, device=x.device)
    gemm_kernel[(num_tiles, num_parts if split else 1)](
        quantised, weight, scale, weight_scale, bias, out, parts, num_rows, N=out_features, K=in_features,
        PARTITION=partition, SPLIT=split, INTEGER=weight.dtype == torch.int8, ROWS=_ROWS, COLUMNS=_COLUMNS,
        DEPTH=_DEPTH, TOGETHER=_ROW_TILES_TOGETHER, STAGES=num_stages, num_warps=_WARPS,
    )  # fmt: skip
    if split:
        add_parts_kernel[(num_rows, triton.cdiv(out_features, 256))](
            parts, scale, weight_scale, bias, out, num_rows, N=out_features, NUM_PARTS=num_parts, BLOCK=256, num_warps=2
        )
    return out
