"""Shows the figures of a benchmark: tables for people, JSON for programs. Knows no server and measures nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from llmserve.tools.bench.load import ClosedLoop, Load
from llmserve.tools.bench.record import RequestRecord
from llmserve.tools.bench.summary import LATENCIES, Spread, Summary

SCHEMA = "llmserve-bench/1"  # goes up when a field changes its meaning or goes away
TITLES = {"ttft": "TTFT", "itl": "ITL (per chunk)", "tpot": "TPOT", "e2e": "e2e"}


@dataclass(frozen=True, slots=True)
class Run:
    """One load, what became of its requests, and what they come to."""

    load: Load
    records: list[RequestRecord]
    summary: Summary
    client_cpu_s: float
    interrupted: bool

    @property
    def client_cpu_share(self) -> float:
        """Of one core. Near 1 the client itself was the bottleneck, and the figures are its own."""
        return self.client_cpu_s / self.summary.duration_s if self.summary.duration_s > 0 else 0.0


def print_run(console: Console, run: Run) -> None:
    """Prints one run: latencies, then what else there is to know, then what went wrong."""
    summary = run.summary
    state = " (interrupted)" if run.interrupted else ""
    title = f"{run.load.label}: {summary.num_succeeded}/{summary.num_requests} requests in {summary.duration_s:.2f} s"
    table = Table(title=title + state, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in ("milliseconds", "mean", "p50", "p90", "p99", "max"):
        table.add_column(column, justify="left" if column == "milliseconds" else "right")
    for name in LATENCIES:
        values = summary.latency(name)
        cells = (
            ["-"] * 5 if values is None else [_ms(getattr(values, key)) for key in ("mean", "p50", "p90", "p99", "max")]
        )
        table.add_row(TITLES[name], *cells)
    console.print(table)
    for name, value in _facts(run):
        console.print(f"  {name:<17}{value}", markup=False, highlight=False, soft_wrap=True)
    for warning in warnings(run):
        console.print(f"  {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    for kind, count in summary.errors.items():
        sample = summary.error_samples[kind]
        line = f"  {count} x {kind}: {sample[:300]}"
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    console.print()


def _facts(run: Run) -> list[tuple[str, str]]:
    summary = run.summary
    facts = [
        ("requests/s", f"{summary.requests_per_s:.2f}"),
        (
            "output tokens/s",
            f"{summary.output_tokens_per_s:.1f}   ({summary.output_tokens} tokens, {_len(summary.output_len)})",
        ),
        (
            "input tokens/s",
            f"{summary.input_tokens_per_s:.1f}   ({summary.input_tokens} tokens, {_len(summary.input_len)})",
        ),
    ]
    if summary.cached_tokens is not None and summary.input_tokens:
        share = summary.cached_tokens / summary.input_tokens
        facts.append(("cached tokens", f"{summary.cached_tokens}   ({share:.1%} of the input)"))
    if summary.goodput_per_s is not None:
        facts.append(("goodput", f"{summary.goodput_per_s:.2f} requests/s within the SLO"))
    cost = ""
    if num_chunks := sum(record.num_chunks for record in run.records):
        cost = f", {run.client_cpu_s / num_chunks * 1e6:.1f} us a chunk"
    facts.append(("client CPU", f"{run.client_cpu_share:.1%} of a core{cost}"))
    return facts


def warnings(run: Run) -> list[str]:
    """What a reader must know before believing the figures."""
    summary = run.summary
    found = []
    if summary.num_without_usage:
        found.append(
            f"{summary.num_without_usage} answers came without usage: their tokens are counted by chunks, "
            "and TPOT and tokens/s are wrong if a chunk holds several."
        )
    if summary.tokens_per_chunk is not None and summary.tokens_per_chunk > 1.05:
        found.append(
            f"{summary.tokens_per_chunk:.2f} tokens a chunk: ITL is the gap between chunks; compare servers by TPOT."
        )
    if run.client_cpu_share > 0.8:
        found.append("The client kept its core busy: the figures may be its own limit and not the server's.")
    lag = summary.send_lag_ms
    if lag is not None and not isinstance(run.load, ClosedLoop) and lag.p99 > 10:
        found.append(f"Requests were sent late (p99 {lag.p99:.1f} ms): the client could not keep up with the arrivals.")
    return found


def print_sweep(console: Console, runs: list[Run]) -> None:
    """Prints several runs side by side, a row each."""
    table = Table(
        title="All runs, latencies in ms", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    load = "users" if isinstance(runs[0].load, ClosedLoop) else "req/s in"
    latencies = [("ttft", "p50"), ("ttft", "p99"), ("itl", "p50"), ("itl", "p99"), ("tpot", "p50"), ("e2e", "p50")]
    titles = [f"{'ITL' if name == 'itl' else TITLES[name]} {key}" for name, key in latencies]
    for column in (load, "req/s", "tok/s", *titles, "failed"):
        table.add_column(column, justify="right", min_width=5)
    for run in runs:
        summary = run.summary
        cells = [_cell(summary.latency(name), key) for name, key in latencies]
        failed = summary.num_requests - summary.num_succeeded
        rates = (f"{run.load.level:g}", f"{summary.requests_per_s:.2f}", f"{summary.output_tokens_per_s:.0f}")
        table.add_row(*rates, *cells, str(failed), style="red" if failed else "")
    console.print(table)


def as_json(config: dict[str, Any], runs: list[Run]) -> dict[str, Any]:
    """The report as plain data. Keys say their unit; requests start at seconds after the first one of their run."""
    return {"schema": SCHEMA, "config": config, "runs": [_run_as_json(run) for run in runs]}


def _run_as_json(run: Run) -> dict[str, Any]:
    origin_s = min((record.start_s for record in run.records), default=0.0)
    return {
        "label": run.load.label,
        "load": {"kind": "closed" if isinstance(run.load, ClosedLoop) else "open", **_finite(asdict(run.load))},
        "interrupted": run.interrupted,
        "client_cpu_s": run.client_cpu_s,
        "warnings": warnings(run),
        "summary": run.summary.as_dict(),
        "requests": [_record_as_json(record, origin_s) for record in run.records],
    }


def _record_as_json(record: RequestRecord, origin_s: float) -> dict[str, Any]:
    return {
        "start_s": record.start_s - origin_s,
        "prompt_len": record.prompt_len,
        "output_len": record.output_len,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "cached_tokens": record.cached_tokens,
        "num_chunks": record.num_chunks,
        "ttft_s": record.ttft_s,
        "tpot_s": record.tpot_s,
        "e2e_s": record.e2e_s,
        "finish_reason": record.finish_reason,
        "error_kind": record.error_kind,
        "error_message": record.error_message,
    }


def _finite(values: dict[str, float]) -> dict[str, float | str]:
    """JSON has no infinity: a metronome's burstiness is written as "inf"."""
    return {name: "inf" if value == float("inf") else value for name, value in values.items()}


def _cell(values: Spread | None, key: str) -> str:
    return "-" if values is None else _ms(getattr(values, key))


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _len(values: Spread | None) -> str:
    if values is None:
        return "none counted"
    if values.min == values.max:
        return f"{values.min:g} each"
    return f"{values.mean:.1f} on average, {values.min:g} to {values.max:g}"
