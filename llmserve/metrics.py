"""Prometheus metrics of the server process: plain counters written on the token path, read at scrape time.

Knows no HTTP and no engine. The series carry vLLM's names, so that its dashboards and the gateways that route by them
work unchanged: each is exposed as `llmserve:<name>` and, unless switched off, as `vllm:<name>`, from the same numbers.
A prometheus_client metric takes a lock and a label lookup at every touch; an observation here is a bisect and two
additions, and everything else is paid by the scrape. All methods are for the event loop's thread alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from llmserve.histogram import Histogram
from llmserve.http_metrics import HttpMetrics
from llmserve.messages import EngineStats, FinishReason

# vLLM's bounds in seconds, so that recorded quantiles stay comparable; three finer ones begin the inter-token ones.
# fmt: off
_LATENCY_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560
)
_INTER_TOKEN_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80
)
# fmt: on
_ITERATION_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_PARAMS_N = (1, 2, 5, 10, 20)
_PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)


class ModelMetrics:
    """What happened to the requests of one served LLM."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.num_requests_running = 0
        self.num_requests_waiting = 0
        self.kv_cache_usage = 0.0  # share of blocks, 0 to 1
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prompt_tokens_cached = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self.host_cache_hits = 0
        self.num_preemptions = 0
        self.num_drafts = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self.client_disconnects = 0
        self.engine_restarts = 0
        self.engine_stalls = 0
        self.requests_resubmitted = 0
        self.requests_isolated = 0
        self.request_pauses = 0
        self.finished = dict.fromkeys(FinishReason, 0)
        self.cache_config: dict[str, str] = {}

        self.iteration_tokens = Histogram(_ITERATION_TOKENS)
        self.time_to_first_token_s = Histogram(_TTFT_S)
        self.inter_token_latency_s = Histogram(_INTER_TOKEN_S)
        self.time_per_output_token_s = Histogram(_INTER_TOKEN_S)
        self.e2e_s = Histogram(_LATENCY_S)
        self.queue_s = Histogram(_LATENCY_S)
        self.inference_s = Histogram(_LATENCY_S)
        self.prefill_s = Histogram(_LATENCY_S)
        self.decode_s = Histogram(_LATENCY_S)
        self.request_prompt_tokens = Histogram(_TOKENS)
        self.request_generation_tokens = Histogram(_TOKENS)
        self.request_prefill_kv_computed_tokens = Histogram(_TOKENS)
        self.request_params_max_tokens = Histogram(_TOKENS)
        self.request_params_n = Histogram(_PARAMS_N)
        self.request_num_preemptions = Histogram(_PREEMPTIONS)
        self.engine_recovery_s = Histogram(_LATENCY_S)

    # The token path.

    def observe_step(self, stats: EngineStats) -> None:
        """Takes over the engine's gauges and adds what the step did."""
        self.num_requests_running = stats.num_running
        self.num_requests_waiting = stats.num_waiting
        self.kv_cache_usage = 1.0 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0
        if stats.num_step_tokens:
            self.iteration_tokens.observe(stats.num_step_tokens)
        self.num_preemptions += stats.num_preemptions
        self.prefix_cache_queries += stats.prefix_cache_queries
        self.prefix_cache_hits += stats.prefix_cache_hits
        self.host_cache_hits += stats.host_cache_hits
        self.num_drafts += stats.num_drafts
        self.num_draft_tokens += stats.num_draft_tokens
        self.num_accepted_tokens += stats.num_accepted_tokens

    def observe_first_token(self, ttft_s: float) -> None:
        """The first token of a sequence arrived `ttft_s` seconds after its request. Counts the token too."""
        self.generation_tokens += 1
        self.time_to_first_token_s.observe(ttft_s)

    def observe_inter_token(self, itl_s: float, count: int = 1) -> None:
        """`count` further tokens of a sequence, `itl_s` seconds apart each. Counts the tokens too."""
        self.generation_tokens += count
        self.inter_token_latency_s.observe(itl_s, count)

    # Once a request.

    def observe_request_started(self, prompt_tokens: int, n: int, max_tokens: int) -> None:
        """A request was accepted by the engine."""
        self.prompt_tokens += prompt_tokens * n  # each of the n sequences is a request of its own in all other counts
        self.request_params_n.observe(n)
        self.request_params_max_tokens.observe(max_tokens)

    def observe_request_finished(
        self,
        reason: FinishReason,
        *,
        prompt_tokens: int,
        generation_tokens: int,
        cached_tokens: int,
        e2e_s: float,
        queue_s: float | None = None,
        prefill_s: float | None = None,
        decode_s: float | None = None,
        num_preemptions: int = 0,
    ) -> None:
        """A request ended; each of the `n` sequences of one prompt is a request of its own.

        A time is None where the request never came so far: a request that is aborted in the queue has no prefill, and
        a zero there would say that prefill is fast.
        """
        self.finished[reason] += 1
        self.prompt_tokens_cached += cached_tokens
        self.request_prompt_tokens.observe(prompt_tokens)
        self.request_generation_tokens.observe(generation_tokens)
        self.request_num_preemptions.observe(num_preemptions)
        self.e2e_s.observe(e2e_s)
        if queue_s is not None:
            self.queue_s.observe(queue_s)
        if prefill_s is not None:
            self.prefill_s.observe(prefill_s)
            self.request_prefill_kv_computed_tokens.observe(prompt_tokens - cached_tokens)
            self.inference_s.observe(prefill_s + (decode_s or 0.0))
        if decode_s is not None:
            self.decode_s.observe(decode_s)
            if generation_tokens > 1:
                self.time_per_output_token_s.observe(decode_s / (generation_tokens - 1))

    def client_disconnected(self) -> None:
        """A client went away before its answer was complete."""
        self.client_disconnects += 1

    def observe_engine_restart(self, recovery_s: float, num_resubmitted: int) -> None:
        """An engine that died has been replaced `recovery_s` seconds later, and has got its requests."""
        self.engine_restarts += 1
        self.requests_resubmitted += num_resubmitted
        self.engine_recovery_s.observe(recovery_s)

    def set_cache_config(self, block_size: int, num_blocks: int, cache_dtype: str, prefix_caching: bool) -> None:
        """What `cache_config_info` says, in the words that routers read there."""
        self.cache_config = {
            "block_size": str(block_size),
            "num_gpu_blocks": str(num_blocks),
            "cache_dtype": cache_dtype,
            "enable_prefix_caching": str(prefix_caching),
        }

    # For the scrape.

    def gauge_values(self) -> Iterable[tuple[str, str, float]]:
        """(name, help, value)."""
        yield "num_requests_running", "Requests in the running batch.", self.num_requests_running
        yield "num_requests_waiting", "Requests waiting for admission.", self.num_requests_waiting
        yield "kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", self.kv_cache_usage

    def counter_values(self) -> Iterable[tuple[str, str, float]]:
        """(name without `_total`, help, value)."""
        yield "prompt_tokens", "Prompt tokens of accepted requests.", self.prompt_tokens
        yield "generation_tokens", "Tokens generated.", self.generation_tokens
        yield "prompt_tokens_cached", "Prompt tokens taken from the prefix cache.", self.prompt_tokens_cached
        yield "prefix_cache_queries", "Tokens looked up in the prefix cache.", self.prefix_cache_queries
        yield "prefix_cache_hits", "Tokens found in the prefix cache.", self.prefix_cache_hits
        yield "host_cache_hits", "Tokens restored to the KV cache from the host's memory.", self.host_cache_hits
        yield "num_preemptions", "Requests preempted for want of KV blocks.", self.num_preemptions
        yield "spec_decode_num_drafts", "Drafts (of one or more tokens) verified.", self.num_drafts
        yield "spec_decode_num_draft_tokens", "Draft tokens verified.", self.num_draft_tokens
        yield "spec_decode_num_accepted_tokens", "Draft tokens accepted.", self.num_accepted_tokens
        yield "client_disconnects", "Requests aborted because their client went away.", self.client_disconnects
        yield "engine_restarts", "Engines that died and were replaced.", self.engine_restarts
        yield "engine_stalls", "Engines killed because they were hung.", self.engine_stalls
        yield "requests_resubmitted", "Sequences that went on in another engine.", self.requests_resubmitted
        yield "request_pauses", "Times a request stood still because its client took nothing.", self.request_pauses
        yield "requests_isolated", "Sequences given up because they end every engine.", self.requests_isolated

    def histograms(self) -> Iterable[tuple[str, str, Histogram]]:
        """(name, help, histogram)."""
        yield "iteration_tokens_total", "Tokens computed in an engine step.", self.iteration_tokens
        yield "time_to_first_token_seconds", "Time to the first token.", self.time_to_first_token_s
        yield "inter_token_latency_seconds", "Time between two tokens of a stream.", self.inter_token_latency_s
        yield "request_time_per_output_token_seconds", "Mean over a request's decode.", self.time_per_output_token_s
        yield "e2e_request_latency_seconds", "Arrival to last token.", self.e2e_s
        yield "request_queue_time_seconds", "Arrival to first scheduling.", self.queue_s
        yield "request_inference_time_seconds", "First scheduling to last token.", self.inference_s
        yield "request_prefill_time_seconds", "First scheduling to first token.", self.prefill_s
        yield "request_decode_time_seconds", "First to last token.", self.decode_s
        yield "request_prompt_tokens", "Prompt tokens of a request.", self.request_prompt_tokens
        yield "request_generation_tokens", "Tokens generated for a request.", self.request_generation_tokens
        yield "request_prefill_kv_computed_tokens", "Prompt tokens not cached.", self.request_prefill_kv_computed_tokens
        # Counted by request, vLLM's longest sequence of a request is its only one.
        yield "request_max_num_generation_tokens", "Longest sequence.", self.request_generation_tokens
        yield "request_params_max_tokens", "max_tokens of a request.", self.request_params_max_tokens
        yield "request_params_n", "n of a request.", self.request_params_n
        yield "request_num_preemptions", "Preemptions of a request.", self.request_num_preemptions
        yield "engine_recovery_seconds", "Death of an engine to its replacement.", self.engine_recovery_s


