"""What the runner of a GPU asks of the device: copies, graphs, events, memory. Knows no model and no batch.

Everything is done in the order it is asked for; nothing but `Event.wait` and `synchronize` waits. A test's fake device
does all of it on the CPU, as late as it may, so that whoever does not wait reads what is not there yet.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Protocol

import torch

from llmserve.config import format_bytes
from llmserve.errors import InsufficientMemoryError

_MAPPED = 2  # cudaHostRegisterMapped


class Event(Protocol):
    """A point in the device's work."""

    def wait(self) -> None:
        """Returns when all that was asked for before it is done."""
        ...


class Graph(Protocol):
    """Work that was recorded, on the tensors it was recorded with."""

    def replay(self) -> None: ...


class Device(Protocol):
    """One device and the one queue of its work."""

    torch_device: torch.device

    def pinned(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros in memory of the host that copies need not be waited for with."""
        ...

    def mapped(self, num_bytes: int) -> torch.Tensor:
        """Zeros, uint8, in memory of the host that the device's kernels read and write by themselves, for as long as
        the process lives. Raises InsufficientMemoryError."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Between a device's tensor and a pinned one of the same shape, either way."""
        ...

    def submit(self, work: Callable[[], None]) -> None:
        """Ops on the device's tensors. `work` may read no memory of the host that changes."""
        ...

    def record(self) -> Event: ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """Records what `work` does, without doing it, into memory that all graphs share. It has been done once before:
        so what is compiled or set up by a first time is there."""
        ...

    def free_bytes(self) -> int:
        """Of the whole device's memory, whoever uses the rest."""
        ...

    def release_cached(self) -> None:
        """What torch's allocator holds and no tensor uses goes back to the device."""
        ...

    def synchronize(self) -> None: ...


class CudaEvent:
    """Sleeps while it waits: with a step queued behind, nobody waits for the host."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()


class CudaDevice:
    """Implements `Device` by torch.cuda, on its current stream."""

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device
        self._pool = torch.cuda.graph_pool_handle()

    def pinned(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(num_elements, dtype=dtype, pin_memory=True)

    def mapped(self, num_bytes: int) -> torch.Tensor:
        # Registered, not torch's `pin_memory`: that takes the next power of two, of what may be most of the memory.
        buffer = torch.zeros(num_bytes, dtype=torch.uint8)
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        error = cudart.cudaHostRegister(buffer.data_ptr(), num_bytes, _MAPPED)
        if int(error):
            raise InsufficientMemoryError(
                f"The host cannot lock {format_bytes(num_bytes)} of its memory for the GPU (CUDA error "
                f"{int(error)}). Lower --kv-cache-host-memory, or raise the limit of locked memory (ulimit -l)."
            )
        return buffer

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def submit(self, work: Callable[[], None]) -> None:
        work()

    def record(self) -> CudaEvent:
        return CudaEvent()

    def capture(self, work: Callable[[], None]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.torch_device)[0])

    def release_cached(self) -> None:
        gc.collect()  # a runner and its graphs hold each other
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)
