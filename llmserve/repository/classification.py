"""The classification extension: an output tensor turned into its k highest classes. Knows no protocol."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from llmserve.errors import InvalidRequestError
from llmserve.inference import Tensor
from llmserve.repository.tensor_arrays import to_array


def classify(tensor: Tensor, k: int, labels: Sequence[str], *, batched: bool) -> Tensor:
    """BYTES [k], or [batch, k] from a batching model: `value:index` or `value:index:label`, the highest first.

    Of equal values the lower index comes first. `k` beyond the number of classes gives all of them.
    Raises InvalidRequestError for a tensor that holds no numbers.
    """
    if tensor.datatype == "BYTES":
        raise InvalidRequestError(
            f"output {tensor.name!r} is of type BYTES: 'classification' needs numbers.", "outputs"
        )
    values = to_array(tensor)
    rows = tensor.shape[0] if batched and tensor.shape else 1
    table = values.reshape(rows, -1)
    k = min(k, table.shape[1])
    # a stable sort of the reversed row puts the lower index last among equals, so the reversal puts it first
    order = table.shape[1] - 1 - np.argsort(table[:, ::-1], axis=1, kind="stable")[:, ::-1][:, :k]
    elements = bytearray()
    for row, indices in zip(table, order, strict=True):
        for index in indices.tolist():
            text = f"{_number(row[index])}:{index}"
            if index < len(labels):
                text += f":{labels[index]}"
            encoded = text.encode()
            elements += struct.pack("<I", len(encoded)) + encoded
    return Tensor(tensor.name, "BYTES", (rows, k) if batched else (k,), bytes(elements))


def _number(value: np.generic) -> str:
    """Floats with six decimals, as C++'s std::to_string writes them."""
    if isinstance(value, np.floating):
        return f"{float(value):f}"
    return str(int(value))
