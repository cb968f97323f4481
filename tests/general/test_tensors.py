"""Arrays to bytes and back, for every datatype."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from llmserve.backends.tensors import (
    DTYPES,
    Array,
    datatype_of,
    decode_bytes,
    dtype_of,
    encode_bytes,
    to_array,
    to_wire,
)


@given(
    st.sampled_from(sorted(DTYPES)).flatmap(lambda d: npst.arrays(DTYPES[d], npst.array_shapes(min_dims=0, min_side=0)))
)
def test_an_array_survives_the_wire(array: Array) -> None:
    datatype, data = to_wire(array)
    assert len(data) == array.nbytes
    np.testing.assert_array_equal(to_array(datatype, array.shape, memoryview(bytearray(data))), array)


@given(st.lists(st.binary(max_size=20), max_size=20))
def test_strings_survive_the_wire(elements: list[bytes]) -> None:
    array = np.empty(len(elements), object)
    array[:] = elements
    data = encode_bytes(array)
    assert list(decode_bytes(memoryview(data))) == elements
    assert len(data) == sum(4 + len(element) for element in elements)


def test_text_and_fixed_width_strings_are_bytes_too() -> None:
    for array in (np.array(["añb", "c"]), np.array(["añb".encode(), b"c"], object), np.array(["añb", "c"], object)):
        datatype, data = to_wire(array)
        assert datatype == "BYTES"
        assert list(to_array("BYTES", (2,), memoryview(data))) == ["añb".encode(), b"c"]


def test_views_that_are_not_in_order_are_straightened() -> None:
    array = np.arange(4096, dtype=">i4").reshape(64, 64)[::2, ::-3]
    datatype, data = to_wire(array)
    assert datatype == "INT32"
    np.testing.assert_array_equal(to_array(datatype, array.shape, memoryview(data)), array)


def test_bfloat16_has_a_datatype() -> None:
    array = np.array([1.5, -2], ml_dtypes.bfloat16)
    assert datatype_of(array) == "BF16"
    assert dtype_of("BF16") == array.dtype
    np.testing.assert_array_equal(to_array("BF16", (2,), memoryview(to_wire(array)[1])), array)


@pytest.mark.parametrize("data", [b"\0\0\0", b"\5\0\0\0abc", b"\1\0\0\0a\xff"])
def test_a_string_cut_short_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="BYTES tensor ends within"):
        decode_bytes(memoryview(data))


def test_what_has_no_datatype_is_refused() -> None:
    with pytest.raises(ValueError, match="complex128"):
        datatype_of(np.zeros(1, complex))
    with pytest.raises(ValueError, match="'FP99'"):
        dtype_of("FP99")
