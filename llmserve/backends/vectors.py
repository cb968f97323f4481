"""What is made of a model's rows: vectors cut, normalised and compared; logits turned into scores. Knows no model.

Every function treats a row by itself, in a fixed order of additions: a text's numbers do not depend on its company.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llmserve.pooling_config import ScoreActivation, Similarity

FloatArray = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]

_TINY = 1e-12  # torch.nn.functional.normalize's: a vector of zeros stays one


def normalize(vectors: FloatArray) -> FloatArray:
    """Rows of length 1. [n, dimension], or [dimension]."""
    squares = np.square(vectors, dtype=np.float64)
    lengths = np.sqrt(squares.sum(axis=-1, keepdims=True))
    unit: FloatArray = (vectors / np.maximum(lengths, _TINY)).astype(np.float32)
    return unit


def shorten(vectors: FloatArray, dimensions: int | None, *, unit: bool) -> FloatArray:
    """The first `dimensions` of each row (Matryoshka), then of length 1 if `unit`."""
    cut = vectors if dimensions is None else vectors[..., :dimensions]
    return normalize(cut) if unit else cut


def similarities(query: FloatArray, others: FloatArray, how: Similarity) -> Scores:
    """How near each row of `others` [n, dimension] is to `query` [dimension]; larger is nearer."""
    a, b = query.astype(np.float64), others.astype(np.float64)
    near: Scores
    if how == "dot":
        near = (a * b).sum(axis=-1)
    elif how == "cosine":
        lengths = np.sqrt((a * a).sum()) * np.sqrt((b * b).sum(axis=-1))
        near = np.clip((a * b).sum(axis=-1) / np.maximum(lengths, _TINY), -1.0, 1.0)
    elif how == "manhattan":
        near = -np.abs(a - b).sum(axis=-1)
    else:
        near = -np.sqrt(np.square(a - b).sum(axis=-1))
    return near


def activate(logits: FloatArray, activation: ScoreActivation) -> Scores:
    """Scores of logits [n, labels], label by label (sigmoid) or over all of them (softmax)."""
    values: Scores = logits.astype(np.float64)
    if activation == "sigmoid":
        values = 1.0 / (1.0 + np.exp(-values))
    elif activation == "softmax":
        powers = np.exp(values - values.max(axis=-1, keepdims=True))
        values = powers / powers.sum(axis=-1, keepdims=True)
    return values
