"""From the death of an engine to the next token of its stream, with a standby and without, in turns.

    python -m benchmarks.bench_recovery --rounds 5

The embedded model on the CPU. Each round kills the engine (SIGKILL) under one greedy stream that has said 16 tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import statistics
import time

from benchmarks.needs import psutil
from llmserve.config import EngineConfig
from llmserve.engine.processes import ENGINE_COMMAND, STANDBY_COMMAND, EngineProcesses
from llmserve.engine.supervision import SupervisionSettings
from llmserve.engine.supervisor import EngineSupervisor
from llmserve.errors import LLMServeError
from llmserve.messages import EngineRequest, EngineStats, SamplingParams, StepOutputs
from llmserve.metrics import ModelMetrics
from llmserve.repository import embedded

MIB = 2**20


class Stream:
    """Notes when each token came."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.news = asyncio.Event()

    def on_step(self, step: StepOutputs) -> None:
        """Tokens of the only request."""
        self.times_s += [time.monotonic() for output in step.outputs for _ in output.token_ids]
        self.news.set()

    def on_idle(self, stats: EngineStats) -> None:
        """Nothing to note."""

    def on_failed(self, request_ids: list[str], error: LLMServeError) -> None:
        """Must not happen."""
        raise error

    async def until(self, num_tokens: int) -> None:
        """Waits until so many have come."""
        while len(self.times_s) < num_tokens:
            self.news.clear()
            await self.news.wait()


async def measure(with_standby: bool) -> tuple[float, dict[str, float]]:
    """(seconds without a token, MiB of the standby at rest)."""
    stream = Stream()
    processes = EngineProcesses(ENGINE_COMMAND, STANDBY_COMMAND if with_standby else None)
    config = EngineConfig(model=str(embedded.fetch(embedded.DEFAULT_LLM)), device="cpu", kv_cache_memory=64 * MIB)
    supervisor = EngineSupervisor(
        "m", config, stream, ModelMetrics("m"), SupervisionSettings(stall_timeout_s=60), processes, "error"
    )
    memory: dict[str, float] = {}
    try:
        await supervisor.start()
        if with_standby:
            memory = await at_rest(processes)
        params = SamplingParams(max_tokens=64, temperature=0.0, seed=1)
        supervisor.add(
            EngineRequest(request_id="r", prompt_token_ids=[7, 8, 9], params=params, arrival_s=time.monotonic())
        )
        await stream.until(16)
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGKILL)
        died_s, num_before = time.monotonic(), len(stream.times_s)
        await stream.until(num_before + 4)
        supervisor.abort(["r"])  # the rest of the answer is of no interest
        later_s = [time_s for time_s in stream.times_s if time_s > died_s]  # a step may have been on its way
        return max(after - before for before, after in itertools.pairwise([died_s, *later_s])), memory
    finally:
        await supervisor.shutdown(5)
        await processes.close()


async def at_rest(processes: EngineProcesses) -> dict[str, float]:
    """Waits until the standby has made its imports; what it holds then."""
    seen_s = -1.0
    while True:
        await asyncio.sleep(1.0)
        if processes.standby_pid is None:
            continue
        standby = psutil.Process(processes.standby_pid)
        used_s = sum(standby.cpu_times()[:2])
        if used_s == seen_s and used_s > 0.5:
            info = standby.memory_full_info()
            return {name: round(getattr(info, name) / MIB) for name in ("rss", "pss", "uss")}
        seen_s = used_s


def main() -> None:
    """Prints both, and what the standby holds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    pauses_s: dict[bool, list[float]] = {True: [], False: []}
    memory: dict[str, float] = {}
    for _ in range(parser.parse_args().rounds):
        for with_standby in (True, False):
            pause_s, held = asyncio.run(measure(with_standby))
            pauses_s[with_standby].append(round(pause_s, 2))
            memory = held or memory
    report = {
        "with a standby": {"median_s": statistics.median(pauses_s[True]), "all_s": pauses_s[True]},
        "without": {"median_s": statistics.median(pauses_s[False]), "all_s": pauses_s[False]},
        "standby_mib": memory,
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
