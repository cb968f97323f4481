"""The product kernel: x [t, k] times W'[n, k] of 32, 16, 8 or 4 bits, for one matrix or each expert of a mixture.

x [t, k] @ w[n, k]^T -> [t, n]. Bytes of a decode: those of the weights, n * k * bits / 8, and their scales; operations
2 * t * n * k, on tensor cores. KIND says what a weight is:
  "dense"  of x's type.
  "int8", "fp8"  a byte, times a scale of its output; x is in bytes too, with a scale for each token.
  "fp8 groups"  likewise, but with a scale for each GROUP = DEPTH inputs of an output.
  "w4"  four bits without a sign, (q - zero) * scale for each group of inputs; a byte holds input j of a stretch of
        DEPTH in its low half and j + DEPTH / 2 in the high one, so that both halves are tiles as soon as unpacked.
        Scales multiply sums, not weights: the whole numbers q - zero are exact in x's type.
  "mxfp4"  E2M1 numbers in bytes likewise, DEPTH 64, so that each half is a group of 32, times a power of two: exact.

A row's result does not depend on the rows beside it. k is summed in partitions of a length that follows from the
weight's shape, each from zero, added from left to right: by one program that walks through all, or, where rows are few,
by a program a partition and a second kernel. And the weights stand on the left, W x^T: matrix instructions are laid out
by outputs then, and a tile of 16 rows or of 128 runs the same ones on each row, in the same order of k.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of_program(num_row_tiles, N: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr):
    """(tile of rows, tile of columns): TOGETHER tiles of rows run at a time and share the weights they read."""
    a_band = TOGETHER * tl.cdiv(N, COLUMNS)
    band = tl.program_id(0) // a_band
    height = tl.minimum(num_row_tiles - band * TOGETHER, TOGETHER)
    return band * TOGETHER + tl.program_id(0) % a_band % height, tl.program_id(0) % a_band // height


@triton.jit
def rows_of_tile(offsets_ptr, tile, num_rows, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """(expert, first row, end of its rows). Each expert's rows are cut into tiles of their own; a tile beyond the last
    has none. NUM_EXPERTS 0: all rows are of one matrix."""
    if NUM_EXPERTS == 0:
        return 0, tile * ROWS, num_rows
    expert = tl.arange(0, EXPERTS)
    start = tl.load(offsets_ptr + expert, mask=expert < NUM_EXPERTS, other=0).to(tl.int32)
    end = tl.load(offsets_ptr + expert + 1, mask=expert < NUM_EXPERTS, other=0).to(tl.int32)
    tiles = (end - start + ROWS - 1) // ROWS
    end_tile = tl.cumsum(tiles, axis=0)
    mine = tl.sum((end_tile <= tile).to(tl.int32), axis=0)
    first = tl.sum(tl.where(expert == mine, start + (tile - end_tile + tiles) * ROWS, 0), axis=0)
    return mine, first, tl.sum(tl.where(expert == mine, end, 0), axis=0)


@triton.jit
def group_of_line(line, end_line, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr):
    """Where the first group of each line stands in scales [experts, k / GROUP, n]; the next one is N behind it."""
    column = line - (end_line - N)
    return (line - column).to(tl.int64) * (K // GROUP) + column


@triton.jit
def sum_partition(
    x_ptr, w_ptr, scale_ptr, first_row, end_row, first_line, end_line, start, end, N: tl.constexpr, K: tl.constexpr,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[columns, rows] of inputs start:end, weights of 8 bits or dense. A line is one of w [experts * n, k]."""
    sums = tl.zeros([COLUMNS, ROWS], tl.int32 if KIND == "int8" else tl.float32)
    row, line = first_row + tl.arange(0, ROWS), first_line + tl.arange(0, COLUMNS)
    row_inside, line_inside = (row < end_row)[None, :], (line < end_line)[:, None]
    for first in tl.range(start, end, DEPTH, num_stages=STAGES):
        if DESCRIPTORS:  # lines of the next expert may come with these; they are not stored
            w = w_ptr.load([first_line, first])
            x = x_ptr.load([first_row, first]).T
        else:
            at = first + tl.arange(0, DEPTH)
            w_at = w_ptr + line[:, None].to(tl.int64) * K + at[None, :]
            x_at = x_ptr + row[None, :].to(tl.int64) * K + at[:, None]
            w = tl.load(w_at, mask=line_inside & (at < K)[None, :], other=0.0)
            x = tl.load(x_at, mask=row_inside & (at < K)[:, None], other=0.0)
        if KIND == "fp8 groups":
            group = group_of_line(line, end_line, N, K, DEPTH) + (first // DEPTH) * N
            scale = tl.load(scale_ptr + group, mask=line < end_line, other=0.0)
            sums += tl.dot(w, x, max_num_imprecise_acc=DEPTH) * scale[:, None]
        elif KIND == "fp8":  # Hopper's tensor cores add fp8 products with 14 bits: only so many at a time
            sums = tl.dot(w, x, sums, max_num_imprecise_acc=DEPTH)
        else:
            sums = tl.dot(w, x, sums, input_precision="ieee", out_dtype=sums.dtype)
    return sums.to(tl.float32)


@triton.jit
def sum_partition_w4(
    x_ptr, w_ptr, scale_ptr, zeros_ptr, first_row, end_row, first_line, end_line, start, end, N: tl.constexpr,
    K: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """As above, of 4 bits: w [experts * n, k / 2]; scale and zeros [experts, k / group, n]; DEPTH divides the group."""
    sums = tl.zeros([COLUMNS, ROWS], tl.float32)
    row, line = first_row + tl.arange(0, ROWS), first_line + tl.arange(0, COLUMNS)
    row_inside, line_inside = (row < end_row)[None, :], line < end_line
    half = tl.arange(0, DEPTH // 2)
    x_at = x_ptr + row[None, :].to(tl.int64) * K + half[:, None]
    w_at = w_ptr + line[:, None].to(tl.int64) * (K // 2) + half[None, :]
    group_at = group_of_line(line, end_line, N, K, GROUP)
    for first in tl.range(start, end, DEPTH, num_stages=STAGES):
        group = group_at + (first // GROUP) * N
        scale = tl.load(scale_ptr + group, mask=line_inside, other=0.0).to(tl.float32)
        zero = tl.load(zeros_ptr + group, mask=line_inside, other=0).to(tl.int8)
        pair = tl.load(w_at + first // 2, mask=line_inside[:, None], other=0)
        x_low = tl.load(x_at + first, mask=row_inside, other=0.0)
        x_high = tl.load(x_at + first + DEPTH // 2, mask=row_inside, other=0.0)
        low = ((pair & 15).to(tl.int8) - zero[:, None]).to(x_low.dtype)
        high = ((pair >> 4).to(tl.int8) - zero[:, None]).to(x_low.dtype)
        group_sums = tl.dot(low, x_low, input_precision="ieee")
        group_sums = tl.dot(high, x_high, group_sums, input_precision="ieee")
        sums += group_sums * scale[:, None]
    return sums


@triton.jit
def twice_e2m1(code):
    """The number of four bits, of an integer type, times two, so that it is whole: 0 1 2 3 4 6 8 12, or less than 0."""
    exponent, half = (code >> 1) & 3, code & 1
    amount = tl.where(exponent == 0, half, (2 + half) << tl.maximum(exponent - 1, 0))
    return tl.where(code >= 8, -amount, amount)


@triton.jit
def sum_partition_mxfp4(
    x_ptr, w_ptr, exponent_ptr, first_row, end_row, first_line, end_line, start, end, N: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As above, of E2M1. Exponents uint8 [experts, k / 32, n], 127 for one."""
    sums = tl.zeros([COLUMNS, ROWS], tl.float32)
    row, line = first_row + tl.arange(0, ROWS), first_line + tl.arange(0, COLUMNS)
    row_inside, line_inside = (row < end_row)[None, :], line < end_line
    half = tl.arange(0, 32)
    x_at = x_ptr + row[None, :].to(tl.int64) * K + half[:, None]
    w_at = w_ptr + line[:, None].to(tl.int64) * (K // 2) + half[None, :]
    group_at = group_of_line(line, end_line, N, K, 32)
    for first in tl.range(start, end, 64, num_stages=STAGES):
        pair = tl.load(w_at + first // 2, mask=line_inside[:, None], other=0).to(tl.int32)
        exponent_at = exponent_ptr + group_at + (first // 32) * N
        low_exponent = tl.load(exponent_at, mask=line_inside, other=1).to(tl.int32)
        high_exponent = tl.load(exponent_at + N, mask=line_inside, other=1).to(tl.int32)
        x_low = tl.load(x_at + first, mask=row_inside, other=0.0)
        x_high = tl.load(x_at + first + 32, mask=row_inside, other=0.0)
        # The bits of a float32 that is a power of two, half of the scale.
        low_scale = (tl.maximum(low_exponent - 1, 0) << 23).to(tl.float32, bitcast=True)
        high_scale = (tl.maximum(high_exponent - 1, 0) << 23).to(tl.float32, bitcast=True)
        low = (twice_e2m1(pair & 15).to(tl.float32) * low_scale[:, None]).to(x_low.dtype)
        high = (twice_e2m1(pair >> 4).to(tl.float32) * high_scale[:, None]).to(x_low.dtype)
        sums = tl.dot(low, x_low, sums, input_precision="ieee")
        sums = tl.dot(high, x_high, sums, input_precision="ieee")
    return sums


@triton.jit
def finish(
    total, x_scale_ptr, w_scale_ptr, bias_ptr, row, row_inside, line, line_inside, KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """[columns, rows] from sums: times both scales, plus the bias; fma is spelt out, so that kernels round alike."""
    bias = tl.zeros([total.shape[0]], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + line, mask=line_inside, other=0.0).to(tl.float32)
    if KIND == "dense" or KIND == "w4" or KIND == "mxfp4":
        return total + bias[:, None] if HAS_BIAS else total
    row_scale = tl.load(x_scale_ptr + row, mask=row_inside, other=0.0)
    line_scale = tl.full([total.shape[0]], 1.0, tl.float32)
    if KIND != "fp8 groups":
        line_scale = tl.load(w_scale_ptr + line, mask=line_inside, other=0.0)
    wide = tl.broadcast_to(line_scale[:, None], total.shape)
    return tl.fma(total * row_scale[None, :], wide, tl.broadcast_to(bias[:, None], total.shape))


@triton.jit(do_not_specialize=["num_rows"])
def gemm_kernel(
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, zeros_ptr, bias_ptr, offsets_ptr, out_ptr, parts_ptr, num_rows,
    N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, PARTITION: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TOGETHER: tl.constexpr, STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Grid: tiles, and partitions if SPLIT: parts float32 [partitions, t, n]. NUM_EXPERTS: rows are sorted by expert,
    offsets [experts + 1]. DESCRIPTORS: x_ptr and w_ptr are tensor descriptors of [t, k] and [experts * n, k]."""
    num_row_tiles = tl.cdiv(num_rows, ROWS)
    if NUM_EXPERTS:
        num_row_tiles = num_rows // ROWS + tl.minimum(num_rows, NUM_EXPERTS)
    tile, column_tile = tile_of_program(num_row_tiles, N, COLUMNS, TOGETHER)
    expert, first_row, end_row = rows_of_tile(offsets_ptr, tile, num_rows, NUM_EXPERTS, EXPERTS, ROWS)
    if first_row >= end_row:
        return
    first_line, end_line = expert * N + column_tile * COLUMNS, expert * N + N
    first_part, end_part = 0, tl.cdiv(K, PARTITION)
    if SPLIT:
        first_part, end_part = tl.program_id(1), tl.program_id(1) + 1
    total = tl.zeros([COLUMNS, ROWS], tl.float32)
    for part in range(first_part, end_part):
        start, end = part * PARTITION, tl.minimum(part * PARTITION + PARTITION, K)
        if KIND == "w4":
            total += sum_partition_w4(
                x_ptr, w_ptr, w_scale_ptr, zeros_ptr, first_row, end_row, first_line, end_line, start, end, N, K, GROUP,
                ROWS, COLUMNS, DEPTH, STAGES,
            )  # fmt: skip
        elif KIND == "mxfp4":
            total += sum_partition_mxfp4(
                x_ptr, w_ptr, w_scale_ptr, first_row, end_row, first_line, end_line, start, end, N, K, ROWS, COLUMNS,
                STAGES,
            )  # fmt: skip
        else:
            total += sum_partition(
                x_ptr, w_ptr, w_scale_ptr, first_row, end_row, first_line, end_line, start, end, N, K, KIND, ROWS,
                COLUMNS, DEPTH, STAGES, DESCRIPTORS,
            )  # fmt: skip
    row, line = first_row + tl.arange(0, ROWS), first_line + tl.arange(0, COLUMNS)
    row_inside, line_inside = row < end_row, line < end_line
    at_out = row[None, :].to(tl.int64) * N + (line - expert * N)[:, None]
    inside = line_inside[:, None] & row_inside[None, :]
    if SPLIT:
        tl.store(parts_ptr + tl.program_id(1) * num_rows.to(tl.int64) * N + at_out, total, mask=inside)
    else:
        out = finish(total, x_scale_ptr, w_scale_ptr, bias_ptr, row, row_inside, line, line_inside, KIND, HAS_BIAS)
        tl.store(out_ptr + at_out, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def add_parts_kernel(
    parts_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, offsets_ptr, out_ptr, num_rows, N: tl.constexpr,
    NUM_PARTS: tl.constexpr, KIND: tl.constexpr, HAS_BIAS: tl.constexpr, NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: rows, and blocks of columns. Adds the partitions from left to right."""
    expert, _, _ = rows_of_tile(offsets_ptr, tl.program_id(0), num_rows, NUM_EXPERTS, EXPERTS, 1)
    row = tl.program_id(0) + tl.arange(0, 1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    at = row[None, :].to(tl.int64) * N + column[:, None]
    total = tl.zeros([BLOCK, 1], tl.float32)
    for part in tl.static_range(NUM_PARTS):
        total += tl.load(parts_ptr + part * num_rows.to(tl.int64) * N + at, mask=inside[:, None], other=0.0)
    line = expert * N + column
    out = finish(total, x_scale_ptr, w_scale_ptr, bias_ptr, row, row < num_rows, line, inside, KIND, HAS_BIAS)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside[:, None])
