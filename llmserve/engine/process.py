"""The engine's process: `python -m llmserve.engine.process` loads the model it is told of and runs the loop.

Knows no HTTP, no text, no tokenizer. The loop itself is in `loop.py`, which knows no model.
"""

from __future__ import annotations

import os
import sys
import time

from llmserve.config import EngineConfig
from llmserve.engine.core import EngineCore
from llmserve.engine.flight_recorder import FlightRecorder, RecordedRunner
from llmserve.engine.launch import EngineLaunch
from llmserve.engine.loop import Send, run_engine
from llmserve.errors import EngineDeadError
from llmserve.kv_cache.manager import KVCacheManager
from llmserve.messages import EngineReady, LoadProgress
from llmserve.scheduler.adaptive_drafter import make_drafter
from llmserve.scheduler.latency_budget import make_budget
from llmserve.scheduler.policy import make_policy
from llmserve.scheduler.scheduler import Scheduler
from llmserve.worker.loader import prepare_model

_PROGRESS_S = 0.05


def build_core(
    config: EngineConfig, send: Send, server_pid: int | None = None, recorder: FlightRecorder | None = None
) -> tuple[EngineCore, EngineReady]:
    """Plans, says the plan, loads; gives up if the server that waits for it has ended.

    Raises an LLMServeError that says what is wrong with the model or the machine.
    """
    started = time.monotonic()
    prepared = prepare_model(config)
    plan = prepared.plan
    send(plan)
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
    budget = make_budget(plan.max_num_batched_tokens, config.itl_slowdown)
    drafter = make_drafter(config.speculation)
    scheduler = Scheduler(
        KVCacheManager(plan.num_blocks, plan.block_size, config.enable_prefix_caching),
        policy=make_policy(config.scheduling_policy),
        budget=budget,
        max_num_seqs=plan.max_num_seqs,
        max_model_len=plan.max_model_len,
        drafter=drafter,
    )
    recorded = runner if recorder is None else RecordedRunner(runner, recorder)
    core = EngineCore(scheduler, budget, recorded, time.monotonic, drafter)
    return core, EngineReady(plan, time.monotonic() - started)


def build_for_launch(launch: EngineLaunch, send: Send, recorder: FlightRecorder) -> tuple[EngineCore, EngineReady]:
    """The `BuildCore` of a real engine."""
    return build_core(launch.config, send, launch.server_pid, recorder)


if __name__ == "__main__":
    sys.exit(run_engine(build_for_launch))
