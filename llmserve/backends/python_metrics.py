"""`pb_utils.MetricFamily`: metrics that a Python model keeps itself. Knows no Prometheus and no process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmserve.backends.metric_values import MetricValue


class Metric:
    """One series of a family."""

    def __init__(self, value: MetricValue) -> None:
        self._value = value

    def increment(self, value: float) -> None:
        """Adds to a counter (never less than 0) or a gauge."""
        if self._value.sample.kind == "histogram" or (self._value.sample.kind == "counter" and value < 0):
            raise ValueError(
                f"{self._value.sample.name}: a {self._value.sample.kind} cannot be incremented by {value}."
            )
        self._value.add(value)

    def set(self, value: float) -> None:
        """Sets a gauge."""
        if self._value.sample.kind != "gauge":
            raise ValueError(f"{self._value.sample.name}: a {self._value.sample.kind} cannot be set.")
        self._value.set(value)

    def observe(self, value: float) -> None:
        """One observation of a histogram."""
        if self._value.sample.kind != "histogram":
            raise ValueError(f"{self._value.sample.name}: a {self._value.sample.kind} does not observe.")
        self._value.observe(value)

    def value(self) -> float:
        """The number now; of a histogram, the sum of its observations."""
        return self._value.sample.value


class MetricFamily:
    """Metrics of one name."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"

    def __init__(self, name: str, description: str, kind: str) -> None:
        if kind not in (self.COUNTER, self.GAUGE, self.HISTOGRAM):
            raise ValueError(f"Metric family {name!r}: kind must be MetricFamily.COUNTER, GAUGE or HISTOGRAM.")
        self._name = name
        self._description = description
        self._kind = kind

    def Metric(self, labels: Mapping[str, str] | None = None, buckets: Sequence[float] | None = None) -> Metric:
        """A series with these labels; a histogram needs its bucket bounds."""
        if (self._kind == self.HISTOGRAM) != (buckets is not None):
            raise ValueError(f"Metric family {self._name!r}: 'buckets' belongs to a histogram, and to it alone.")
        return Metric(MetricValue(self._name, self._description, self._kind, dict(labels or {}), list(buckets or ())))
