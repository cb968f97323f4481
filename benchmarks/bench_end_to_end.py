"""The whole server on this machine: latency and throughput by concurrency, prefill, a long prompt beside others.

Starts `llmserve serve` over the embedded model, and drives it through HTTP from another process with the product's own
load generator. Needs an otherwise idle machine; the figures are medians over `--repeat` rounds.

    python -m benchmarks.bench_end_to_end [--repeat 3] [--json FILE] [-- flags for the server]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

CONCURRENCY = (1, 8, 32)
PROMPT_TOKENS, OUTPUT_TOKENS, PREFILL_TOKENS, LONG_PROMPT_TOKENS = 128, 128, 1024, 2000
NUM_STREAMS, QUIET_S = 8, 4.0


@contextmanager
def running_server(flags: list[str]) -> Iterator[str]:
    """The URL of a fresh server."""
    command = [sys.executable, "-m", "llmserve.cli", "serve", "--port", "0", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        # the rest of its output is short: it fits the pipe
        assert process.stderr is not None
        try:
            output = ""
            for line in process.stderr:
                output += line
                if match := re.search(r"Ready in .*: (http://\S+)/v1", line):
                    yield match[1]
                    break
            else:
                raise SystemExit(f"the server did not start:\n{output}")
        finally:
            process.terminate()


def load(url: str, concurrency: int, report: Path) -> dict[str, Any]:
    """One closed-loop run of the load generator."""
    command = [sys.executable, "-m", "llmserve.cli", "bench", "--url", url, "--concurrency", str(concurrency)]
    command += ["--num-requests", str(max(4, 2 * concurrency)), "--prompt-len", f"64:{2 * PROMPT_TOKENS - 64}"]
    command += ["--output-len", str(OUTPUT_TOKENS), "--ignore-eos", "--json", str(report)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads(report.read_text())
    return result


async def prefill(url: str, number: int) -> float:
    """Tokens a second of a prompt that nobody has sent before, and one token of answer."""
    prompt = [(17 * at + 7919 * number) % 40000 + 100 for at in range(PREFILL_TOKENS)]
    async with httpx.AsyncClient(timeout=120) as client:
        begin_s = time.perf_counter()
        answer = await client.post(f"{url}/v1/completions", json={"prompt": prompt, "max_tokens": 1})
        answer.raise_for_status()
    return PREFILL_TOKENS / (time.perf_counter() - begin_s)


async def interference(url: str, number: int, num_tokens: int = LONG_PROMPT_TOKENS) -> dict[str, float]:
    """p99 between tokens of 8 streams, quiet, and from when a prompt of `num_tokens` arrives until it is answered."""
    quiet: list[float] = []
    beside: list[float] = []
    current = quiet

    async def stream(client: httpx.AsyncClient, index: int) -> None:
        ask = {"prompt": [index + 100 * number + 5] * 64, "max_tokens": 4000, "ignore_eos": True, "stream": True}
        async with client.stream("POST", f"{url}/v1/completions", json=ask) as answer:
            last_s = 0.0
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    now_s = time.perf_counter()
                    if last_s:
                        current.append(now_s - last_s)
                    last_s = now_s

    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=32)) as client:
        streams = [asyncio.create_task(stream(client, index)) for index in range(NUM_STREAMS)]
        await asyncio.sleep(2.0)
        quiet.clear()
        await asyncio.sleep(QUIET_S)
        current = beside
        prompt = [(31 * at + 104729 * number) % 40000 + 100 for at in range(num_tokens)]
        begin_s = time.perf_counter()
        answer = await client.post(f"{url}/v1/completions", json={"prompt": prompt, "max_tokens": 1})
        answer.raise_for_status()
        long_ttft_s = time.perf_counter() - begin_s
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    p99_quiet, p99_beside = (statistics.quantiles(values, n=100)[98] for values in (quiet, beside))
    return {
        "quiet_p99_ms": p99_quiet * 1e3,
        "beside_p99_ms": p99_beside * 1e3,
        "ratio": p99_beside / p99_quiet,
        "long_prompt_ttft_s": long_ttft_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every round's figures here")
    parser.add_argument("flags", nargs="*", help="flags for `llmserve serve`")
    options = parser.parse_args()
    report = Path(f"{options.json or 'bench'}.round")
    rounds: dict[str, list[Any]] = {"prefill": [], "interference": []} | {f"c={c}": [] for c in CONCURRENCY}
    with running_server(options.flags) as url:
        load(url, 1, report)  # warm
        for number in range(options.repeat):
            for concurrency in CONCURRENCY:
                rounds[f"c={concurrency}"].append(load(url, concurrency, report))
            rounds["prefill"].append(asyncio.run(prefill(url, number)))
            rounds["interference"].append(asyncio.run(interference(url, number)))
    report.unlink(missing_ok=True)
    if options.json:
        options.json.write_text(json.dumps(rounds, indent=1))
    print_summary(rounds)


def print_summary(rounds: dict[str, list[Any]]) -> None:
    print("concurrency  output tok/s  TTFT p50 ms  TPOT p50 ms  ITL p50 ms  ITL p99 ms")
    for concurrency in CONCURRENCY:
        runs = [result["runs"][0]["summary"] for result in rounds[f"c={concurrency}"]]
        rate = statistics.median(run["output_tokens_per_s"] for run in runs)
        figures = [("ttft_ms", "p50"), ("tpot_ms", "p50"), ("itl_ms", "p50"), ("itl_ms", "p99")]
        columns = [f"{statistics.median(run[name][share] for run in runs):11.1f}" for name, share in figures]
        print(f"{concurrency:11d}  {rate:12.1f}", *columns)
    print(f"prefill {PREFILL_TOKENS} tokens: {statistics.median(rounds['prefill']):.0f} tokens/s")
    for key in rounds["interference"][0]:
        print(f"long prompt beside {NUM_STREAMS} streams, {key}: {_median(rounds['interference'], key):.2f}")


def _median(runs: list[dict[str, Any]], key: str) -> float:
    return round(statistics.median(run[key] for run in runs), 3)


if __name__ == "__main__":
    main()
