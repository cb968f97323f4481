"""Weight matrices packed for the Triton ops: dense, or a byte a weight and a scale an output. Knows no kernels."""

from __future__ import annotations

import torch

from llmserve.kernels.weight_formats import INT8

_PACK_ROWS = 4096  # outputs quantised at once: bounds the float32 copy


class ByteLinearWeight:
    """weight [out, in] of int8, scale and bias float32 [out]."""

    format = INT8

    def __init__(self, dense: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Rounds to the nearest of 255 values a row."""
        self.out_features, self.in_features = dense.shape
        self.weight = torch.empty(dense.shape, dtype=torch.int8, device=dense.device)
        self.scale = torch.empty(self.out_features, dtype=torch.float32, device=dense.device)
        for first in range(0, self.out_features, _PACK_ROWS):
            rows = dense[first : first + _PACK_ROWS].float()
            largest = rows.abs().amax(dim=1)
            scale = torch.where(largest > 0, largest / 127.0, 1.0)
            self.scale[first : first + _PACK_ROWS] = scale
            self.weight[first : first + _PACK_ROWS] = (rows / scale[:, None]).round_().to(torch.int8)
        self.bias = torch.zeros_like(self.scale) if bias is None else bias.float()
        self.nbytes = self.weight.nbytes + self.scale.nbytes + self.bias.nbytes


def byte_linear_bytes(out_features: int, in_features: int) -> int:
    """`ByteLinearWeight.nbytes`, known before it is packed."""
    return out_features * (in_features + 8)
