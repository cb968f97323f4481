"""General models over HTTP beside the real Triton: what a request costs the CPU, and who waits how long.

    python -m benchmarks.triton setup
    python -m benchmarks.triton run [--rounds 3] [--seconds 2] [--only identity-json] [--without-triton]
    python -m benchmarks.triton perf-analyzer

Both servers serve the same repository of Python models and are asked by the same clients, each alone in its turn. CPU
time is the server's and its models' processes', by the kernel's accounts; the clients' is not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import struct
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import uvloop

from benchmarks.triton import perf_analyzer
from benchmarks.triton.load import Counts, flood, post
from benchmarks.triton.model_files import NUM_STREAMED, QUEUE_TIMEOUT_MS, write_repository
from benchmarks.triton.servers import Running, install, llmserve, running, triton
from llmserve.repository.cache import cache_dir

VALUES = [0.5 * i for i in range(16)]


@dataclass(frozen=True)
class Case:
    """A row of the table: CPU a request, or a streamed response."""

    name: str
    title: str
    request: bytes
    concurrency: int
    predicted_us: float
    target: str
    responses: int = 1


# Microseconds of llmserve's processes, from the parts. A request on the short way, past the door and back, costs 20, of
# which two system calls are half; our reading and writing of JSON with 16 numbers 15, of binary tensors 13; a request
# to the model and back 50 if it is handed ahead (15 in the server, 20 in the model's process, a third of each wake-up)
# and 27 if it is batched.
HTTP_US, JSON_US, BINARY_US, ALONE_US, BATCHED_US, STREAMED_US = 20, 15, 13, 50, 27, 12


def cases() -> list[Case]:
    """Those that are measured in CPU time."""
    return [
        Case(
            "identity-json",
            "identity FP32[16], JSON, c=8",
            _json_request("identity", [16]),
            8,
            HTTP_US + JSON_US + ALONE_US,
            "130, then 100",
        ),
        Case(
            "identity-binary",
            "the same, binary tensors",
            _binary_request("identity", [16]),
            8,
            HTTP_US + BINARY_US + ALONE_US,
            "100",
        ),
        Case(
            "mlp-binary",
            "batched MLP, binary, c=32",
            _binary_request("mlp", [1, 16]),
            32,
            HTTP_US + BINARY_US + BATCHED_US,
            "80",
        ),
        Case(
            "stream",
            "generate_stream, a token, c=8",
            post("/v2/models/stream/generate_stream", b'{"INPUT0": 1.5}'),
            8,
            STREAMED_US + 6,
            "20",
            NUM_STREAMED,
        ),
    ]


def _json_request(model: str, shape: list[int]) -> bytes:
    tensor = {"name": "INPUT0", "datatype": "FP32", "shape": shape, "data": VALUES}
    return post(f"/v2/models/{model}/infer", json.dumps({"inputs": [tensor]}).encode())


def _binary_request(model: str, shape: list[int]) -> bytes:
    data = struct.pack("<16f", *VALUES)
    tensor = {"name": "INPUT0", "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return post(f"/v2/models/{model}/infer", head + data, f"Inference-Header-Content-Length: {len(head)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    setup = commands.add_parser("setup", help="install Triton into a folder of its own")
    run = commands.add_parser("run", help="measure both in turns")
    run.add_argument("--rounds", type=int, default=3)
    run.add_argument("--seconds", type=float, default=2.0, help="of load, each case and round (default: %(default)s)")
    run.add_argument("--only", help="one case by name, or `latency`")
    run.add_argument("--without-triton", action="store_true")
    analyze = commands.add_parser("perf-analyzer", help="Triton's own load generator against both, HTTP and gRPC")
    for command in (setup, run, analyze):
        command.add_argument("--work-dir", type=Path, default=cache_dir() / "peers" / "triton", help="%(default)s")
    options = parser.parse_args()
    if options.command == "setup":
        install(options.work_dir)
        perf_analyzer.install(options.work_dir)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by an exception, or the servers would stay
    with tempfile.TemporaryDirectory() as scratch:
        repository = Path(scratch) / "models"
        write_repository(repository)
        chosen = [llmserve(repository)]
        if options.command == "perf-analyzer" or not options.without_triton:
            chosen.append(triton(options.work_dir, repository))
        logs = Path(scratch)
        if options.command == "perf-analyzer":
            for server in chosen:
                with running(server, logs / f"{server.name}.log") as started:
                    for protocol in ("http", "grpc"):
                        print(perf_analyzer.run(options.work_dir, started, protocol, "identity", 8), flush=True)
            return
        found: dict[tuple[str, str], list[float]] = {}
        for number in range(options.rounds):
            for server in chosen[:: 1 if number % 2 == 0 else -1]:
                with running(server, logs / f"{server.name}.log") as started:
                    figures = uvloop.run(measure(started, options.only, options.seconds))
                for key, value in figures.items():
                    found.setdefault((key, server.name), []).append(value)
        print_table(found, [server.name for server in chosen], options.only)


async def measure(server: Running, only: str | None, seconds: float) -> dict[str, float]:
    """One turn of one server: microseconds of CPU by case, milliseconds of the others."""
    figures = {case.name: await cpu_us(server, case, seconds) for case in cases() if only in (None, case.name)}
    return figures | (await latencies(server) if only in (None, "latency") else {})


def print_table(found: dict[tuple[str, str], list[float]], names: list[str], only: str | None) -> None:
    """A line for each case: the median of the rounds, and their range."""
    print(f"{'':<34}{'predicted':>10}" + "".join(f"{name:>22}" for name in names) + f"{'target':>20}")
    rows: list[tuple[str, str, str, str]] = [
        (case.name, case.title, f"{case.predicted_us:.0f}", f"<= {case.target} us")
        for case in cases()
        if only in (None, case.name)
    ]
    if only in (None, "latency"):
        rows.append(("timeout", f"{QUEUE_TIMEOUT_MS} ms queue timeout, ms", "101", "<= 105 ms"))
        rows.append(("no_delay", "lone request, no delay, p50 ms", "", ""))
        rows.append(("delay", "with a 500 us delay, p50 ms", "", "as without"))
    for key, title, predicted, target in rows:
        print(f"{title:<34}{predicted:>10}" + "".join(_cell(found[key, name]) for name in names) + f"{target:>20}")


def _cell(values: list[float]) -> str:
    digits = 2 if max(values) < 10 else 1
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})".rjust(22)


async def cpu_us(server: Running, case: Case, seconds: float) -> float:
    """Of the server's processes, for each response. Warmed up first; the answers are looked at once."""
    warm_up = await flood(server.port, case.request, case.concurrency, max(2, 500 // case.responses) * 2)
    check(server, case, warm_up)
    rate = warm_up.answers / sum(warm_up.waits_s) * case.concurrency
    num_requests = max(case.concurrency, int(rate * seconds))
    before_s = server.cpu_seconds()
    counts = await flood(server.port, case.request, case.concurrency, num_requests)
    return 1e6 * (server.cpu_seconds() - before_s) / (counts.answers * case.responses)


def check(server: Running, case: Case, counts: Counts) -> None:
    """Raises RuntimeError if what came back is not an answer."""
    status = counts.last_answer[:12]
    if not status.endswith(b" 200") or counts.events not in (0, counts.answers * case.responses):
        raise RuntimeError(f"{server.name}, {case.name}: {counts.last_answer[:500]!r}")


async def latencies(server: Running) -> dict[str, float]:
    """Milliseconds: until a queue time-out is answered, and the median of a lone request with and without a delay."""
    waits: dict[str, float] = {}
    slow = _json_request("slow", [16])
    first = asyncio.create_task(flood(server.port, slow, 1, 1))
    await asyncio.sleep(0.02)
    behind = await flood(server.port, slow, 1, 1)
    if b" 503 " not in behind.last_answer[:20]:
        raise RuntimeError(f"{server.name}: no time-out, but {behind.last_answer[:200]!r}")
    waits["timeout"] = behind.waits_s[0] * 1e3
    await first
    for model in ("no_delay", "delay"):
        counts = await flood(server.port, _binary_request(model, [1, 16]), 1, 1000)
        waits[model] = statistics.median(counts.waits_s) * 1e3
    return waits


if __name__ == "__main__":
    main()
