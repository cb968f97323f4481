"""Weights packed for oneDNN, torch's CPU matrix library: how to pack, and how to multiply. Knows no other op.

Why not `F.linear`: with a weight reordered once into oneDNN's blocked layout the product is 1.1 to 5 times faster, and
a row's result is the same bits whatever rows stand beside it. `tests/kernels/test_reference.py` holds it to that.
"""

from __future__ import annotations

import torch

_PACKABLE = (torch.float32, torch.bfloat16)


class OneDnnLinearWeight:
    """A [out, in] matrix in oneDNN's layout, on the CPU, in float32 or bfloat16."""

    format = "dense"

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)
        self._bias = bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x [t, in] -> x @ W^T + bias [t, out]."""
        if x.shape[0] == 0:
            return x.new_empty(0, self.out_features)
        if x.shape[0] == 1:
            # A single row may take a vector kernel that sums in another order; two rows take the matrix kernel.
            return self._multiply(x.expand(2, -1).contiguous())[:1]
        return self._multiply(x)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return y


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN takes this weight on this machine; if not, `F.linear` is the way."""
    if weight.device.type != "cpu" or weight.dtype not in _PACKABLE or not torch._C._has_mkldnn:
        return False
    return weight.dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
