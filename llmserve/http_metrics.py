"""Requests over HTTP by route, and connections. Knows no route itself: who serves one names it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from llmserve.histogram import Histogram

_HTTP_S = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60)


class HttpMetrics:
    """Requests by route, under the names of prometheus_fastapi_instrumentator."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, str, str], int] = {}  # (handler, method, status class as in "2xx")
        self.duration_s: dict[tuple[str, str], Histogram] = {}  # (handler, method)
        self.num_connections = 0  # open now
        self.refused: dict[str, int] = {}  # connections that the server has ended, by the code of the reason

    def observe(self, handler: str, method: str, status: int, duration_s: float) -> None:
        """One request, its last byte sent. `handler` is a route's template, never a path: the labels stay few."""
        key = (handler, method, f"{status // 100}xx")
        self.requests[key] = self.requests.get(key, 0) + 1
        histogram = self.duration_s.get((handler, method))
        if histogram is None:
            histogram = self.duration_s[handler, method] = Histogram(_HTTP_S)
        histogram.observe(duration_s)

    def refuse(self, reason: str) -> None:
        """A connection is ended for a reason that no route knows of."""
        self.refused[reason] = self.refused.get(reason, 0) + 1

    def collect(self) -> Iterator[Metric]:
        """The metric families, for a scrape."""
        requests = CounterMetricFamily("http_requests", "HTTP requests.", labels=["handler", "method", "status"])
        for key, count in self.requests.items():
            requests.add_metric(list(key), count)
        durations = HistogramMetricFamily(
            "http_request_duration_seconds",
            "Arrival of the request to the last byte of its answer.",
            labels=["handler", "method"],
        )
        for labels, histogram in self.duration_s.items():
            durations.add_metric(list(labels), histogram.cumulative(), histogram.total)
        refused = CounterMetricFamily(
            "http_connections_refused",
            "Connections ended by the server: too many, too slow, too large, or no HTTP.",
            labels=["reason"],
        )
        for reason, count in self.refused.items():
            refused.add_metric([reason], count)
        yield requests
        yield durations
        yield GaugeMetricFamily("http_connections", "Open connections.", value=self.num_connections)
        yield refused
