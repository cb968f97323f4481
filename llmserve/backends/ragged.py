"""Batches whose requests differ in length: padded, or described by Triton's `batch_input`. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmserve.backends.tensors import Array, dtype_of
from llmserve.errors import InferenceError


def offsets_of(counts: Sequence[int]) -> list[int]:
    """Where each part begins, and the end: [3, 4, 5] -> [0, 3, 7, 12]."""
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    return offsets


def batch_inputs(
    entries: Sequence[Mapping[str, Any]],
    ragged: Mapping[str, list[list[int]]],
    arrays: Mapping[str, Array],
    rows: Sequence[int],
) -> dict[str, Array]:
    """The arrays of a configuration's `batch_input` entries.

    `ragged` has the shape of each request's tensor by input, `arrays` the batched inputs, `rows` the requests' batch
    sizes. Raises InferenceError if an entry's source is not in the batch.
    """
    made: dict[str, Array] = {}
    for entry in entries:
        source = entry["source_input"][0]
        if source in ragged:
            shapes = ragged[source]
        elif source in arrays:
            shapes = [[count, *arrays[source].shape[1:]] for count in rows]
        else:
            raise InferenceError(f"batch_input needs the input {source!r}, which the request does not have")
        values = _values(entry["kind"], shapes)
        dtype = dtype_of(entry["data_type"].removeprefix("TYPE_"))
        made.update({name: values.astype(dtype) for name in entry["target_name"]})
    return made


def pad(flat: Array, shapes: Sequence[Sequence[int]], axis: int, size: int) -> Array:
    """The requests' tensors under each other, each filled up with zeros (or empty strings) to `size` along `axis`.

    `flat` has the elements of all, `shapes` the shape of each.
    """
    rows = offsets_of([shape[0] for shape in shapes])
    elements = offsets_of([int(np.prod(shape)) for shape in shapes])
    full = [rows[-1], *shapes[0][1:axis], size, *shapes[0][axis + 1 :]]
    padded = np.full(full, b"", object) if flat.dtype == object else np.zeros(full, flat.dtype)
    for i, shape in enumerate(shapes):
        place = (slice(rows[i], rows[i + 1]), *(slice(None),) * (axis - 1), slice(shape[axis]))
        padded[place] = flat[elements[i] : elements[i + 1]].reshape(shape)
    return padded


def _values(kind: str, shapes: list[list[int]]) -> Array:
    """One entry's numbers; `shapes` are those of the requests' tensors, batch dimension first."""
    counts = [int(np.prod(shape)) for shape in shapes]
    match kind:
        case "BATCH_ELEMENT_COUNT":
            return np.array(counts)
        case "BATCH_ACCUMULATED_ELEMENT_COUNT":
            return np.array(offsets_of(counts)[1:])
        case "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO":
            return np.array(offsets_of(counts))
        case "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE":
            return np.zeros(max(counts))  # only the shape says something
        case "BATCH_ITEM_SHAPE" | "BATCH_ITEM_SHAPE_FLATTEN":
            items = np.array([shape[1:] for shape in shapes for _ in range(shape[0])])
            return items if kind == "BATCH_ITEM_SHAPE" else items.reshape(-1)
    raise InferenceError(f"batch_input.kind {kind} is not supported")
