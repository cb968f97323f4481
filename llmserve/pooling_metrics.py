"""What happened to the requests and batches of the pooling models, under the names of text-embeddings-inference.

Floor 1: knows no model and no HTTP. Plain additions on the event loop's thread; read when `/metrics` is scraped. The
series carry the label `model`, which the original, with its one model a server, has no need of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.registry import Collector

from llmserve.histogram import Histogram

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingTimes:
    """Where a request's time went. Waiting and computing are means over its texts, as they overlap."""

    total_s: float
    tokenization_s: float
    queue_s: float
    inference_s: float


class PoolingMetrics:
    """One model's numbers. A request is a client's, with all its texts."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.requests = {"single": 0, "batch": 0}  # by whether it has one text or several
        self.successes = {"single": 0, "batch": 0}
        self.failures: dict[str, int] = {}  # by the error's code
        self.texts = 0
        self.tokens = 0  # read, before equal texts were found
        self.shared_texts = 0  # not computed, because an equal text was in flight
        self.batch_tokens = 0  # computed
        self.batch_slots = 0  # rows times width of what was computed; equal to the tokens where nothing is padded
        self.queued_texts = 0  # a gauge
        self.queued_tokens = 0  # a gauge
        self.duration_s = Histogram(_SECONDS)
        self.tokenization_s = Histogram(_SECONDS)
        self.queue_s = Histogram(_SECONDS)
        self.inference_s = Histogram(_SECONDS)
        self.batch_inference_s = Histogram(_SECONDS)
        self.input_length = Histogram(_TOKENS)
        self.batch_size = Histogram(_TEXTS)
        self.batch_next_tokens = Histogram(_TOKENS)

    def count_request(self, num_texts: int) -> str:
        """One has come. Returns its method."""
        method = "single" if num_texts == 1 else "batch"
        self.requests[method] += 1
        return method

    def observe_success(self, method: str, times: PoolingTimes) -> None:
        """One has been answered."""
        self.successes[method] += 1
        self.duration_s.observe(times.total_s)
        self.tokenization_s.observe(times.tokenization_s)
        self.queue_s.observe(times.queue_s)
        self.inference_s.observe(times.inference_s)

    def count_failure(self, code: str) -> None:
        """One has got an error."""
        self.failures[code] = self.failures.get(code, 0) + 1

    def observe_text(self, num_tokens: int, *, shared: bool) -> None:
        """A text has been queued, or has joined an equal one."""
        self.texts += 1
        self.tokens += num_tokens
        self.shared_texts += shared
        self.input_length.observe(num_tokens)

    def observe_batch(self, num_texts: int, num_tokens: int, inference_s: float) -> None:
        """The model has computed a batch. Batches are packed: they have no slot without a token."""
        self.batch_inference_s.observe(inference_s)
        self.batch_size.observe(num_texts)
        self.batch_next_tokens.observe(num_tokens)
        self.batch_tokens += num_tokens
        self.batch_slots += num_tokens

    def counters(self) -> Iterator[tuple[str, str, float]]:
        """(name without `_total`, help, value)."""
        yield "te_texts", "Texts taken.", self.texts
        yield "te_tokens", "Tokens of the texts taken.", self.tokens
        yield "te_shared_texts", "Texts not computed because an equal one was in flight.", self.shared_texts
        yield "te_batch_tokens", "Tokens computed.", self.batch_tokens
        yield "te_batch_padding_tokens", "Slots computed that held no token.", self.batch_slots - self.batch_tokens

    def gauges(self) -> Iterator[tuple[str, str, float]]:
        """(name, help, value)."""
        yield "te_queue_size", "Texts that wait.", self.queued_texts
        yield "te_queue_tokens", "Tokens that wait.", self.queued_tokens

    def histograms(self) -> Iterator[tuple[str, str, Histogram]]:
        """(name, help, histogram). The first names have no unit: they are text-embeddings-inference's, in seconds."""
        yield "te_request_duration", "Arrival to answer, in seconds.", self.duration_s
        yield "te_request_tokenization_duration", "Tokenising a request, in seconds.", self.tokenization_s
        yield "te_request_queue_duration", "A request's mean wait of its texts, in seconds.", self.queue_s
        yield "te_request_inference_duration", "A request's mean time in the model, in seconds.", self.inference_s
        yield "te_batch_inference_duration", "The model's time for a batch, in seconds.", self.batch_inference_s
        yield "te_request_input_length", "Tokens of a text.", self.input_length
        yield "te_batch_next_size", "Texts in a batch.", self.batch_size
        yield "te_batch_next_tokens", "Tokens in a batch.", self.batch_next_tokens


class PoolingCollector(Collector):
    """The families of all models served now."""

    def __init__(self, models: Callable[[], Sequence[PoolingMetrics]]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """For a scrape."""
        counters: dict[str, CounterMetricFamily] = {}
        gauges: dict[str, GaugeMetricFamily] = {}
        histograms: dict[str, HistogramMetricFamily] = {}
        # of no type: a counter's name would be made to end in _total, and the original's does not
        requests = UnknownMetricFamily("te_request_count", "Requests.", labels=["model", "method"])
        successes = UnknownMetricFamily("te_request_success", "Requests answered.", labels=["model", "method"])
        failures = UnknownMetricFamily("te_request_failure", "Requests that failed.", labels=["model", "err"])
        for model in self._models():
            for family, counts in (
                (requests, model.requests),
                (successes, model.successes),
                (failures, model.failures),
            ):
                for label, count in counts.items():
                    family.add_metric([model.model, label], count)
            for name, text, value in model.counters():
                counters.setdefault(name, CounterMetricFamily(name, text, labels=["model"]))
                counters[name].add_metric([model.model], value)
            for name, text, value in model.gauges():
                gauges.setdefault(name, GaugeMetricFamily(name, text, labels=["model"]))
                gauges[name].add_metric([model.model], value)
            for name, text, histogram in model.histograms():
                histograms.setdefault(name, HistogramMetricFamily(name, text, labels=["model"]))
                histograms[name].add_metric([model.model], histogram.cumulative(), histogram.total)
        yield from (requests, successes, failures)
        yield from counters.values()
        yield from gauges.values()
        yield from histograms.values()
