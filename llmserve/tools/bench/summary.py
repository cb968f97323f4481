"""Turns the records of a run into figures: percentiles, rates, goodput, errors by kind. Knows no server, no screen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmserve.errors import ConfigError
from llmserve.tools.bench.record import RequestRecord

LATENCIES = ("ttft", "itl", "tpot", "e2e")
SLO_LATENCIES = ("ttft", "tpot", "e2e")  # those that a request has one of


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The percentile of ascending `ordered`, interpolated linearly between neighbours (numpy's default)."""
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


@dataclass(frozen=True, slots=True)
class Spread:
    """How a quantity is distributed."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    min: float
    max: float


def spread(values: Iterable[float]) -> Spread | None:
    """None for no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    p50, p90, p99 = (percentile(ordered, percent) for percent in (50, 90, 99))
    return Spread(len(ordered), math.fsum(ordered) / len(ordered), p50, p90, p99, ordered[0], ordered[-1])


def latencies_ms(records: Iterable[RequestRecord], name: str) -> list[float]:
    """All values of one of LATENCIES over the requests that succeeded, in milliseconds, in the records' order."""
    succeeded = [record for record in records if record.succeeded]
    if name == "itl":
        return [itl_s * 1e3 for record in succeeded for itl_s in record.itls_s]
    values = (getattr(record, f"{name}_s") for record in succeeded)
    return [value_s * 1e3 for value_s in values if value_s is not None]


def parse_slo(text: str) -> dict[str, float]:
    """Reads `ttft:200,tpot:50`: the milliseconds a good request stays within. Raises ConfigError."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition(":")
        try:
            limit_ms = float(value)
        except ValueError:
            limit_ms = -1.0
        if name not in SLO_LATENCIES or not limit_ms > 0:
            raise ConfigError(f"--slo {part!r}: write ttft:MS, tpot:MS or e2e:MS, several joined by commas.")
        limits[name] = limit_ms
    return limits


def meets_slo(record: RequestRecord, slo: dict[str, float]) -> bool:
    """Whether a request succeeded within every limit. A latency it does not have (TPOT of one token) breaks none."""
    values_s = ((getattr(record, f"{name}_s"), limit_ms) for name, limit_ms in slo.items())
    return record.succeeded and all(value_s is None or value_s * 1e3 <= limit_ms for value_s, limit_ms in values_s)


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one run. Rates and latencies are of the requests that succeeded; tokens are the server's count."""

    num_requests: int
    num_succeeded: int
    errors: dict[str, int]  # kind -> requests
    error_samples: dict[str, str]  # kind -> the first message of that kind
    duration_s: float  # from sending the first request to the end of the last
    requests_per_s: float
    input_tokens: int
    output_tokens: int
    input_tokens_per_s: float
    output_tokens_per_s: float
    cached_tokens: int | None  # of the input tokens; None: the server does not say
    num_without_usage: int  # requests whose output tokens had to be counted by chunks
    tokens_per_chunk: float | None
    goodput_per_s: float | None  # requests a second within the SLO; None: no SLO was given
    send_lag_ms: Spread | None  # how late the client itself was, against the arrival times wanted of it
    ttft_ms: Spread | None
    itl_ms: Spread | None
    tpot_ms: Spread | None
    e2e_ms: Spread | None
    input_len: Spread | None
    output_len: Spread | None

    def latency(self, name: str) -> Spread | None:
        """The spread of one of LATENCIES, in milliseconds."""
        return {"ttft": self.ttft_ms, "itl": self.itl_ms, "tpot": self.tpot_ms, "e2e": self.e2e_ms}[name]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def summarize(records: Sequence[RequestRecord], duration_s: float, slo: dict[str, float] | None = None) -> Summary:
    """The figures of a run that took `duration_s`. A request that is still unfinished must have been failed before."""
    succeeded = [record for record in records if record.succeeded]
    failed = [record for record in records if not record.succeeded]
    input_lens = [record.prompt_tokens for record in succeeded if record.prompt_tokens is not None]
    output_lens = [record.num_output_tokens for record in succeeded]
    cached = [record.cached_tokens for record in succeeded if record.cached_tokens is not None]
    num_token_chunks = sum(len(record.token_times_s) for record in succeeded)

    def per_s(amount: float) -> float:
        return amount / duration_s if duration_s > 0 else 0.0

    return Summary(
        num_requests=len(records),
        num_succeeded=len(succeeded),
        errors=dict(Counter(record.error_kind or "" for record in failed).most_common()),
        error_samples={record.error_kind or "": record.error_message for record in reversed(failed)},
        duration_s=duration_s,
        requests_per_s=per_s(len(succeeded)),
        input_tokens=sum(input_lens),
        output_tokens=sum(output_lens),
        input_tokens_per_s=per_s(sum(input_lens)),
        output_tokens_per_s=per_s(sum(output_lens)),
        cached_tokens=sum(cached) if cached else None,
        num_without_usage=sum(record.completion_tokens is None for record in succeeded),
        tokens_per_chunk=sum(output_lens) / num_token_chunks if num_token_chunks else None,
        goodput_per_s=None if slo is None else per_s(sum(meets_slo(record, slo) for record in records)),
        send_lag_ms=spread((record.start_s - record.scheduled_s) * 1e3 for record in records),
        ttft_ms=spread(latencies_ms(records, "ttft")),
        itl_ms=spread(latencies_ms(records, "itl")),
        tpot_ms=spread(latencies_ms(records, "tpot")),
        e2e_ms=spread(latencies_ms(records, "e2e")),
        input_len=spread(input_lens),
        output_len=spread(output_lens),
    )
