"""Tensor values between JSON and buffers: every datatype, every way they can be wrong."""

from __future__ import annotations

import json
import math
import struct
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.api.v2_tensors import decode_json, decode_values, encode_values, has_only_finite
from llmserve.backends.tensors import DTYPES
from llmserve.errors import InvalidRequestError
from llmserve.inference import Tensor
from llmserve.repository.classification import classify

NUMBERS = {name: dtype for name, dtype in DTYPES.items() if name not in ("BOOL",)}


def decode(values: Any, datatype: str, count: int | None = None) -> bytes:
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    total = count if count is not None else int(np.array(values).size)
    return bytes(decode_json(text, "X", datatype, total, 100))


@pytest.mark.parametrize("datatype", NUMBERS)
def test_limits_survive_the_way_there_and_back(datatype: str) -> None:
    dtype = DTYPES[datatype]
    info: Any = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    values = np.array([info.min, 0, 1, info.max], dtype)
    data = decode([value.item() for value in values], datatype)
    assert data == values.tobytes()
    assert decode_values(Tensor("X", datatype, (4,), data)) == values.tolist()


def test_booleans_strings_and_bfloat16() -> None:
    assert decode([True, False], "BOOL") == b"\1\0"
    assert decode_values(Tensor("X", "BOOL", (2,), b"\1\0")) == [True, False]
    data = decode(["ab", "", "é中", "a\0b"], "BYTES")
    assert data == b"\2\0\0\0ab\0\0\0\0\5\0\0\0\xc3\xa9\xe4\xb8\xad\3\0\0\0a\0b"
    assert decode_values(Tensor("X", "BYTES", (4,), data)) == ["ab", "", "é中", "a\0b"]
    data = decode([1.0, -2.5, 3.14159, math.inf, math.nan], "BF16")
    assert np.frombuffer(data, "<u2")[:4].tolist() == [0x3F80, 0xC020, 0x4049, 0x7F80]
    back = decode_values(Tensor("X", "BF16", (5,), data))
    assert back[:4] == [1.0, -2.5, 3.140625, math.inf]
    assert math.isnan(back[4])


def test_bfloat16_rounds_ties_to_even() -> None:
    """1 + 2**-8 lies between 1 and 1 + 2**-7; so does its neighbour above."""
    data = decode([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], "BF16")
    assert np.frombuffer(data, "<u2").tolist() == [0x3F80, 0x3F82, 0x3F81]


def test_not_a_number_is_taken_and_sent() -> None:
    data = decode(b"[NaN, Infinity, -Infinity, 1]", "FP32", 4)
    values = decode_values(Tensor("X", "FP32", (4,), data))
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, -math.inf, 1.0]
    assert not has_only_finite(values, "FP32")
    assert has_only_finite([1.0, 2.0], "FP32")


def test_bytes_that_are_no_text_are_escaped() -> None:
    assert decode_values(Tensor("X", "BYTES", (1,), struct.pack("<I", 2) + b"\xff\0")) == ["\\xff\0"]


@pytest.mark.parametrize("text", [b"[[1,2],[3,4]]", b"[ [1, 2], [3, 4] ]", b"[[[1],[2]],[[3],[4]]]", b"\n[1,2,3,4]"])
def test_nested_lists_are_flattened(text: bytes) -> None:
    assert decode(text, "INT32", 4) == np.array([1, 2, 3, 4], "<i4").tobytes()


@pytest.mark.parametrize(
    ("text", "datatype", "complaint"),
    [
        (b'["1"]', "FP32", "non-number as double"),
        (b"[null]", "FP64", "non-number as double"),
        (b"[true]", "FP32", "non-number as double"),
        (b"[1.5]", "INT32", "non-signed-integer as signed-integer"),
        (b"[1.0]", "INT8", "non-signed-integer as signed-integer"),
        (b"[true]", "INT8", "non-signed-integer as signed-integer"),
        (b"[-1]", "UINT16", "out of the range|non-unsigned"),
        (b"[1]", "BOOL", "non-boolean as boolean"),
        (b"[1]", "BYTES", "Unable to parse JSON bytes array: attempt to access JSON non-string as string"),
        (b"5", "FP32", "non-array as array"),
        (b"{}", "FP32", "non-array as array"),
        (b"[[1],2]", "FP32", "non-array as array"),
        (b"[1,2]", "FP32", "Shape does not match true shape"),
        (b"[" * 200 + b"]" * 200, "FP32", "nesting depth"),
    ],
)
def test_what_is_wrong_is_said(text: bytes, datatype: str, complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=complaint):
        decode(text, datatype, 1)


@pytest.mark.parametrize(
    ("value", "datatype"),
    [
        (256, "UINT8"),
        (128, "INT8"),
        (-129, "INT8"),
        (2**31, "INT32"),
        (2**64, "UINT64"),
        (2**63, "INT64"),
        (10**30, "INT64"),
    ],
)
def test_out_of_range_is_an_error(value: int, datatype: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"input 'X' has a value out of the range of {datatype}"):
        decode([value], datatype)


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InvalidRequestError):
        decode(b'["\\ud800"]', "BYTES", 1)


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=50))
def test_floats_survive(values: list[float]) -> None:
    data = decode(values, "FP32", len(values))
    assert decode_values(Tensor("X", "FP32", (len(values),), data)) == values


@given(st.lists(st.text(), max_size=20))
def test_texts_survive(values: list[str]) -> None:
    try:
        data = encode_values(values, "X", "BYTES")
    except InvalidRequestError:
        assert any("\ud800" <= char <= "\udfff" for text in values for char in text)
        return
    assert decode_values(Tensor("X", "BYTES", (len(values),), data)) == values


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=20))
def test_any_json_is_taken_or_refused_by_name(value: Any) -> None:
    for datatype in ("FP32", "INT8", "UINT64", "BOOL", "BYTES", "BF16", "FP16"):
        with suppress(InvalidRequestError):
            decode(json.dumps(value).encode(), datatype, 3)


def classes(datatype: str, dtype: str, values: Any, k: int, *, batched: bool) -> tuple[list[str], tuple[int, ...]]:
    array = np.array(values, dtype)
    tensor = Tensor("O", datatype, array.shape, array.tobytes())
    result = classify(tensor, k, ["zero", "one"], batched=batched)
    return decode_values(result), result.shape


def test_classification() -> None:
    assert classes("FP32", "<f4", [0.5, 2.0, -1.0], 2, batched=False) == (["2.000000:1:one", "0.500000:0:zero"], (2,))
    assert classes("INT32", "<i4", [[1, 3], [7, 7]], 1, batched=True) == (["3:1:one", "7:0:zero"], (2, 1))
    assert classes("UINT8", "u1", [9, 8, 9], 99, batched=False) == (["9:0:zero", "9:2", "8:1:one"], (3,))
    with pytest.raises(InvalidRequestError, match="needs numbers"):
        classify(Tensor("O", "BYTES", (0,), b""), 1, [], batched=False)
