"""Weight matrices packed for the product kernel: dense, of 8 bits and of 4, alone or those of all experts of a layer.

Knows no kernels, but how `gemm.py` reads a tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from llmserve.kernels.reference import DenseLinearWeight
from llmserve.kernels.weight_formats import DENSE, FP8, FP8_G128, INT8, MXFP4, ORDER, W4A16_GROUPS, row_features

_SLICE_ELEMENTS = 1 << 22  # converted at once: bounds the copies
BYTE_DTYPES = {INT8: torch.int8, FP8: torch.float8_e4m3fn}


@dataclass(slots=True, kw_only=True)
class PackedWeight:
    """[out, in], or of a mixture [e, out, in]. `num_experts` 0: it is one matrix."""

    format: str
    kind: str  # as `gemm_kernel` has it
    out_features: int
    in_features: int
    data: torch.Tensor  # [out, in] of x's dtype, int8 or fp8; of 4 bits uint8 [out, in / 2]
    scale: torch.Tensor | None = None  # float32 [out] or [groups, out]; of 4 bits float16, of mxfp4 uint8 [groups, out]
    zeros: torch.Tensor | None = None  # uint8 [groups, out]
    bias: torch.Tensor | None = None  # [out], of any float type
    input_order: torch.Tensor | None = None  # int32 [in]: which input stands at each place
    group: int = 0  # inputs that share a scale; 0: all
    depth: int = 0  # of 4 bits: inputs whose halves lie in the halves of bytes
    num_experts: int = 0
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        tensors = (self.data, self.scale, self.zeros, self.bias, self.input_order)
        self.nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def input_dtype(self) -> torch.dtype | None:
        """What its inputs are quantised to; None: they stay what they are."""
        return None if self.kind in ("dense", "w4", "mxfp4") else self.data.dtype


def pack_bytes(dense: torch.Tensor, bias: torch.Tensor | None, fmt: str) -> PackedWeight:
    """Any float type -> "int8" or "fp8": the largest value of an output becomes the format's largest."""
    dtype = BYTE_DTYPES[fmt]
    data = torch.empty(dense.shape, dtype=dtype, device=dense.device)
    scale = torch.empty(len(dense), dtype=torch.float32, device=dense.device)
    limit = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    for part in _row_slices(dense):
        rows = dense[part].float()
        largest = rows.abs().amax(dim=1)
        scale[part] = torch.where(largest > 0, largest / limit, 1.0)
        rows = rows / scale[part, None]
        data[part] = (rows.round_() if dtype == torch.int8 else rows.clamp_(-limit, limit)).to(dtype)
    return _byte_weight(fmt, data, scale, bias)


def pack_byte_rows(raw: torch.Tensor, bias: torch.Tensor | None, fmt: str) -> PackedWeight:
    """uint8 [out, bytes of a row], of each output a float32 scale, or one for each group, and its bytes: kept so."""
    if fmt == FP8_G128:
        num_groups = raw.shape[1] // (128 + 4)
        data, scale = _as(raw[:, 4 * num_groups :], BYTE_DTYPES[FP8]), _as(raw[:, : 4 * num_groups], torch.float32)
        return _byte_weight(fmt, data, scale.T.contiguous(), bias)
    return _byte_weight(fmt, _as(raw[:, 4:], BYTE_DTYPES[fmt]), _as(raw[:, :4], torch.float32)[:, 0], bias)


