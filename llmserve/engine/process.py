"""The engine's process: `python -m llmserve.engine.process` loads the model it is told of and runs the loop.

Knows no HTTP, no text, no tokenizer. The loop itself is in `loop.py`, which knows no model.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from llmserve.config import EngineConfig
from llmserve.engine.assembly import make_core
from llmserve.engine.core import EngineCore
from llmserve.engine.flight_recorder import FlightRecorder
from llmserve.engine.launch import EngineLaunch
from llmserve.engine.loop import Send, run_engine
from llmserve.errors import EngineDeadError
from llmserve.messages import EngineReady, LoadProgress
from llmserve.worker.loader import prepare_model

_PROGRESS_S = 0.05


def build_core(
    config: EngineConfig, send: Send, server_pid: int | None = None, recorder: FlightRecorder | None = None
) -> tuple[EngineCore, EngineReady]:
    """Plans, says the plan, loads; gives up if the server that waits for it has ended.

    Raises an LLMServeError that says what is wrong with the model or the machine.
    """
    prepared = prepare_model(config)
    send(prepared.plan)
    last_sent = 0.0

    def report(stage: str) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            nonlocal last_sent
            now = time.monotonic()
            if server_pid is not None and os.getppid() != server_pid:
                raise EngineDeadError("The server process has ended.")
            if done >= total or now - last_sent > _PROGRESS_S:
                last_sent = now
                send(LoadProgress(stage, done, total))

        return progress

    runner = prepared.load(report("loading weights"), report("capturing CUDA graphs"))
    return make_core(config, runner, recorder), EngineReady(runner.plan)


def build_for_launch(launch: EngineLaunch, send: Send, recorder: FlightRecorder) -> tuple[EngineCore, EngineReady]:
    """The `BuildCore` of a real engine."""
    return build_core(launch.config, send, launch.server_pid, recorder)


if __name__ == "__main__":
    sys.exit(run_engine(build_for_launch))
