"""Times candidates over cases and takes the best; and where that runs: on a GPU, or dry, in the tests' interpreter.

On a GPU a candidate is timed as the server runs it, in a graph: what a launch costs the host chooses no tile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from triton import knobs
from triton.runtime.errors import OutOfResources

from benchmarks.gpu_timing import seconds
from llmserve.kernels.triton.ops import TritonOps, create_triton_ops

Tiles = TypeVar("Tiles")
Case = TypeVar("Case")


@dataclass(frozen=True)
class Place:
    """Where candidates run. `is_dry`: interpreted, each once, in toy shapes: nothing is measured."""

    is_dry: bool
    device: torch.device
    ops: TritonOps
    min_programs: int

    def milliseconds(self, run: Callable[[], object]) -> float:
        if not self.is_dry:
            return seconds(run) * 1e3
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e3


def find_place() -> Place:
    """A dry one under TRITON_INTERPRET=1, else the GPU."""
    if knobs.runtime.interpret:
        from tests.kernels.triton.interpreter import install

        install()
        return Place(True, torch.device("cpu"), TritonOps("sm_90", 132), 264)
    device = torch.device("cuda")
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Place(False, device, create_triton_ops(device), 2 * processors)


def best(
    place: Place, candidates: Iterable[Tiles], cases: Sequence[Case], run: Callable[[Tiles, Case], object]
) -> Tiles:
    """The least sum over the cases of each time against the best of its case. Candidates that need more than a
    multiprocessor has are left out. Prints how each did."""
    times: dict[Tiles, list[float]] = {}
    for tiles in candidates:
        try:
            times[tiles] = [place.milliseconds(lambda t=tiles, c=case: run(t, c)) for case in cases]  # type: ignore[misc]
        except OutOfResources:
            continue
        print(tiles, " ".join(f"{ms:.3f} ms" for ms in times[tiles]), flush=True)
    fastest = [min(column) for column in zip(*times.values(), strict=True)]
    return min(times, key=lambda tiles: sum(ms / least for ms, least in zip(times[tiles], fastest, strict=True)))
