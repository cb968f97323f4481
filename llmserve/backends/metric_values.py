"""Metrics that a model keeps itself, on their way to the server's `/metrics`. Knows no Prometheus and no process."""

from __future__ import annotations

from bisect import bisect_left

from llmserve.backends.model_messages import MetricSample

_changed: dict[int, MetricValue] = {}


class MetricValue:
    """One series: a number, and for a histogram how many observations fell into each bucket."""

    def __init__(self, name: str, description: str, kind: str, labels: dict[str, str], bounds: list[float]) -> None:
        self.sample = MetricSample(name, description, kind, labels, 0.0, bounds, [0] * (len(bounds) + 1))

    def add(self, value: float) -> None:
        """Counts up, or a gauge up or down."""
        self.sample.value += value
        _changed[id(self)] = self

    def set(self, value: float) -> None:
        """Sets a gauge."""
        self.sample.value = value
        _changed[id(self)] = self

    def observe(self, value: float) -> None:
        """One observation of a histogram."""
        self.sample.counts[bisect_left(self.sample.bounds, value)] += 1
        self.add(value)


def take_changed() -> list[MetricSample]:
    """The series that have changed since the last call."""
    if not _changed:
        return []
    samples = [value.sample for value in _changed.values()]
    _changed.clear()
    return samples
