"""Tensors of fixed-size elements as numpy arrays for the server's own use. Widens bfloat16, which numpy lacks."""

from __future__ import annotations

import numpy as np

from llmserve.backends.tensors import DTYPES, Array
from llmserve.inference import Tensor


def to_array(tensor: Tensor) -> Array:
    """The values, in the tensor's shape: a view; BF16 as float32. Not for BYTES."""
    if tensor.datatype == "BF16":
        return (np.frombuffer(tensor.data, "<u2").astype("<u4") << 16).view("<f4").reshape(tensor.shape)
    return np.frombuffer(tensor.data, DTYPES[tensor.datatype]).reshape(tensor.shape)


def to_bfloat16(values: Array) -> bytes:
    """float32 values rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet_nan, rounded).astype("<u2").tobytes()
