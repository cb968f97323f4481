"""A vector as JSON: numbers, base64, or quantised to bytes and bits. Knows no route.

Every form of a vector depends on that vector alone, so that the same text always gets the same bytes.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from llmserve.backends.vectors import FloatArray
from llmserve.errors import InvalidRequestError

VectorFormat = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]

_ROWS_A_TURN = 32  # written before the event loop gets its turn: a vector takes about 20 us


def as_float(vector: FloatArray) -> list[Any]:
    """JSON numbers. [dimension], or nested lists of [tokens, dimension]."""
    numbers: list[Any] = vector.tolist()
    return numbers


def as_base64(vector: FloatArray) -> str:
    """float32, little-endian."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def as_int8(vector: FloatArray) -> list[int]:
    """-127 to 127, scaled so that the largest component is one of them: cosines stay what they were."""
    largest = float(np.abs(vector).max())
    levels: list[int] = np.rint(vector * (127.0 / largest if largest else 0.0)).astype(np.int64).tolist()
    return levels


def as_uint8(vector: FloatArray) -> list[int]:
    """`as_int8`, from 1 to 255: 128 is zero."""
    return [level + 128 for level in as_int8(vector)]


def as_ubinary(vector: FloatArray) -> list[int]:
    """A bit for each component, 1 where it is not negative; eight to a byte, the first the highest."""
    packed: list[int] = np.packbits(vector >= 0).tolist()
    return packed


def as_binary(vector: FloatArray) -> list[int]:
    """`as_ubinary` as signed bytes: less 128, as Cohere has it."""
    return [byte - 128 for byte in as_ubinary(vector)]


FORMATS: dict[VectorFormat, Callable[[FloatArray], Any]] = {
    "float": as_float,
    "base64": as_base64,
    "int8": as_int8,
    "uint8": as_uint8,
    "binary": as_binary,
    "ubinary": as_ubinary,
}


def check_format(form: VectorFormat, dimension: int) -> None:
    """Raises InvalidRequestError for bits that do not fill bytes."""
    if form in ("binary", "ubinary") and dimension % 8:
        raise InvalidRequestError(
            f"The form {form!r} packs eight numbers into a byte, and a vector of {dimension} does not fill its bytes. "
            "Ask for a multiple of 8 as 'dimensions'."
        )


async def write_vectors(rows: Sequence[FloatArray], form: VectorFormat) -> list[msgspec.Raw]:
    """Each vector as JSON. Thousands of them do not hold up the streams of others."""
    write = FORMATS[form]
    written: list[msgspec.Raw] = []
    for position, row in enumerate(rows):
        if position % _ROWS_A_TURN == _ROWS_A_TURN - 1:
            await asyncio.sleep(0)
        written.append(msgspec.Raw(msgspec.json.encode(write(row))))
    return written
