"""llmserve and other servers on the same machine, one at a time, round by round, through one load generator.

    python -m benchmarks.peers setup llama.cpp openvino vllm
    python -m benchmarks.peers run llama.cpp openvino vllm --rounds 3 --json FILE
    python -m benchmarks.peers run standard

`run` takes peers (all their formats), single ones (`llama.cpp:q4_0`, `llmserve:int8`), or `standard`: what RESULTS.md
compares, 16, 8 and 4 bits of each. Three rounds of it take some 26 minutes on two cores, with --requests-per-user 2
some 20. Unless some of llmserve's own are named, all of them take part. Each turn starts a server, measures and stops
it, and the order turns with the round, so that what else the machine does falls on all alike. Needs an otherwise idle
machine; figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from benchmarks.peers.install import PEERS, install, write_gguf_files
from benchmarks.peers.measure import Figures, Plan, measure, medians, metrics
from benchmarks.peers.report import print_figures, print_ratios, ratios
from benchmarks.peers.servers import Contender, Layout, contenders, running
from llmserve.repository import embedded
from llmserve.repository.cache import cache_dir

STANDARD = ["llmserve:default", "llmserve:bf16", "llmserve:q8_0", "llmserve:q4_0", "llama.cpp:bf16", "llama.cpp:q8_0"]
STANDARD += ["llama.cpp:q4_0", "openvino:fp16", "openvino:int8", "openvino:int8-kv16", "openvino:int4"]


def main() -> int:
    options = _parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by an exception, or the server that runs would stay
    layout = Layout(options.work_dir, options.model or embedded.fetch(embedded.DEFAULT_LLM))
    if options.command == "setup":
        install(options.names, layout)
        return 0
    plan = Plan(
        concurrency=[int(part) for part in options.concurrency.split(",")],
        output_len=options.output_len,
        requests_per_user=options.requests_per_user,
    )
    write_gguf_files(layout)
    chosen = choose(options.names, contenders(layout, options.threads))
    rounds, failures = run_rounds(chosen, plan, options.rounds, layout.work / "logs", options.json)
    summary = {contender.name: medians(rounds[contender.name]) for contender in chosen}
    print_figures(summary, plan)
    print_ratios(chosen, summary, plan)
    for name, reason in failures.items():
        print(f"\n{name} failed: {reason}", file=sys.stderr)
    return 1 if failures else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    setup = commands.add_parser("setup", help="install peers, each in an environment of its own")
    setup.add_argument("names", nargs="+", choices=PEERS, metavar="NAME", help=", ".join(PEERS))
    run = commands.add_parser("run", help="measure llmserve and peers in turns")
    run.add_argument("names", nargs="+", metavar="NAME", help="a peer, or one of its formats such as llama.cpp:q4_0")
    run.add_argument("--concurrency", default="1,8,32", help="users of the closed loops (default: %(default)s)")
    run.add_argument("--rounds", type=int, default=3)
    run.add_argument("--threads", type=int, default=2, help="of each server (default: %(default)s)")
    run.add_argument("--output-len", type=int, default=128, help="tokens of each answer (default: %(default)s)")
    run.add_argument("--requests-per-user", type=int, default=3, help="in each closed loop (default: %(default)s)")
    run.add_argument("--json", type=Path, help="write every round's figures here, after each turn")
    for command in (setup, run):
        command.add_argument("--work-dir", type=Path, default=cache_dir() / "peers", help="default: %(default)s")
        command.add_argument("--model", type=Path, help="a Llama folder with the embedded model's tokenizer")
    return parser.parse_args()


def choose(names: list[str], known: list[Contender]) -> list[Contender]:
    """Those that are named, by themselves or by their peer, and llmserve's own."""
    if not any(name.partition(":")[0] in ("llmserve", "standard") for name in names):
        names = ["llmserve", *names]
    if "standard" in names:
        names = [*(name for name in names if name != "standard"), *STANDARD]
    unknown = [name for name in names if not any(name in (one.name, one.peer) for one in known)]
    if unknown:
        raise SystemExit(f"No such server: {', '.join(unknown)}. There are: {', '.join(one.name for one in known)}.")
    return [one for one in known if one.name in names or one.peer in names]


def run_rounds(
    chosen: list[Contender], plan: Plan, num_rounds: int, logs: Path, report: Path | None
) -> tuple[dict[str, list[Figures]], dict[str, str]]:
    """Every round's figures by contender, and why some have none. Who failed once is not started again."""
    logs.mkdir(parents=True, exist_ok=True)
    rounds: dict[str, list[Figures]] = {contender.name: [] for contender in chosen}
    failures: dict[str, str] = {}
    for number in range(num_rounds):
        shift = number % len(chosen)
        for contender in [*chosen[shift:], *chosen[:shift]]:
            if contender.name in failures:
                continue
            log = logs / f"{contender.name.replace(':', '-')}.log"
            begin_s = time.monotonic()
            try:
                with tempfile.TemporaryDirectory() as scratch, running(contender, log) as server:
                    figures = measure(server, plan, number, Path(scratch) / "bench.json")
            except (RuntimeError, OSError, httpx.HTTPError) as error:
                failures[contender.name] = str(error)
                outcome = "failed"
            else:
                rounds[contender.name].append(figures)
                outcome = ", ".join(f"{metric.title}: {figures[metric.key]:.1f}" for metric in metrics(plan))
            seconds = time.monotonic() - begin_s
            print(f"round {number + 1}, {contender.name}, {seconds:.0f} s: {outcome}", flush=True)
            if report is not None:
                report.write_text(json.dumps(_as_json(rounds, failures, chosen, plan), indent=1) + "\n")
    return rounds, failures


def _as_json(
    rounds: dict[str, list[Figures]], failures: dict[str, str], chosen: list[Contender], plan: Plan
) -> dict[str, Any]:
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "system": platform.platform()},
        "commit": _commit(),
        "plan": vars(plan) | {"metrics": [metric.key for metric in metrics(plan)]},
        "commands": {contender.name: contender.command for contender in chosen},
        "rounds": rounds,
        "failures": failures,
        "medians": {name: medians(figures) for name, figures in rounds.items()},
        "ratios": ratios(chosen, {name: medians(figures) for name, figures in rounds.items()}, plan),
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
