"""The host's copies of KV blocks that the device has reused, and the copying both ways. Knows slots, not what is in
them: which block goes where is decided by `kv_cache/host_tier.py`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from llmserve.kernels.ops import KVCache, Ops
from llmserve.kernels.select import select_block_copier
from llmserve.scheduler.output import SchedulerOutput
from llmserve.worker.device import Device, Event


class HostBlocks:
    """Slots in memory of the host that the device reads and writes by itself, in the order of its other work. The host
    never looks inside, so nothing is waited for: a step in flight is through with a block before it is copied out,
    and a step behind finds what was copied in."""

    def __init__(self, device: Device, ops: Ops, kv_caches: Sequence[KVCache], num_blocks: int, num_slots: int) -> None:
        """Room for `num_slots` blocks of every layer. The caches have `num_blocks` that may be copied."""
        self._device = device
        parts = [part for cache in kv_caches for part in cache.parts()]
        self.slots = _make_slots(device, parts, num_slots)
        self._offloader = select_block_copier(ops, parts, self.slots, device.torch_device)
        self._restorer = select_block_copier(ops, self.slots, parts, device.torch_device)
        capacity = 2 * num_blocks  # in a step each block leaves at most once, and comes at most once
        self._staged = torch.zeros((capacity, 2), dtype=torch.int64, device=device.torch_device)
        self._buffers = [device.pinned(2 * capacity, torch.int64).view(capacity, 2) for _ in range(2)]
        self._copied: list[Event | None] = [None, None]  # out of each buffer
        self._turn = 0

    @torch.inference_mode()
    def warm_up(self, null_block: int) -> None:
        """Both copies once, of a block that is nobody's: what is compiled by a first time is compiled."""
        self.copy(SchedulerOutput(offloads=[(null_block, 0)], restores=[(0, null_block)]))

    def copy(self, output: SchedulerOutput) -> None:
        """Behind all that was launched, and before the step: all offloads, then all restores."""
        pairs = output.offloads + output.restores
        if not pairs:
            return
        self._stage(pairs)
        num_offloads, num_pairs = len(output.offloads), len(pairs)
        if num_offloads:
            self._device.submit(functools.partial(self._offloader.copy, self._staged[:num_offloads]))
        if output.restores:
            self._device.submit(functools.partial(self._restorer.copy, self._staged[num_offloads:num_pairs]))

    def _stage(self, pairs: list[tuple[int, int]]) -> None:
        self._turn = 1 - self._turn
        copied = self._copied[self._turn]
        if copied is not None:
            copied.wait()  # two steps ago: it is through
        buffer = self._buffers[self._turn][: len(pairs)]
        buffer.numpy()[:] = pairs
        self._device.copy(self._staged[: len(pairs)], buffer)
        self._copied[self._turn] = self._device.record()


def _make_slots(device: Device, parts: list[torch.Tensor], num_slots: int) -> list[torch.Tensor]:
    """[num_slots, ...] for each part, one behind another in one piece of memory."""
    sizes = [num_slots * part[0].nbytes for part in parts]
    memory = device.mapped(sum(sizes))
    pieces = zip(torch.split(memory, sizes), parts, strict=True)
    return [piece.view(part.dtype).view(num_slots, *part.shape[1:]) for piece, part in pieces]
