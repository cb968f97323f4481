"""What the host does for a step that is launched a step ahead: schedule, stage, launch, settle; on a device that does
nothing.

    python -m benchmarks.bench_overlap [--steps 400]

It is hidden behind the step before as long as that takes longer on the device. Launches themselves, two graphs and two
copies, cost a GPU's driver some 20 us more. A decode of all requests, greedy; prompts of 128 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.random_model import TINY, RandomWeights, prepare_random_model
from llmserve.config import EngineConfig
from llmserve.engine.assembly import make_core
from llmserve.kernels.reference import ReferenceOps
from llmserve.messages import EngineRequest, SamplingParams

# Microseconds, written before the first run: 40 a step, and for a request 0.4 of scheduling, 0.5 of arrays and lists.
STEP_US, REQUEST_US = 40.0, 0.9


class Nothing:
    """An event and a graph."""

    def wait(self) -> None: ...

    def replay(self) -> None: ...


class IdleDevice:
    """Implements `Device`: all is done at once, by not doing it. Every token drawn is 0."""

    torch_device = torch.device("cpu")

    def pinned(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(num_elements, dtype=dtype)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None: ...

    def submit(self, work: Callable[[], None]) -> None: ...

    def record(self) -> Nothing:
        return Nothing()

    def capture(self, work: Callable[[], None]) -> Nothing:
        return Nothing()

    def free_bytes(self) -> int:
        return 2**30

    def release_cached(self) -> None: ...

    def synchronize(self) -> None: ...


def step_us(num_seqs: int, num_steps: int) -> float:
    """Median of a step."""
    config = EngineConfig(
        device="cpu", max_num_seqs=256, max_num_batched_tokens=8192, kv_cache_memory=2**28, speculation="off"
    )
    cpu = IdleDevice.torch_device
    prepared = prepare_random_model(config, TINY, ReferenceOps(), cpu, torch.float32, RandomWeights(TINY))
    core = make_core(config, prepared.launching_runner(prepared.load_weights(), IdleDevice))
    params = SamplingParams(max_tokens=10**6, temperature=0.0, seed=0)
    for number in range(num_seqs):
        prompt = [(number * 31 + 7 * at) % 300 for at in range(128 - number % 16)]
        core.add(EngineRequest(request_id=str(number), prompt_token_ids=prompt, params=params, arrival_s=0.0))
    for _ in range(20):
        core.step()
    times = []
    for _ in range(num_steps):
        started = time.perf_counter()
        core.step()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    num_steps = parser.parse_args().steps
    print("requests  predicted us  median us")
    for num_seqs in (1, 64, 256):
        print(f"{num_seqs:8} {STEP_US + REQUEST_US * num_seqs:13.0f} {step_us(num_seqs, num_steps):10.0f}")


if __name__ == "__main__":
    main()