def pack_group_rows(
    raw: torch.Tensor, bias: torch.Tensor | None, fmt: str, input_order: torch.Tensor | None = None
) -> PackedWeight:
    """uint8 [out, bytes of a row] as `weight_formats` lays out a row of 4 bits."""
    assert (input_order is not None) == fmt.endswith(ORDER)
    group, in_features = W4A16_GROUPS[fmt], row_features(fmt, raw.shape[1])
    num_groups, depth = in_features // (group or in_features), w4_depth(group, in_features)
    factors = raw[:, in_features // 2 :]
    return PackedWeight(
        format=fmt,
        kind="w4",
        out_features=len(raw),
        in_features=in_features,
        data=_in_halves(raw[:, : in_features // 2], depth),
        scale=_as(factors[:, : 2 * num_groups], torch.float16).T.contiguous(),
        zeros=factors[:, 2 * num_groups :].T.contiguous(),
        bias=bias,
        input_order=None if input_order is None else input_order.to(raw.device, torch.int32),
        group=group,
        depth=depth,
    )


def pack_mxfp4_rows(raw: torch.Tensor, bias: torch.Tensor | None) -> PackedWeight:
    """uint8 [out, in / 2 + in / 32]: E2M1 numbers, then exponents."""
    in_features = raw.shape[1] // 17 * 32
    return PackedWeight(
        format=MXFP4,
        kind=MXFP4,
        out_features=len(raw),
        in_features=in_features,
        data=_in_halves(raw[:, : in_features // 2], 64),
        scale=raw[:, in_features // 2 :].T.contiguous(),
        bias=bias,
        group=32,
        depth=64,
    )


def _in_halves(pairs: torch.Tensor, depth: int) -> torch.Tensor:
    """uint8 [out, in / 2], bytes of two neighbours -> of input j of a stretch and input j + depth / 2."""
    data = torch.empty_like(pairs, memory_format=torch.contiguous_format)
    for part in _row_slices(pairs):
        some = pairs[part]
        numbers = torch.stack((some & 15, some >> 4), dim=-1).view(len(some), -1, 2, depth // 2)
        data[part] = (numbers[:, :, 0] | numbers[:, :, 1] << 4).flatten(1)
    return data


def w4_depth(group: int, in_features: int) -> int:
    """The most inputs that divide a group, up to what a tile holds."""
    return next(depth for depth in (128, 64, 32) if (group or in_features) % depth == 0)


def stack_experts(experts: Iterable[PackedWeight | DenseLinearWeight], num_experts: int) -> PackedWeight:
    """One matrix of all, each copied as it comes: two experts and the stack are the most there is at a time. Experts
    of different formats or shapes are a ValueError."""
    stacked: PackedWeight | None = None
    for index, expert in enumerate(experts):
        weight = _of_dense(expert) if isinstance(expert, DenseLinearWeight) else expert
        if stacked is None:
            stacked = _room_for(weight, num_experts)
        if (weight.format, weight.data.shape) != (stacked.format, stacked.data.shape[1:]):
            raise ValueError(f"Experts of one layer must be packed alike: {weight.format} beside {stacked.format}.")
        for name in ("data", "scale", "zeros", "bias", "input_order"):
            if (part := getattr(weight, name)) is not None:
                getattr(stacked, name)[index] = part
    assert stacked is not None
    return stacked


def _room_for(weight: PackedWeight, num_experts: int) -> PackedWeight:
    def room(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.new_empty((num_experts, *tensor.shape))

    return PackedWeight(
        format=weight.format,
        kind=weight.kind,
        out_features=weight.out_features,
        in_features=weight.in_features,
        data=weight.data.new_empty((num_experts, *weight.data.shape)),
        scale=room(weight.scale),
        zeros=room(weight.zeros),
        bias=room(weight.bias),
        input_order=room(weight.input_order),
        group=weight.group,
        depth=weight.depth,
        num_experts=num_experts,
    )


def _of_dense(weight: DenseLinearWeight) -> PackedWeight:
    return PackedWeight(
        format=DENSE,
        kind="dense",
        out_features=weight.out_features,
        in_features=weight.in_features,
        data=weight.weight,
        bias=weight.bias,
    )


def _byte_weight(fmt: str, data: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> PackedWeight:
    return PackedWeight(
        format=fmt,
        kind="fp8 groups" if fmt == FP8_G128 else fmt,
        out_features=data.shape[0],
        in_features=data.shape[1],
        data=data,
        scale=scale,
        bias=bias,
        group=128 if fmt == FP8_G128 else 0,
    )


def _as(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Some bytes of each row, copied, as another type. (A single row's stride, which `contiguous` keeps, may be odd)"""
    return part.clone(memory_format=torch.contiguous_format).view(dtype)


def _row_slices(matrix: torch.Tensor) -> Iterator[slice]:
    step = max(_SLICE_ELEMENTS // matrix.shape[1], 1)
    return (slice(start, start + step) for start in range(0, len(matrix), step))
