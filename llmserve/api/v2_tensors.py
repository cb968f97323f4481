"""Tensor values between JSON and the wire's buffers, for every datatype. Knows neither requests nor models.

The common case is one typed pass of msgspec over the raw JSON (flat or nested arrays) and one of `array`. What that
refuses is looked at again by hand, for NaN and Infinity, which JSON lacks and Triton takes, or to say what is wrong.
"""

from __future__ import annotations

import json
import math
import struct
from array import array
from collections.abc import Callable
from functools import cache
from itertools import chain
from typing import Any

import msgspec
import numpy as np

from llmserve.api.v2_errors import MalformedRequestError
from llmserve.errors import InvalidRequestError
from llmserve.inference import Tensor
from llmserve.repository.tensor_arrays import to_array, to_bfloat16

Bytes = bytes | bytearray | memoryview

_ARRAY_CODES = {
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP32": "f",
    "FP64": "d",
}
_VIEW_CODES = {**_ARRAY_CODES, "BOOL": "?"}
_FLOATS = frozenset(("FP16", "BF16", "FP32", "FP64"))
_FAST_DEPTH = 8  # deeper nesting than any model's rank takes the slow path
_NOT_A_LIST = "Unable to parse 'data': attempt to access JSON non-array as array"
_LENGTH = struct.Struct("<I")


def _element_type(datatype: str) -> type:
    if datatype in _FLOATS:
        return float
    return {"BOOL": bool, "BYTES": str}.get(datatype, int)


@cache
def _decoder(datatype: str, depth: int) -> msgspec.json.Decoder[Any]:
    wanted: Any = _element_type(datatype)
    for _ in range(depth):
        wanted = list[wanted]
    return msgspec.json.Decoder(wanted)


def decode_json(
    raw: Bytes | msgspec.Raw, name: str, datatype: str, num_elements: int, max_depth: int
) -> bytes | memoryview:
    """The buffer of an input whose `data` is the JSON text `raw`. Raises MalformedRequestError, InvalidRequestError."""
    view = memoryview(raw)
    depth = _depth(bytes(view[: _FAST_DEPTH + 1]))
    try:
        if not depth:
            raise msgspec.ValidationError  # whitespace between brackets, or no list at all
        values = _decoder(datatype, depth).decode(view)
        for _ in range(depth - 1):
            values = list(chain.from_iterable(values))
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        values = _decode_slowly(view, datatype, max_depth)
    if len(values) != num_elements and values:  # no values at all is left to the check of sizes
        raise MalformedRequestError("Unable to parse 'data': Shape does not match true shape of 'data' field", "data")
    return encode_values(values, name, datatype)


def encode_values(values: list[Any], name: str, datatype: str) -> bytes | memoryview:
    """Values of the right JSON type as a little-endian buffer. Raises InvalidRequestError for one out of range."""
    code = _ARRAY_CODES.get(datatype)
    try:
        if code is not None:
            return memoryview(array(code, values)).cast("B")
        if datatype == "BYTES":
            return b"".join([_LENGTH.pack(len(text)) + text for text in [value.encode() for value in values]])
        if datatype == "BOOL":
            return bytes(values)
        with np.errstate(over="ignore"):
            if datatype == "FP16":
                return np.array(values, "<f2").tobytes()
            return to_bfloat16(np.array(values, "<f4"))
    except OverflowError:
        raise InvalidRequestError(f"input '{name}' has a value out of the range of {datatype}", "data") from None
    except UnicodeEncodeError:
        raise InvalidRequestError(f"input '{name}' has a string that is no valid Unicode text", "data") from None


def decode_values(tensor: Tensor) -> list[Any]:
    """The values of a tensor for JSON, flat and row-major. Bytes that are not UTF-8 are written as `\\xNN`."""
    code = _VIEW_CODES.get(tensor.datatype)
    if code is not None:
        values: list[Any] = memoryview(tensor.data).cast("B").cast(code).tolist()  # type: ignore[call-overload]
        return values
    if tensor.datatype == "BYTES":
        return [element.decode(errors="backslashreplace") for element in bytes_elements(tensor.data)]
    flat: list[Any] = to_array(tensor).ravel().tolist()
    return flat


def has_only_finite(values: list[Any], datatype: str) -> bool:
    """Whether JSON can write the values. May say no for finite values whose sum overflows."""
    return datatype not in _FLOATS or math.isfinite(sum(values))


def bytes_elements(data: Bytes) -> list[bytes]:
    """The elements of a BYTES buffer; a cut one is taken as far as it goes."""
    view = memoryview(data)
    elements: list[bytes] = []
    offset, end = 0, len(view)
    while offset + 4 <= end:
        (length,) = _LENGTH.unpack_from(view, offset)
        elements.append(bytes(view[offset + 4 : offset + 4 + length]))
        offset += 4 + length
    return elements


def flatten(value: Any, max_depth: int) -> list[Any]:
    """The leaves of nested lists, in order. Raises MalformedRequestError."""
    if not isinstance(value, list):
        raise MalformedRequestError(_NOT_A_LIST, "data")
    for _ in range(max_depth):
        if not any(isinstance(item, list) for item in value):
            leaves: list[Any] = value
            return leaves
        if not all(isinstance(item, list) for item in value):
            raise MalformedRequestError(_NOT_A_LIST, "data")
        value = list(chain.from_iterable(value))
    raise MalformedRequestError("JSON nesting depth exceeds maximum allowed", "data")


def check_elements(values: list[Any], datatype: str) -> None:
    """Raises MalformedRequestError, in Triton's words, for an element of the wrong JSON type."""
    is_valid, complaint = _ELEMENT_CHECKS["BYTES" if datatype == "BYTES" else _check_name(datatype)]
    if not all(map(is_valid, values)):
        raise MalformedRequestError(complaint, "data")


def _decode_slowly(view: memoryview, datatype: str, max_depth: int) -> list[Any]:
    try:
        value = json.loads(bytes(view))
    except (ValueError, RecursionError) as error:
        raise MalformedRequestError(f"Unable to parse 'data': {error}", "data") from error
    values = flatten(value, max_depth)
    check_elements(values, datatype)
    return values


def _depth(start: bytes) -> int:
    """How deeply the array that begins with `start` is nested; 0 if that cannot be seen at once."""
    depth = len(start) - len(start.lstrip(b"["))
    return depth if depth <= _FAST_DEPTH and start[depth : depth + 1] not in (b" ", b"\n", b"\r", b"\t") else 0


def _check_name(datatype: str) -> str:
    if datatype in _FLOATS:
        return "float"
    return "bool" if datatype == "BOOL" else "unsigned" if datatype.startswith("U") else "signed"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_ELEMENT_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "float": (
        lambda value: isinstance(value, int | float) and not isinstance(value, bool),
        "Unable to parse 'data': attempt to access JSON non-number as double",
    ),
    "bool": (
        lambda value: isinstance(value, bool),
        "Unable to parse 'data': attempt to access JSON non-boolean as boolean",
    ),
    "signed": (_is_int, "Unable to parse 'data': attempt to access JSON non-signed-integer as signed-integer"),
    "unsigned": (
        lambda value: _is_int(value) and value >= 0,
        "Unable to parse 'data': attempt to access JSON non-unsigned-integer as unsigned-integer",
    ),
    "BYTES": (
        lambda value: isinstance(value, str),
        "Unable to parse JSON bytes array: attempt to access JSON non-string as string",
    ),
}
