"""A line of a table of measurements."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What was expected before the run, and what came out."""

    name: str
    unit: str
    target: str
    predicted: str
    result: str
