"""What happened to the requests of one version of a general model: counters, phase times, batch sizes, histograms.

Floor 1: no HTTP, no gRPC, no process, no Prometheus. `backends/` records here, plain additions on the event loop's
thread; the v2 statistics routes and the `nv_inference_*` metrics read it. Times are nanoseconds of the monotonic clock,
as Triton reports them.
"""

from __future__ import annotations

import enum
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmserve.histogram import Histogram

# Phases of microseconds to minutes: two steps a decade is enough to see which one is slow.
_PHASE_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_WASTE = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


class FailureReason(enum.StrEnum):
    """Why a request failed, in the words of `nv_inference_request_failure`."""

    REJECTED = "REJECTED"  # by the queue: full, or waited too long
    CANCELED = "CANCELED"  # by its client
    BACKEND = "BACKEND"  # by the model
    OTHER = "OTHER"


@dataclass(slots=True)
class Duration:
    """How often something took place and how long it took altogether."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """`count` events that took `ns` altogether."""
        self.count += count
        self.ns += ns


@dataclass(slots=True)
class ExecutionTimes:
    """One execution of a batch in the model's process: bringing inputs in, computing, bringing outputs back."""

    compute_input_ns: int
    compute_infer_ns: int
    compute_output_ns: int


@dataclass(slots=True)
class BatchStatistics:
    """Executions of one batch size."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


@dataclass(slots=True)
class ResponseStatistics:
    """The n-th response of every request of a decoupled model."""

    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    empty_response: Duration = field(default_factory=Duration)
    cancel: Duration = field(default_factory=Duration)


@dataclass(slots=True)
class PhaseHistograms:
    """How the phases spread, in seconds; batch sizes; the share of a batch's elements that were padding."""

    request_s: Histogram = field(default_factory=lambda: Histogram(_PHASE_S))
    queue_s: Histogram = field(default_factory=lambda: Histogram(_PHASE_S))
    compute_input_s: Histogram = field(default_factory=lambda: Histogram(_PHASE_S))
    compute_infer_s: Histogram = field(default_factory=lambda: Histogram(_PHASE_S))
    compute_output_s: Histogram = field(default_factory=lambda: Histogram(_PHASE_S))
    batch_size: Histogram = field(default_factory=lambda: Histogram(_BATCH_SIZES))
    padding_waste: Histogram = field(default_factory=lambda: Histogram(_WASTE))


class ModelStatistics:
    """One loaded version of a model. Counts as Triton does: `inference_count` grows by the batch size of a request,
    `execution_count` by one an execution, `success` by one a request, and each request is charged the times of the
    whole execution it rode in.
    """

    def __init__(self, name: str, version: str) -> None:
        self.name = name
        self.version = version
        self.last_inference_ms = 0  # wall clock, since 1970
        self.inference_count = 0
        self.execution_count = 0
        self.pending = 0  # requests taken and not answered; a gauge
        self.queued_by_priority: Sequence[int] = ()  # waiting now, the highest level first
        self.success = Duration()
        self.fail = Duration()
        self.failures: dict[FailureReason, int] = dict.fromkeys(FailureReason, 0)
        self.queue = Duration()
        self.compute_input = Duration()
        self.compute_infer = Duration()
        self.compute_output = Duration()
        self.batches: dict[int, BatchStatistics] = {}
        self.responses: dict[int, ResponseStatistics] = {}
        self.histograms = PhaseHistograms()

    def record_execution(self, batch_size: int, times: ExecutionTimes) -> None:
        """The model ran once, over `batch_size` rows."""
        self.execution_count += 1
        batch = self.batches.get(batch_size)
        if batch is None:
            batch = self.batches[batch_size] = BatchStatistics()
        batch.compute_input.add(times.compute_input_ns)
        batch.compute_infer.add(times.compute_infer_ns)
        batch.compute_output.add(times.compute_output_ns)
        self.histograms.batch_size.observe(batch_size)

    def record_success(self, batch_size: int, request_ns: int, queue_ns: int, times: ExecutionTimes) -> None:
        """A request of `batch_size` rows was answered `request_ns` after it came, `queue_ns` of them in the queue."""
        self.last_inference_ms = time.time_ns() // 1_000_000
        self.inference_count += batch_size
        histograms = self.histograms
        for total, histogram, ns in (
            (self.success, histograms.request_s, request_ns),
            (self.queue, histograms.queue_s, queue_ns),
            (self.compute_input, histograms.compute_input_s, times.compute_input_ns),
            (self.compute_infer, histograms.compute_infer_s, times.compute_infer_ns),
            (self.compute_output, histograms.compute_output_s, times.compute_output_ns),
        ):
            total.count += 1
            total.ns += ns
            histogram.counts[bisect_left(histogram.bounds, seconds := ns * 1e-9)] += 1
            histogram.total += seconds

    def record_failure(self, reason: FailureReason, request_ns: int) -> None:
        """A request got an error `request_ns` after it came."""
        self.fail.add(request_ns)
        self.failures[reason] += 1

    def record_padding(self, useful: int, padded: int) -> None:
        """A batch of `padded` elements held `useful` ones that were asked for."""
        self.histograms.padding_waste.observe(1.0 - useful / padded if padded else 0.0)

    def response(self, index: int) -> ResponseStatistics:
        """What is known of the `index`-th responses of a decoupled model; made at first use."""
        return self.responses.setdefault(index, ResponseStatistics())
