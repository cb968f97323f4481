"""A CUDA device that notes when its steps begin and end, by its own clock. Measures nothing else."""

from __future__ import annotations

import statistics
from collections import deque
from itertools import pairwise

import torch

from llmserve.worker.device import CudaDevice, CudaEvent

_MAX_STEPS = 2048


class TimedCudaDevice(CudaDevice):
    """A step begins with its copy to the device and ends where its event is recorded."""

    def __init__(self, torch_device: torch.device) -> None:
        super().__init__(torch_device)
        self._steps: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=_MAX_STEPS)
        self._begun: torch.cuda.Event | None = None

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if target.is_cuda:
            self._begun = _now()
        super().copy(target, source)

    def record(self) -> CudaEvent:
        if self._begun is not None:
            self._steps.append((self._begun, _now()))
            self._begun = None
        return super().record()

    def forget_times(self) -> None:
        """Of the steps so far."""
        self._steps.clear()

    def idle_s(self) -> float:
        """Between two steps, the median: the device had nothing to do."""
        self.synchronize()
        gaps = [before.elapsed_time(begun) for (_, before), (begun, _) in pairwise(self._steps)]
        return statistics.median(gaps) / 1e3 if gaps else 0.0


def _now() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()  # type: ignore[no-untyped-call]
    return event
