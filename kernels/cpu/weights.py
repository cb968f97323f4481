"""Weight matrices laid out for the GEMM kernels: dense fp32 and bf16, and int8 with a scale for each output.

Layout as in gemm.h: groups of 16 outputs, and within a group [lanes of k][16], a lane being 32 bits of one row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from llmserve.kernels.cpu.library import FORMATS, WeightStruct
from llmserve.kernels.memory import WeightMemory
from llmserve.kernels.weight_formats import DENSE, GGUF_FORMATS, INT8

GROUP = 16
_SLICE_ELEMENTS = 1 << 20  # of a matrix quantised or reordered at once: what that takes beside the result


class CPULinearWeight:
    """A packed [out, in] matrix with its scales and bias, and the struct that tells C where they are."""

    def __init__(
        self,
        fmt: str,
        kernel: str,
        shape: tuple[int, int],
        padded_in: int,
        data: torch.Tensor,
        scales: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        self.format = fmt
        self.out_features, self.in_features = shape
        self.padded_in = padded_in  # in_features as packed; the rest is zeros
        self.quantizes_input = FORMATS[kernel] >= FORMATS["int8"]
        bias = None if bias is None else pad_rows(bias.float())
        self._tensors = (data, scales, bias)  # kept alive: the struct points into them
        self.nbytes = sum(tensor.nbytes for tensor in self._tensors if tensor is not None)
        self._struct = WeightStruct(
            data.data_ptr(),
            None if scales is None else scales.data_ptr(),
            None if bias is None else bias.data_ptr(),
            self.out_features,
            padded_in,
            FORMATS[kernel],
        )
        self.pointer = ctypes.addressof(self._struct)


def pack_dense(weight: torch.Tensor, bias: torch.Tensor | None, memory: WeightMemory) -> CPULinearWeight:
    """[out, in] float32 or bfloat16, kept as it is."""
    kernel = "f32" if weight.dtype == torch.float32 else "bf16"
    padded = _pad_columns(weight, 4 // weight.itemsize)
    shape = (weight.shape[0], weight.shape[1])
    data = memory.empty((-(-shape[0] // GROUP), padded.shape[1] * padded.itemsize // 4, GROUP), torch.int32)
    data.copy_(pack_lanes(padded))
    return CPULinearWeight("dense", kernel, shape, padded.shape[1], data, bias=bias)


def pack_int8(weight: torch.Tensor, bias: torch.Tensor | None, memory: WeightMemory) -> CPULinearWeight:
    """[out, in] of any float type -> signed bytes, symmetric, one scale an output (absmax / 127)."""
    rows, columns = weight.shape
    padded_in = columns + -columns % 4
    data = memory.empty((-(-rows // GROUP), padded_in // 4, GROUP), torch.int32)
    scales = torch.empty(rows)
    for part, groups in row_slices(rows, columns):
        values = weight[part].float()
        scales[part] = values.abs().amax(dim=1) / 127
        quants = (values / scales[part].clamp(min=1e-35)[:, None]).round_().clamp_(-127, 127)
        data[groups] = pack_lanes(_pad_columns(quants, 4).add_(128).to(torch.uint8))
    return CPULinearWeight(INT8, INT8, (rows, columns), padded_in, data, pad_rows(scales), bias)


def pack_int8_rows(raw: torch.Tensor, bias: torch.Tensor | None, memory: WeightMemory) -> CPULinearWeight:
    """uint8 [out, 4 + in]: of each output the float32 scale, then its signed bytes; kept as they are."""
    rows, columns = raw.shape[0], raw.shape[1] - 4
    data = memory.empty((-(-rows // GROUP), (columns + -columns % 4) // 4, GROUP), torch.int32)
    for part, groups in row_slices(rows, columns):
        # Signed -> unsigned, + 128, which is how a missing column's zero is stored too.
        data[groups] = pack_lanes(F.pad(raw[part, 4:] ^ 0x80, (0, -columns % 4), value=0x80))
    scales = raw[:, :4].contiguous().view(torch.float32)[:, 0]
    return CPULinearWeight(INT8, INT8, (rows, columns), columns + -columns % 4, data, pad_rows(scales), bias)


def packed_bytes(fmt: str, out_features: int, in_features: int, dtype_bytes: int, has_bias: bool) -> int:
    """`nbytes` of a matrix in that format before it is packed: rows are padded to 16, columns to 4 bytes."""
    rows = out_features + -out_features % GROUP
    bias_bytes = 4 * rows if has_bias else 0
    if fmt == DENSE:
        return rows * (in_features * dtype_bytes + -in_features * dtype_bytes % 4) + bias_bytes
    if fmt == INT8:
        return rows * (in_features + -in_features % 4) + 4 * rows + bias_bytes
    weights, block_bytes = GGUF_FORMATS["q4_1" if fmt == "q4_k" else fmt]
    return rows * (in_features // weights) * block_bytes + bias_bytes


def row_slices(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Rows in slices of whole groups, and the groups they become: a large matrix is never in memory twice."""
    step = max(_SLICE_ELEMENTS // columns // GROUP, 1) * GROUP
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield slice(start, stop), slice(start // GROUP, -(-stop // GROUP))


def pack_lanes(matrix: torch.Tensor) -> torch.Tensor:
    """[out, in], `in` a multiple of 4 bytes -> int32 [out / 16, lanes, 16], a view; missing outputs are zeros."""
    lanes = pad_rows(matrix.contiguous().view(torch.int32))
    return lanes.view(-1, GROUP, lanes.shape[1]).transpose(1, 2)


def pad_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros appended along the first dimension up to a multiple of 16."""
    missing = -tensor.shape[0] % GROUP
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing)).contiguous() if missing else tensor.contiguous()


def _pad_columns(matrix: torch.Tensor, multiple: int) -> torch.Tensor:
    missing = -matrix.shape[1] % multiple
    return F.pad(matrix, (0, missing)) if missing else matrix
