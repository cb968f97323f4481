"""Sees what a model takes on its GPU: the largest step is run and the largest graphs are captured, once, before the KV
cache takes the rest. Knows no scheduler."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from llmserve.messages import MemoryPlan
from llmserve.worker.device import Device
from llmserve.worker.gpu_model_runner import GPUModelRunner
from llmserve.worker.memory import MeasuredMemory


def measure_memory(
    device: Device, make_trial: Callable[[MemoryPlan], GPUModelRunner], plan: MemoryPlan, free_at_start: int
) -> MeasuredMemory:
    """What a loaded model takes. `make_trial` makes a runner on it that captures no graph by itself; `free_at_start`
    was free on the device before the model was loaded. Others on the device must keep still meanwhile.

    Graphs share a pool: the largest is counted as it is, all others as the second largest.
    """
    block_bytes = plan.kv_cache_bytes // plan.num_blocks
    device.release_cached()
    before = device.memory().free
    trial = make_trial(msgspec.structs.replace(plan, num_blocks=1, kv_cache_bytes=block_bytes))
    trial.run_largest_steps()
    device.synchronize()
    after_steps = device.memory().free
    num_captured, graph_bytes, last = 0, 0, after_steps
    for num_captured in trial.capture_step_by_step():
        device.synchronize()
        taken = last - device.memory().free
        last -= taken
        graph_bytes += taken
        if num_captured == 2:
            graph_bytes += (trial.num_graph_keys - 2) * taken
            break
    del trial
    device.release_cached()
    # Of the trial's two blocks, one is padding's, which the real runner has too.
    return MeasuredMemory(free_at_start - before, before - after_steps - block_bytes, graph_bytes)
