"""Which content the host's memory keeps of blocks that the device has reused: hashes and slots. It copies nothing.

What is to be copied in a step is collected as pairs of ids. The worker makes a step's offloads before its restores, and
both before anything of the step is written or read (`worker/host_blocks.py`).
"""

from __future__ import annotations

from collections import OrderedDict

BlockPairs = list[tuple[int, int]]


class HostTier:
    """A fixed number of slots, each as large as a block of the device; every operation is O(1).

    A slot keeps its content when that is restored: a block that is evicted again need not be copied again. What a step
    writes, reads or has found is pinned until the step is handed over: the pairs of one direction are copied all at
    once, so no slot may be written twice, nor be written in place of what is to be read. If the least recently used
    slot is pinned, nearly all are, and what would have taken it is lost.
    """

    __slots__ = ("_offloads", "_pinned", "_restores", "_slots", "num_slots")

    def __init__(self, num_slots: int) -> None:
        assert num_slots > 0
        self.num_slots = num_slots
        self._slots: OrderedDict[bytes, int] = OrderedDict()  # by block hash, the least recently used first
        self._pinned: set[bytes] = set()
        self._offloads: BlockPairs = []
        self._restores: BlockPairs = []

    def __len__(self) -> int:
        """How many blocks are kept."""
        return len(self._slots)

    def pin(self, block_hash: bytes) -> bool:
        """Whether this content is kept; if it is, it stays for this step."""
        if block_hash not in self._slots:
            return False
        self._slots.move_to_end(block_hash)
        self._pinned.add(block_hash)
        return True

    def offload(self, block_hash: bytes, block_id: int) -> None:
        """The device is about to reuse a block: its content is kept, if there is a slot for it."""
        if self.pin(block_hash):
            return
        slot = len(self._slots)
        if slot == self.num_slots:
            oldest = next(iter(self._slots))
            if oldest in self._pinned:
                return
            slot = self._slots.pop(oldest)
        self._slots[block_hash] = slot
        self._pinned.add(block_hash)
        self._offloads.append((block_id, slot))

    def restore(self, block_hash: bytes, block_id: int) -> bool:
        """Has the content copied to a block of the device. False if it is not kept."""
        if not self.pin(block_hash):
            return False
        self._restores.append((self._slots[block_hash], block_id))
        return True

    def take_pairs(self) -> tuple[BlockPairs, BlockPairs]:
        """Of the step just scheduled, (device block, slot) to offload and (slot, device block) to restore. The step
        must be run."""
        pairs = self._offloads, self._restores
        self._offloads, self._restores = [], []
        self._pinned.clear()
        return pairs
