"""The engine's process: `python -m llmserve.engine.process` loads the model it is told of and runs the loop.

Knows no HTTP, no text, no tokenizer. The loop itself is in `loop.py`, which knows no model.
"""

from __future__ import annotations

import os
import sys
import time

from llmserve.config import EngineConfig
from llmserve.engine.core import EngineCore
from llmserve.engine.flight_recorder import FlightRecorder, RecordedLauncher, RecordedRunner
from llmserve.engine.launch import EngineLaunch
from llmserve.engine.loop import Send, run_engine
from llmserve.engine.overlap import OverlappedCore
from llmserve.errors import EngineDeadError
from llmserve.kv_cache.manager import KVCacheManager
from llmserve.messages import EngineReady, LoadProgress
from llmserve.scheduler.adaptive_drafter import make_drafter
from llmserve.scheduler.latency_budget import make_budget
from llmserve.scheduler.lookahead import SettledDrafter
from llmserve.scheduler.policy import make_policy
from llmserve.scheduler.scheduler import Scheduler
from llmserve.worker.gpu_model_runner import GPUModelRunner
from llmserve.worker.loader import prepare_model
from llmserve.worker.model_runner import ModelRunner

_PROGRESS_S = 0.05


def build_core(
    config: EngineConfig, send: Send, server_pid: int | None = None, recorder: FlightRecorder | None = None
) -> tuple[EngineCore, EngineReady]:
    """Plans, says the plan, loads; gives up if the server that waits for it has ended.

    Raises an LLMServeError that says what is wrong with the model or the machine.
    """
    started = time.monotonic()
    prepared = prepare_model(config)
    send(prepared.plan)
    last_sent = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last_sent
        now = time.monotonic()
        if server_pid is not None and os.getppid() != server_pid:
            raise EngineDeadError("The server process has ended.")
        if done >= total or now - last_sent > _PROGRESS_S:
            last_sent = now
            send(LoadProgress("loading weights", done, total))

    runner = prepared.load(progress)
    return make_core(config, runner, recorder), EngineReady(runner.plan, time.monotonic() - started)


def make_core(
    config: EngineConfig, runner: ModelRunner | GPUModelRunner, recorder: FlightRecorder | None = None
) -> EngineCore:
    """A scheduler for what the runner's plan allows, and the loop around both: a step ahead where steps are
    launched."""
    plan = runner.plan
    budget = make_budget(plan.max_num_batched_tokens, config.itl_slowdown)
    drafter = make_drafter(config.speculation)
    overlaps = isinstance(runner, GPUModelRunner) and config.async_scheduling
    settled = SettledDrafter(drafter) if overlaps and drafter is not None else None
    scheduler = Scheduler(
        KVCacheManager(plan.num_blocks, plan.block_size, config.enable_prefix_caching),
        policy=make_policy(config.scheduling_policy),
        budget=budget,
        max_num_seqs=plan.max_num_seqs,
        max_model_len=plan.max_model_len,
        drafter=settled or drafter,
    )
    if isinstance(runner, GPUModelRunner) and overlaps:
        launcher = runner if recorder is None else RecordedLauncher(runner, recorder)
        return OverlappedCore(scheduler, budget, launcher, time.monotonic, settled)
    recorded = runner if recorder is None else RecordedRunner(runner, recorder)
    return EngineCore(scheduler, budget, recorded, time.monotonic, drafter)


def build_for_launch(launch: EngineLaunch, send: Send, recorder: FlightRecorder) -> tuple[EngineCore, EngineReady]:
    """The `BuildCore` of a real engine."""
    return build_core(launch.config, send, launch.server_pid, recorder)


if __name__ == "__main__":
    sys.exit(run_engine(build_for_launch))
