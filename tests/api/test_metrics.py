"""The metrics: names that dashboards query, and numbers that add up."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmserve.histogram import Histogram
from llmserve.messages import EngineStats, FinishReason
from llmserve.metrics import Metrics, ModelMetrics

# What vLLM's own Grafana dashboards query (examples/observability), and what routers read.
DASHBOARD_SERIES = [
    "e2e_request_latency_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "time_to_first_token_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
    "generation_tokens_total",
    "prompt_tokens_total",
    "request_success_total",
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "iteration_tokens_total_count",
    "request_queue_time_seconds_sum",
    "request_prefill_time_seconds_sum",
    "request_decode_time_seconds_sum",
    "request_max_num_generation_tokens_sum",
    "cache_config_info",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "prompt_tokens_cached_total",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "request_params_n_bucket",
    "request_params_max_tokens_bucket",
    "request_inference_time_seconds_bucket",
]


def samples(metrics: Metrics) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


@pytest.fixture
def used() -> Metrics:
    """One model that has answered a request."""
    metrics = Metrics()
    model = metrics.model("m")
    model.set_cache_config(16, 100, "float32", True)
    model.observe_request_started(prompt_tokens=10, n=1, max_tokens=50)
    model.observe_step(
        EngineStats(
            num_running=1,
            num_waiting=2,
            num_free_blocks=75,
            num_blocks=100,
            num_step_tokens=10,
            num_preemptions=1,
            prefix_cache_queries=10,
            prefix_cache_hits=8,
            host_cache_hits=6,
            num_drafts=2,
            num_draft_tokens=9,
            num_accepted_tokens=5,
        )
    )
    model.observe_first_token(0.02)
    model.observe_inter_token(0.004, 3)
    model.observe_request_finished(
        FinishReason.LENGTH,
        prompt_tokens=10,
        generation_tokens=4,
        cached_tokens=8,
        e2e_s=1.0,
        queue_s=0.1,
        prefill_s=0.3,
        decode_s=0.6,
        num_preemptions=1,
    )
    return metrics


def test_dashboards_find_their_series_under_both_prefixes(used):
    found = samples(used)
    for name in DASHBOARD_SERIES:
        for prefix in ("llmserve:", "vllm:"):
            assert prefix + name in found
        for ours, theirs in zip(found["llmserve:" + name], found["vllm:" + name], strict=True):
            assert ours == theirs
            assert {"model_name": "m", "engine": "0"}.items() <= ours[0].items()


def test_vllm_names_can_be_switched_off():
    metrics = Metrics(vllm_names=False)
    metrics.model("m")
    assert "llmserve:num_requests_running" in samples(metrics)
    assert b"vllm" not in metrics.render()


def test_values(used):
    found = samples(used)

    def value(name: str) -> float:
        ((_, only),) = found["vllm:" + name]
        return only

    assert value("num_requests_waiting") == 2
    assert value("kv_cache_usage_perc") == 0.25
    assert value("prompt_tokens_total") == 10
    assert value("generation_tokens_total") == 4
    assert value("prompt_tokens_cached_total") == 8
    assert value("prefix_cache_hits_total") == 8
    assert value("host_cache_hits_total") == 6
    assert value("num_preemptions_total") == 1
    assert value("spec_decode_num_drafts_total") == 2
    assert value("spec_decode_num_draft_tokens_total") == 9
    assert value("spec_decode_num_accepted_tokens_total") == 5
    assert value("inter_token_latency_seconds_count") == 3
    assert value("inter_token_latency_seconds_sum") == pytest.approx(0.012)
    assert value("request_time_per_output_token_seconds_sum") == pytest.approx(0.2)
    assert value("request_inference_time_seconds_sum") == pytest.approx(0.9)
    assert value("request_prefill_kv_computed_tokens_sum") == 2
    assert {labels["finished_reason"]: n for labels, n in found["vllm:request_success_total"]} == {
        "stop": 0,
        "length": 1,
        "abort": 0,
        "error": 0,
    }
    ((config, _),) = found["vllm:cache_config_info"]
    assert (config["block_size"], config["num_gpu_blocks"]) == ("16", "100")


def test_aborted_in_the_queue_says_nothing_of_speed():
    metrics = ModelMetrics("m")
    metrics.observe_request_finished(
        FinishReason.ABORT, prompt_tokens=5, generation_tokens=0, cached_tokens=0, e2e_s=0.5
    )
    assert metrics.finished[FinishReason.ABORT] == 1
    assert sum(metrics.e2e_s.counts) == 1
    for histogram in (metrics.queue_s, metrics.prefill_s, metrics.decode_s, metrics.inference_s):
        assert sum(histogram.counts) == 0


def test_buckets_are_cumulative_and_bounds_inclusive():
    histogram = Histogram((1, 2, 5))
    for value, count in ((0.5, 1), (1, 1), (2, 2), (9, 1)):
        histogram.observe(value, count)
    assert histogram.cumulative() == [("1.0", 2), ("2.0", 4), ("5.0", 4), ("+Inf", 5)]
    assert histogram.total == 14.5


def test_inter_token_buckets_begin_below_vllms():
    bounds = ModelMetrics("m").inter_token_latency_s.bounds
    assert bounds[:4] == (0.001, 0.0025, 0.005, 0.01)
    assert list(bounds) == sorted(bounds)


def test_two_models_share_a_family(used):
    used.model("other")
    found = samples(used)
    assert [labels["model_name"] for labels, _ in found["vllm:num_requests_running"]] == ["m", "other"]
    assert used.render().count(b"# TYPE vllm:num_requests_running gauge") == 1


def test_process_metrics_are_kept(used):
    found = samples(used)
    assert "process_resident_memory_bytes" in found
    assert "python_gc_collections_total" in found
