"""What is measured of a running server, and what rounds of it come to. Knows neither peers nor how they are started."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.peers.cpu_time import front_and_rest
from benchmarks.peers.servers import RunningServer

PROMPT_LEN, PREFILL_TOKENS, PREFILL_REPEATS = "64:192", 1024, 3
MIN_REQUESTS, WARMUP_LEN = 6, 8

Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one turn of a server consists of."""

    concurrency: list[int]
    output_len: int
    requests_per_user: int


@dataclass(frozen=True)
class Metric:
    """One figure that ratios are taken of."""

    key: str
    title: str
    higher_is_better: bool = True


def measure(server: RunningServer, plan: Plan, number: int, scratch: Path) -> Figures:
    """One turn. Servers with the same `number` get the same prompts, and no server gets one twice.

    Raises RuntimeError if a request fails or an answer is not as long as was asked: such figures compare nothing.
    """
    figures: Figures = {}
    for concurrency in plan.concurrency:
        figures |= _load(server, plan, concurrency, 1000 * number + concurrency, scratch)
    figures["prefill_tok_s"] = _prefill(server.url, number)
    return figures


def metrics(plan: Plan) -> list[Metric]:
    """Of what is compared: one stream by its speed and its first token, several by their throughput."""
    found = []
    for concurrency in plan.concurrency:
        if concurrency == 1:
            found.append(Metric("c1_decode_tok_s", "decode tok/s, c=1"))
            found.append(Metric("c1_ttft_p50_ms", "TTFT p50 ms, c=1", higher_is_better=False))
        else:
            found.append(Metric(f"c{concurrency}_out_tok_s", f"output tok/s, c={concurrency}"))
    return [*found, Metric("prefill_tok_s", f"prefill {PREFILL_TOKENS}, tok/s")]


def medians(rounds: Iterable[Figures]) -> Figures:
    """Of each figure, over the rounds it was measured in."""
    rounds = list(rounds)
    return {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]} if rounds else {}


def _load(server: RunningServer, plan: Plan, concurrency: int, seed: int, scratch: Path) -> Figures:
    """A closed loop, after a short one that meets the batch sizes some peers compile kernels for at first sight."""
    num_requests = max(MIN_REQUESTS, plan.requests_per_user * concurrency)
    _bench(server.url, concurrency, concurrency, min(plan.output_len, WARMUP_LEN), seed + 500, scratch)
    before = front_and_rest(server.pid)
    summary = _bench(server.url, concurrency, num_requests, plan.output_len, seed, scratch)
    front, rest = (end - start for end, start in zip(front_and_rest(server.pid), before, strict=True))
    figures = {
        "front_cpu_percent": 100 * front / (front + rest) if front + rest else 0.0,
        "cpu_s": front + rest,
        "out_tok_s": summary["output_tokens_per_s"],
        "decode_tok_s": 1e3 / summary["tpot_ms"]["p50"],
        "ttft_p50_ms": summary["ttft_ms"]["p50"],
        "itl_p50_ms": summary["itl_ms"]["p50"],
        "itl_p99_ms": summary["itl_ms"]["p99"],
        "input_len": summary["input_len"]["mean"],
        "tokens_per_chunk": summary["tokens_per_chunk"],
    }
    return {f"c{concurrency}_{key}": value for key, value in figures.items()}


def _bench(url: str, concurrency: int, num_requests: int, output_len: int, seed: int, scratch: Path) -> dict[str, Any]:
    """The summary of one run of the product's own load generator, in a process of its own."""
    command = [sys.executable, "-m", "llmserve.cli", "bench", "--url", f"{url}/v1", "--endpoint", "completions"]
    command += ["--concurrency", str(concurrency), "--num-requests", str(num_requests), "--seed", str(seed)]
    command += ["--prompt-len", PROMPT_LEN, "--output-len", str(output_len), "--ignore-eos", "--json", str(scratch)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"the load generator failed:\n{done.stdout[-2000:]}")
    summary: dict[str, Any] = json.loads(scratch.read_text())["runs"][0]["summary"]
    if summary["num_succeeded"] != num_requests:
        raise RuntimeError(f"{num_requests - summary['num_succeeded']} requests failed: {summary['error_samples']}")
    if summary["output_len"]["min"] != output_len:
        raise RuntimeError(f"an answer of {summary['output_len']['min']} tokens where {output_len} were asked for")
    return summary


def _prefill(url: str, number: int) -> float:
    """Tokens a second from a prompt's arrival to its one token of answer: the median of some prompts, each new."""
    seconds = []
    with httpx.Client(timeout=120) as client:  # made once: a client reads certificates for 25 ms
        for repeat in range(PREFILL_REPEATS):
            first = 7919 * (PREFILL_REPEATS * number + repeat + 1)
            prompt = [(17 * at + first) % 40000 + 100 for at in range(PREFILL_TOKENS)]
            begin_s = time.perf_counter()
            answer = client.post(f"{url}/v1/completions", json={"prompt": prompt, "max_tokens": 1})
            seconds.append(time.perf_counter() - begin_s)
            answer.raise_for_status()
            counted = answer.json()["usage"]["prompt_tokens"]
            if counted != PREFILL_TOKENS:
                raise RuntimeError(f"the server counts {counted} tokens in a prompt of {PREFILL_TOKENS} ids")
    return PREFILL_TOKENS / statistics.median(seconds)
