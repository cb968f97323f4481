"""Rows of a quantised matrix in the formats of `weight_formats.py`, byte for byte as kernels take them. Knows no files.

They say the same numbers: int8 and fp8 rows exactly; 4 bits, Q4_0 and Q8_0 as long as fp16 holds the scale; Q4_1 but
for the product of scale and zero point, which is rounded to fp16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmserve.errors import ModelLoadError
from llmserve.kernels.weight_formats import FP8, FP8_G128, INT8, W4A16_GROUPS

BLOCK = 32  # inputs of a block of Q4_0, Q4_1 and Q8_0


@dataclass(frozen=True, slots=True)
class Rows:
    """Some outputs of a matrix, g groups of inputs: w = (value - zero) * scale."""

    values: torch.Tensor  # [n, in], whole numbers; of fp8, float32
    zeros: torch.Tensor  # [n, g] or [1, 1], whole numbers
    scales: torch.Tensor  # float32 [n, g] or [1, 1]


def encode_rows(fmt: str, rows: Rows, group_of: torch.Tensor, where: str) -> torch.Tensor:
    """uint8 [n, bytes of a row]. `group_of` int64 [in]: the group of each input, in order and of whole blocks. Raises
    ModelLoadError, naming the matrix, for numbers the format cannot hold."""
    if fmt in (INT8, FP8, FP8_G128):
        return _byte_rows(fmt, rows, where)
    if fmt in W4A16_GROUPS:
        return _w4_rows(rows, where)
    return _blocks(fmt, rows, group_of, where)


def _byte_rows(fmt: str, rows: Rows, where: str) -> torch.Tensor:
    if bool(rows.zeros.any()):
        raise ModelLoadError(f"{where}: zero points other than 0, but the configuration says symmetric.")
    values = rows.values.to(torch.int8 if fmt == INT8 else torch.float8_e4m3fn)
    return torch.cat((_bytes(rows.scales.expand(len(values), -1)), _bytes(values)), dim=1)


def _w4_rows(rows: Rows, where: str) -> torch.Tensor:
    """Pairs of inputs, scales, zero points."""
    numbers = rows.values.to(torch.uint8)
    scales = rows.scales.expand(len(numbers), -1)
    if not bool(scales.half().isfinite().all()):
        raise ModelLoadError(f"{where}: a scale of {float(scales.abs().max()):g}, which float16 does not hold.")
    zeros = rows.zeros.expand_as(scales).to(torch.uint8)
    pairs = numbers[:, 0::2] | numbers[:, 1::2] << 4
    return torch.cat((pairs, _bytes(scales.half()), zeros), dim=1)


def _bytes(matrix: torch.Tensor) -> torch.Tensor:
    """A copy, row by row. (A single column's stride, which `contiguous` keeps, may be anything.)"""
    return matrix.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _blocks(fmt: str, rows: Rows, group_of: torch.Tensor, where: str) -> torch.Tensor:
    """GGUF's."""
    count, groups = len(rows.values), group_of[::BLOCK]  # of each block
    scales = rows.scales[:, groups] if rows.scales.shape[1] > 1 else rows.scales.expand(count, len(groups))
    zeros = rows.zeros[:, groups] if rows.zeros.shape[1] > 1 else rows.zeros.expand(count, len(groups))
    values = rows.values.view(count, -1, BLOCK)
    factors = [scales.half()]
    if fmt == "q8_0":
        whole = values - zeros[..., None]
        if bool(((whole < -128) | (whole > 127)).any()):
            raise ModelLoadError(f"{where}: zero points far from 128, but the configuration says symmetric.")
        quants = whole.to(torch.int8).view(torch.uint8)
    else:
        nibbles = values.to(torch.uint8)
        quants = nibbles[:, :, : BLOCK // 2] | nibbles[:, :, BLOCK // 2 :] << 4
    if fmt == "q4_1":
        factors.append((-zeros * scales).half())
    elif fmt == "q4_0" and not bool((zeros == 8).all()):
        raise ModelLoadError(f"{where}: zero points other than 8, but the configuration says symmetric.")
    packed = torch.stack(factors, dim=-1).contiguous().view(torch.uint8).view(count, len(groups), -1)
    return torch.cat((packed, quants), dim=2).flatten(1)