class Metrics(Collector):
    """All metrics of the process. `vllm_names` says whether each series is exposed under vLLM's prefix too."""

    def __init__(self, *, vllm_names: bool = True) -> None:
        self._prefixes = ("llmserve:", "vllm:") if vllm_names else ("llmserve:",)
        self._models: dict[str, ModelMetrics] = {}
        self.http = HttpMetrics()
        self._further: list[Callable[[], bytes]] = []
        self.content_type = CONTENT_TYPE_LATEST
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self._registry.register(self)

    def model(self, name: str) -> ModelMetrics:
        """The metrics of a served model; made at first use."""
        if name not in self._models:
            self._models[name] = ModelMetrics(name)
        return self._models[name]

    def register(self, collector: Collector, render: Callable[[], bytes]) -> None:
        """Adds the series of another room, and lines of it that no collector can write."""
        self._registry.register(collector)
        self._further.append(render)

    def render(self) -> bytes:
        """The answer to a scrape, in the text format that `content_type` names."""
        return generate_latest(self._registry) + b"".join(render() for render in self._further)

    def collect(self) -> Iterator[Metric]:
        """The metric families of all models under all prefixes."""
        yield from self.http.collect()
        models = list(self._models.values())
        if models:
            for prefix in self._prefixes:
                yield from _collect_models(prefix, models)


