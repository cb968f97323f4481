"""The arithmetic of the figures, on streams whose every time is given: exact, no clock involved."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.errors import ConfigError
from llmserve.tools.answer_timing import AnswerTiming
from llmserve.tools.bench.load import ClosedLoop, OpenLoop
from llmserve.tools.bench.record import RequestRecord
from llmserve.tools.bench.report import Run, as_json, warnings
from llmserve.tools.bench.summary import latencies_ms, meets_slo, parse_slo, percentile, spread, summarize
from llmserve.tools.openai_client import Choice, Chunk, Delta, PromptTokensDetails, TimedChunk, Usage


def role(time_s: float) -> TimedChunk:
    return TimedChunk(time_s, Chunk(choices=[Choice(delta=Delta(content=""))]))


def text(time_s: float, content: str = "x", finish_reason: str | None = None) -> TimedChunk:
    return TimedChunk(time_s, Chunk(choices=[Choice(delta=Delta(content=content), finish_reason=finish_reason)]))


def usage(time_s: float, prompt: int, completion: int | None, cached: int | None = None) -> TimedChunk:
    details = PromptTokensDetails(cached) if cached is not None else None
    return TimedChunk(time_s, Chunk(usage=Usage(prompt, completion, details)))


def record(*chunks: TimedChunk, start_s: float = 0.0, error: str | None = None) -> RequestRecord:
    made = RequestRecord(start_s=start_s, prompt_len=1, output_len=1, scheduled_s=start_s)
    made.take(list(chunks))
    if error:
        made.fail(error, f"why {error} at {start_s:g}")
    return made


def test_latencies_of_one_token_a_chunk() -> None:
    timing = AnswerTiming(start_s=10.0)
    timing.take([role(10.25), text(10.5)])
    timing.take([text(10.75), text(11.5), text(11.625, "", "stop")])
    timing.take([usage(99.0, 5, 3)])
    assert timing.ttft_s == 0.5  # the role chunk is not a token
    assert timing.itls_s == [0.25, 0.75]
    assert timing.e2e_s == 1.625  # to the finish reason; the usage chunk is not part of the answer
    assert timing.tpot_s == 1.125 / 2
    assert timing.num_chunks == 6


def test_chunks_of_several_tokens_change_itl_but_not_tpot() -> None:
    single, double = AnswerTiming(0.0), AnswerTiming(0.0)
    single.take([text(1.0), text(2.0), text(3.0), text(4.0), text(5.0, finish_reason="stop"), usage(5.0, 1, 5)])
    double.take([text(1.0), text(3.0, "xx"), text(5.0, "xx", "stop"), usage(5.0, 1, 5)])
    assert single.tpot_s == double.tpot_s == 1.0
    assert single.itls_s == [1.0] * 4
    assert double.itls_s == [2.0] * 2


def test_latencies_that_do_not_exist_are_none() -> None:
    nothing = AnswerTiming(0.0)
    assert (nothing.ttft_s, nothing.e2e_s, nothing.tpot_s, nothing.itls_s) == (None, None, None, [])
    one = AnswerTiming(0.0)
    one.take([text(1.0, finish_reason="length"), usage(1.0, 1, 1)])
    assert (one.ttft_s, one.e2e_s, one.tpot_s, one.itls_s) == (1.0, 1.0, None, [])
    invisible = AnswerTiming(0.0)
    invisible.take([text(2.0, "", "stop"), usage(2.0, 1, 4)])
    assert (invisible.ttft_s, invisible.e2e_s, invisible.tpot_s) == (None, 2.0, None)


def test_tokens_are_the_servers_count_and_chunks_only_without_one() -> None:
    told, untold = record(text(1.0), usage(1.0, 1, 7)), record(text(1.0), text(2.0))
    assert (told.num_output_tokens, untold.num_output_tokens) == (7, 2)
    summary = summarize([told, untold], 1.0)
    assert summary.output_tokens == 9
    assert summary.num_without_usage == 1


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    assert percentile(sorted(values), percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-6)


def test_spread() -> None:
    assert spread([]) is None
    values = spread(iter([4.0, 1.0, 2.0, 3.0, 5.0]))
    assert values is not None
    assert (values.count, values.mean, values.p50, values.min, values.max) == (5, 3.0, 3.0, 1.0, 5.0)
    assert values.p90 == pytest.approx(4.6)
    assert values.p99 == pytest.approx(4.96)


def records() -> list[RequestRecord]:
    return [
        record(text(1.0), text(3.0, finish_reason="stop"), usage(3.0, 10, 2, 4)),
        record(text(2.5), text(3.0, finish_reason="stop"), usage(3.0, 30, 6, 0), start_s=0.5),
        record(text(1.0), usage(1.0, 1000, 1000), error="disconnected"),
        record(error="timeout", start_s=1.0),
        record(error="timeout", start_s=2.0),
    ]


def test_summary_counts_only_whole_answers_but_names_every_error() -> None:
    summary = summarize(records(), 4.0, {"ttft": 1500.0})
    assert (summary.num_requests, summary.num_succeeded) == (5, 2)
    assert summary.errors == {"timeout": 2, "disconnected": 1}
    assert summary.error_samples == {"timeout": "why timeout at 1", "disconnected": "why disconnected at 0"}
    assert (summary.input_tokens, summary.output_tokens, summary.cached_tokens) == (40, 8, 4)
    assert (summary.requests_per_s, summary.input_tokens_per_s, summary.output_tokens_per_s) == (0.5, 10.0, 2.0)
    assert summary.goodput_per_s == 0.25  # one of the two was too late
    assert summary.tokens_per_chunk == 2.0
    assert summary.ttft_ms is not None
    assert (summary.ttft_ms.count, summary.ttft_ms.mean) == (2, 1500.0)
    assert summary.tpot_ms is not None
    assert summary.tpot_ms.mean == (2000.0 + 100.0) / 2
    assert latencies_ms(records(), "itl") == [2000.0, 500.0]
    assert latencies_ms(records(), "e2e") == [3000.0, 2500.0]


def test_summary_of_nothing() -> None:
    summary = summarize([], 0.0)
    assert (summary.num_requests, summary.requests_per_s, summary.goodput_per_s, summary.ttft_ms) == (
        0,
        0.0,
        None,
        None,
    )
    failed = summarize([record(error="connect")], 1.0)
    assert (failed.num_succeeded, failed.ttft_ms, failed.cached_tokens) == (0, None, None)


def test_slo() -> None:
    assert parse_slo("ttft:200,tpot:50.5") == {"ttft": 200.0, "tpot": 50.5}
    good = records()[0]
    assert meets_slo(good, {"ttft": 1000.0, "tpot": 2000.0, "e2e": 3000.0})
    assert not meets_slo(good, {"ttft": 999.0})
    assert not meets_slo(good, {"ttft": 1000.0, "tpot": 1999.0})
    assert not meets_slo(records()[2], {"ttft": 1e9})
    assert meets_slo(record(text(1.0, finish_reason="stop"), usage(1.0, 1, 1)), {"tpot": 1.0})  # one token has no TPOT


@pytest.mark.parametrize("bad", ["", "ttft", "ttft:", "ttft:x", "ttft:0", "ttft:-1", "ttft:nan", "itl:5", "ttft:1,"])
def test_slo_that_is_none(bad: str) -> None:
    with pytest.raises(ConfigError, match="--slo"):
        parse_slo(bad)


def make_run(load: Any, recs: list[RequestRecord], cpu_s: float = 0.1) -> Run:
    return Run(load, recs, summarize(recs, 4.0), cpu_s, interrupted=False)


def test_the_json_report_is_whole_and_plain() -> None:
    document = as_json({"model": "m"}, [make_run(OpenLoop(2.0, math.inf), records()), make_run(ClosedLoop(1), [])])
    document = json.loads(json.dumps(document, allow_nan=False))
    assert document["schema"] == "llmserve-bench/1"
    assert document["config"] == {"model": "m"}
    first, empty = document["runs"]
    assert first["load"] == {"kind": "open", "rate": 2.0, "burstiness": "inf"}
    assert empty["load"] == {"kind": "closed", "concurrency": 1}
    assert empty["requests"] == []
    assert first["summary"]["ttft_ms"].keys() == {"count", "mean", "p50", "p90", "p99", "min", "max"}
    assert [request["error_kind"] for request in first["requests"]] == [
        None,
        None,
        "disconnected",
        "timeout",
        "timeout",
    ]
    assert first["requests"][1] == {
        "start_s": 0.5,
        "prompt_len": 1,
        "output_len": 1,
        "prompt_tokens": 30,
        "completion_tokens": 6,
        "cached_tokens": 0,
        "num_chunks": 3,
        "ttft_s": 2.0,
        "tpot_s": 0.1,
        "e2e_s": 2.5,
        "finish_reason": "stop",
        "error_kind": None,
        "error_message": "",
    }


def test_figures_that_mislead_come_with_a_warning() -> None:
    fine = record(text(1.0), text(2.0, finish_reason="stop"), usage(2.0, 1, 2))
    assert warnings(make_run(ClosedLoop(1), [fine])) == []
    (coalesced,) = warnings(make_run(ClosedLoop(1), [record(text(1.0), usage(2.0, 1, 2))]))
    assert "2.00 tokens a chunk" in coalesced
    (uncounted,) = warnings(make_run(ClosedLoop(1), [record(text(1.0))]))
    assert "without usage" in uncounted
    (busy,) = warnings(make_run(ClosedLoop(1), [fine], cpu_s=3.9))
    assert "client kept its core busy" in busy
    late = record(text(1.0), text(2.0), usage(2.0, 1, 2))
    late.scheduled_s = -0.5
    (lag,) = warnings(make_run(OpenLoop(1.0, 1.0), [late]))
    assert "500.0 ms" in lag
    assert warnings(make_run(ClosedLoop(1), [late])) == []


def test_order_of_records_does_not_matter() -> None:
    shuffled = records()
    random.Random(1).shuffle(shuffled)
    first, second = summarize(records(), 4.0), summarize(shuffled, 4.0)
    assert dataclasses.replace(first, error_samples={}) == dataclasses.replace(second, error_samples={})
