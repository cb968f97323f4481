"""Sees what a model takes on its GPU: the largest step is run and the largest graphs are captured, once, before the KV
cache takes the rest. Knows no scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec

from llmserve.messages import MemoryPlan
from llmserve.worker.device import Device
from llmserve.worker.memory import MeasuredMemory

_SAMPLE = 4  # graphs that stand for all that are not the largest of their kind


class TrialRunner(Protocol):
    """As much of a runner as is needed to see what it takes."""

    num_largest_graphs: int  # captured first

    @property
    def num_graph_keys(self) -> int: ...

    def run_largest_steps(self) -> None: ...

    def capture_step_by_step(self) -> Iterator[int]: ...


def measure_memory(
    device: Device, make_trial: Callable[[MemoryPlan, Device], TrialRunner], plan: MemoryPlan, free_at_start: int
) -> MeasuredMemory:
    """What a loaded model takes. `make_trial` makes a runner on it that captures no graph by itself; `free_at_start`
    was free on the device before the model was loaded. Others on the device must keep still meanwhile.

    Graphs share a pool: the largest ones are counted as they are, all others as the mean of a few.
    """
    block_bytes = plan.kv_cache_bytes // plan.num_blocks
    device.release_cached()
    before = device.free_bytes()
    smallest = msgspec.structs.replace(plan, num_blocks=1, num_host_blocks=0, kv_cache_bytes=block_bytes)
    trial = make_trial(smallest, device)
    trial.run_largest_steps()
    device.synchronize()
    steps = before - device.free_bytes()
    device.release_cached()
    graphs = _graph_bytes(device, trial)
    del trial
    device.release_cached()
    # Of the trial's two blocks, one is padding's, which the real runner has too.
    return MeasuredMemory(free_at_start - before, steps - block_bytes, graphs)


def _graph_bytes(device: Device, trial: TrialRunner) -> int:
    free = [device.free_bytes()]
    for num_captured in trial.capture_step_by_step():
        device.synchronize()
        free.append(device.free_bytes())
        if num_captured == trial.num_largest_graphs + _SAMPLE:
            break
    num_sampled = len(free) - 1 - trial.num_largest_graphs
    if num_sampled <= 0:
        return free[0] - free[-1]
    largest, sampled = free[0] - free[-1 - num_sampled], free[-1 - num_sampled] - free[-1]
    num_others = trial.num_graph_keys - trial.num_largest_graphs
    return largest + -(-sampled * num_others // num_sampled)
