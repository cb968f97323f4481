"""A device on the CPU that does its work as late as it may, and writes down what it was asked for.

Work waits in a queue until somebody waits for an event behind it, as a GPU's may: who reads what is not there yet reads
old values, who overwrites what is still to be copied spoils it. A graph is replayed by doing again what was captured.
Work is done as soon as it is asked for only if the test says so.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

import torch

GARBAGE = 2**20 + 7  # what a buffer of the host holds before the copy into it is done


class FakeEvent:
    def __init__(self, device: FakeDevice, number: int) -> None:
        self._device = device
        self._number = number

    def wait(self) -> None:
        """Counted as a wait; does the work before it."""
        self._device.counts["waits"] += 1
        self._device.num_behind.append(self._device.num_queued - self._number)
        self._device.do_until(self._number)


class FakeGraph:
    def __init__(self, device: FakeDevice, work: Callable[[], None]) -> None:
        self._device = device
        self._work = work

    def replay(self) -> None:
        """Queues the work again."""
        self._device.counts["replays"] += 1
        self._device.enqueue(self._work)


class FakeDevice:
    """Implements `Device`. `counts`: copies_in, copies_out, submits, captures, replays, events, waits,
    synchronisations; `copied_in` elements."""

    def __init__(self, total_bytes: int = 2**30) -> None:
        self.torch_device = torch.device("cpu")
        self.counts: Counter[str] = Counter()
        self.ignores_events = False  # a fault to plant: an event that does not wait
        self.is_working = False
        self.num_queued = 0
        self.num_behind: list[int] = []  # of each wait: pieces of work queued behind what it waited for
        self._num_done = 0
        self._queue: deque[Callable[[], None]] = deque()
        self._pinned: set[int] = set()
        self._total_bytes = total_bytes
        self.allocated = 0  # told by the test, with
        self.cached = 0  # what of it no tensor uses

    def pinned(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        buffer = torch.zeros(num_elements, dtype=dtype)
        self._pinned.add(buffer.untyped_storage().data_ptr())
        return buffer

    def mapped(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.shape == source.shape
        to_host = target.untyped_storage().data_ptr() in self._pinned
        assert to_host != (source.untyped_storage().data_ptr() in self._pinned), "one of the two is the host's"
        self.counts["copies_out" if to_host else "copies_in"] += 1
        if to_host:
            target.fill_(GARBAGE)
        else:
            self.counts["copied_in"] += source.numel()

        def work() -> None:
            target.copy_(source)

        self.enqueue(work)

    def submit(self, work: Callable[[], None]) -> None:
        self.counts["submits"] += 1
        self.enqueue(work)

    def record(self) -> FakeEvent:
        self.counts["events"] += 1
        return FakeEvent(self, self.num_queued)

    def capture(self, work: Callable[[], None]) -> FakeGraph:
        self.counts["captures"] += 1
        return FakeGraph(self, work)

    def free_bytes(self) -> int:
        return self._total_bytes - self.allocated

    def release_cached(self) -> None:
        self.allocated -= self.cached
        self.cached = 0

    def synchronize(self) -> None:
        self.counts["synchronisations"] += 1
        self.do_until(self.num_queued)

    def enqueue(self, work: Callable[[], None]) -> None:
        """Behind all that waits."""
        self.num_queued += 1
        self._queue.append(work)

    @property
    def num_waiting(self) -> int:
        """Pieces of work not done yet."""
        return len(self._queue)

    @torch.inference_mode()
    def do_until(self, number: int) -> None:
        """Does the work that was queued before the given point."""
        if self.ignores_events:
            return
        self.is_working = True
        while self._num_done < number:
            self._num_done += 1
            self._queue.popleft()()
        self.is_working = False
