"""Weight matrices laid out for the GEMM kernels: dense fp32 and bf16, and int8 with a scale for each output.

Layout as in gemm.h: groups of 16 outputs, and within a group [lanes of k][16], a lane being 32 bits of one row.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F

from llmserve.kernels.cpu.library import FORMATS, WeightStruct

GROUP = 16


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


def pack_dense(weight: torch.Tensor, bias: torch.Tensor | None) -> CPULinearWeight:
    """[out, in] float32 or bfloat16, kept as it is."""
    kernel = "f32" if weight.dtype == torch.float32 else "bf16"
    padded = _pad_columns(weight, 4 // weight.itemsize)
    shape = (weight.shape[0], weight.shape[1])
    return CPULinearWeight("dense", kernel, shape, padded.shape[1], pack_lanes(padded), bias=bias)


def pack_int8(weight: torch.Tensor, bias: torch.Tensor | None) -> CPULinearWeight:
    """[out, in] of any float type -> signed bytes, symmetric, one scale an output (absmax / 127)."""
    values = weight.float()
    scales = values.abs().amax(dim=1) / 127
    quants = (values / scales.clamp(min=1e-35)[:, None]).round_().clamp_(-127, 127)
    offset = _pad_columns(quants, 4).add_(128).to(torch.uint8)
    shape = (weight.shape[0], weight.shape[1])
    return CPULinearWeight("int8", "int8", shape, offset.shape[1], pack_lanes(offset), pad_rows(scales), bias)


def pack_lanes(matrix: torch.Tensor) -> torch.Tensor:
    """[out, in], `in` a multiple of 4 bytes -> int32 [out / 16, lanes, 16]; missing outputs are zeros."""
    lanes = pad_rows(matrix.contiguous().view(torch.int32))
    return lanes.view(-1, GROUP, lanes.shape[1]).transpose(1, 2).contiguous()


def pad_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros appended along the first dimension up to a multiple of 16."""
    missing = -tensor.shape[0] % GROUP
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing)).contiguous() if missing else tensor.contiguous()


def _pad_columns(matrix: torch.Tensor, multiple: int) -> torch.Tensor:
    missing = -matrix.shape[1] % multiple
    return F.pad(matrix, (0, missing)) if missing else matrix