_LABELS = ["model_name", "engine"]


def _collect_models(prefix: str, models: list[ModelMetrics]) -> Iterator[Metric]:
    """One family a name, one sample of it a model."""
    gauges: dict[str, GaugeMetricFamily] = {}
    counters: dict[str, CounterMetricFamily] = {}
    histograms: dict[str, HistogramMetricFamily] = {}
    for model in models:
        labels = [model.model_name, "0"]
        for name, text, value in model.gauge_values():
            gauges.setdefault(name, GaugeMetricFamily(prefix + name, text, labels=_LABELS)).add_metric(labels, value)
        for name, text, value in model.counter_values():
            counter = counters.setdefault(name, CounterMetricFamily(prefix + name, text, labels=_LABELS))
            counter.add_metric(labels, value)
        for name, text, histogram in model.histograms():
            family = histograms.setdefault(name, HistogramMetricFamily(prefix + name, text, labels=_LABELS))
            family.add_metric(labels, histogram.cumulative(), histogram.total)
    yield from gauges.values()
    yield from counters.values()
    yield from histograms.values()

    success = CounterMetricFamily(
        prefix + "request_success", "Requests that ended, by reason.", labels=[*_LABELS, "finished_reason"]
    )
    config = GaugeMetricFamily(
        prefix + "cache_config_info",
        "The KV cache's configuration, in its labels.",
        labels=[*_LABELS, "block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching"],
    )
    for model in models:
        for reason, count in model.finished.items():
            success.add_metric([model.model_name, "0", reason.value], count)
        if model.cache_config:
            config.add_metric([model.model_name, "0", *model.cache_config.values()], 1)
    yield success
    yield config
