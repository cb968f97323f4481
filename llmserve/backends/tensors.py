"""Tensors as numpy arrays and as the bytes they are on the wire, without a copy where there can be none.

Knows no process and no model. BYTES elements are a length as uint32, then the bytes; as an array they are objects.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmserve.backends.shared_memory import Buffer

Array = NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_DATATYPES = {dtype: datatype for datatype, dtype in DTYPES.items()}
_LENGTH = struct.Struct("<I")


def dtype_of(datatype: str) -> np.dtype[Any]:
    """FP32 -> float32; BYTES -> object; BF16 needs the package `ml_dtypes`. Raises ValueError."""
    if datatype == "BYTES":
        return np.dtype(object)
    if datatype == "BF16":
        return _bfloat16()
    try:
        return DTYPES[datatype]
    except KeyError:
        raise ValueError(f"There is no datatype {datatype!r}.") from None


def datatype_of(array: Array) -> str:
    """float32 -> FP32; objects and strings -> BYTES. Raises ValueError for what v2 has no datatype for."""
    dtype = array.dtype
    datatype = _DATATYPES.get(dtype)
    if datatype is None:
        if dtype.kind in "OSU":
            return "BYTES"
        if dtype.name == "bfloat16":
            return "BF16"
        datatype = _DATATYPES.get(dtype.newbyteorder("<"))
    if datatype is None:
        raise ValueError(f"An array of {dtype} has no datatype of the Open Inference Protocol; convert it.")
    return datatype


def to_array(datatype: str, shape: Sequence[int], data: memoryview) -> Array:
    """The array that `data` holds: a view of it, but for BYTES. Raises ValueError if they do not fit."""
    if datatype == "BYTES":
        return decode_bytes(data).reshape(shape)
    return np.frombuffer(data, dtype_of(datatype)).reshape(shape)


def to_wire(array: Array) -> tuple[str, Buffer]:
    """The datatype and the bytes of an array: a view if it is contiguous and little-endian. Raises ValueError."""
    datatype = datatype_of(array)
    if datatype == "BYTES":
        return datatype, encode_bytes(array)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    if array.nbytes < 4096:
        return datatype, array.tobytes()  # cheaper than a view of so little
    array = np.ascontiguousarray(array)
    return datatype, array.reshape(-1).view(np.uint8).data


def decode_bytes(data: memoryview) -> Array:
    """A flat array of `bytes` objects. Raises ValueError if an element is cut short."""
    elements: list[bytes] = []
    position, end = 0, len(data)
    while position < end:
        if end - position < 4:
            raise ValueError("A BYTES tensor ends within the length of an element.")
        (length,) = _LENGTH.unpack_from(data, position)
        position += 4 + length
        if position > end:
            raise ValueError(f"A BYTES tensor ends within an element of {length} bytes.")
        elements.append(bytes(data[position - length : position]))
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array


def encode_bytes(array: Array) -> bytes:
    """The elements of an array of `bytes`, `str` or anything with a text form, row-major."""
    parts: list[bytes] = []
    for element in array.reshape(-1).tolist():
        if isinstance(element, str):
            element = element.encode()
        elif not isinstance(element, bytes):
            element = bytes(element) if isinstance(element, (bytearray, memoryview)) else str(element).encode()
        parts.append(_LENGTH.pack(len(element)))
        parts.append(element)
    return b"".join(parts)


def _bfloat16() -> np.dtype[Any]:
    try:
        import ml_dtypes
    except ImportError:
        raise ValueError("numpy has no bfloat16 of its own: install the package 'ml_dtypes' for BF16.") from None
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype
