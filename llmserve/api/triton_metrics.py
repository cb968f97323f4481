"""The metrics of general models: `nv_inference_*` exactly as Triton writes them, and histograms of our own.

Knows no route. The names carry no `_total` and the values no decimals, which no Prometheus library writes: Triton's
dashboards and tests look for these very lines. The histograms are an ordinary collector's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.metrics_core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from llmserve.backends.model_messages import MetricSample
from llmserve.general_metrics import ModelStatistics
from llmserve.histogram import Histogram
from llmserve.repository.data_plane import DataPlane

Labels = dict[str, str]
Sample = tuple[Labels, int]

_COUNTERS: tuple[tuple[str, str, Callable[[ModelStatistics], int]], ...] = (
    ("nv_inference_request_success", "Number of successful inference requests", lambda s: s.success.count),
    (
        "nv_inference_count",
        "Number of inferences performed (does not include cached requests)",
        lambda s: s.inference_count,
    ),
    (
        "nv_inference_exec_count",
        "Number of model executions performed (does not include cached requests)",
        lambda s: s.execution_count,
    ),
    (
        "nv_inference_request_duration_us",
        "Cumulative inference request duration in microseconds",
        lambda s: s.success.ns // 1000,
    ),
    (
        "nv_inference_queue_duration_us",
        "Cumulative inference queuing duration in microseconds",
        lambda s: s.queue.ns // 1000,
    ),
    (
        "nv_inference_compute_input_duration_us",
        "Cumulative compute input duration in microseconds",
        lambda s: s.compute_input.ns // 1000,
    ),
    (
        "nv_inference_compute_infer_duration_us",
        "Cumulative compute inference duration in microseconds",
        lambda s: s.compute_infer.ns // 1000,
    ),
    (
        "nv_inference_compute_output_duration_us",
        "Cumulative inference compute output duration in microseconds",
        lambda s: s.compute_output.ns // 1000,
    ),
)

_HISTOGRAMS: tuple[tuple[str, str, Callable[[ModelStatistics], Histogram]], ...] = (
    ("request_duration_seconds", "Arrival to answer.", lambda s: s.histograms.request_s),
    ("queue_duration_seconds", "Time in the queue.", lambda s: s.histograms.queue_s),
    ("compute_input_duration_seconds", "Inputs on their way to the model.", lambda s: s.histograms.compute_input_s),
    ("compute_infer_duration_seconds", "The model's own time.", lambda s: s.histograms.compute_infer_s),
    ("compute_output_duration_seconds", "Outputs on their way back.", lambda s: s.histograms.compute_output_s),
    ("batch_size", "Rows in an execution.", lambda s: s.histograms.batch_size),
    ("padding_waste_ratio", "Share of a batch's elements that were padding.", lambda s: s.histograms.padding_waste),
)


class GeneralModelMetrics(Collector):
    """Register it for the histograms; append `render()` to the text that the registry gives for the rest."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane

    def render(self) -> bytes:
        """Triton's lines, in Prometheus' text format; empty without models."""
        models = [(self._labels(statistics), statistics) for statistics in self._plane.statistics()]
        if not models:
            return b""
        lines: list[str] = []
        for name, text, value in _COUNTERS:
            _write_family(lines, name, text, "counter", ((labels, value(statistics)) for labels, statistics in models))
        _write_family(
            lines,
            "nv_inference_request_failure",
            "Number of failed inference requests",
            "counter",
            (
                ({**labels, "reason": reason.value}, count)
                for labels, statistics in models
                for reason, count in statistics.failures.items()
            ),
        )
        _write_family(
            lines,
            "nv_inference_pending_request_count",
            "Instantaneous number of pending requests awaiting execution per-model",
            "gauge",
            ((labels, statistics.pending) for labels, statistics in models),
        )
        _write_custom(lines, self._plane.custom_metrics())
        return ("\n".join(lines) + "\n").encode()

    def collect(self) -> Iterator[Metric]:
        """How the phases, the batch sizes and the padding of every model spread."""
        models = self._plane.statistics()
        for name, text, histogram in _HISTOGRAMS:
            family = HistogramMetricFamily(f"llmserve:inference_{name}", text, labels=["model", "version"])
            for statistics in models:
                observed = histogram(statistics)
                family.add_metric([statistics.name, statistics.version], observed.cumulative(), observed.total)
            yield family
        depth = GaugeMetricFamily(
            "llmserve:inference_queue_depth",
            "Requests that wait for an instance, by priority level; 1 is the highest.",
            labels=["model", "version", "priority"],
        )
        for statistics in models:
            for level, count in enumerate(statistics.queued_by_priority, 1):
                depth.add_metric([statistics.name, statistics.version, str(level)], count)
        yield depth

    def _labels(self, statistics: ModelStatistics) -> Labels:
        tags = {_label_name(key): value for key, value in self._plane.metric_tags(statistics.name).items()}
        return {**tags, "model": statistics.name, "version": statistics.version}


def _write_family(lines: list[str], name: str, text: str, kind: str, samples: Iterable[Sample]) -> None:
    lines.append(f"# HELP {name} {text}")
    lines.append(f"# TYPE {name} {kind}")
    for labels, value in samples:
        lines.append(f"{name}{_listed(labels)} {value}")


def _write_custom(lines: list[str], samples: Iterable[MetricSample]) -> None:
    """The models' own series, those of one name together. Of two that are the same, the first is written."""
    families: dict[str, dict[tuple[tuple[str, str], ...], MetricSample]] = {}
    for sample in samples:
        families.setdefault(sample.name, {}).setdefault(tuple(sorted(sample.labels.items())), sample)
    for name, series in families.items():
        first = next(iter(series.values()))
        lines.append(f"# HELP {name} {_escape(first.description)}")
        lines.append(f"# TYPE {name} {first.kind}")
        for sample in series.values():
            if sample.kind != "histogram":
                lines.append(f"{name}{_listed(sample.labels)} {sample.value:.15g}")
                continue
            running = 0
            for bound, count in zip((*sample.bounds, math.inf), sample.counts, strict=True):
                running += count
                le = "+Inf" if math.isinf(bound) else f"{bound:.15g}"
                lines.append(f"{name}_bucket{_listed({**sample.labels, 'le': le})} {running}")
            lines.append(f"{name}_count{_listed(sample.labels)} {running}")
            lines.append(f"{name}_sum{_listed(sample.labels)} {sample.value:.15g}")


def _listed(labels: Labels) -> str:
    """`{a="1",b="2"}`, in the order of the alphabet; nothing without labels."""
    pairs = ",".join(f'{key}="{_escape(labels[key])}"' for key in sorted(labels))
    return f"{{{pairs}}}" if pairs else ""


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _label_name(key: str) -> str:
    """Prometheus allows letters, digits and underscores; a configuration's tag may be anything."""
    name = "".join(char if char.isascii() and (char.isalnum() or char == "_") else "_" for char in key)
    return f"_{name}" if not name or name[0].isdigit() else name
