"""Which KV blocks are in use, and in what order the free ones are reused. Knows nothing of what stands in a block."""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """A fixed number of blocks with reference counts; every operation is O(1) a block.

    A block with no references is free and stands in a doubly linked list, the least recently used one first. The links
    are two arrays indexed by block id, so a block leaves the middle of the list (its content is wanted again) as
    cheaply as it leaves the head (it is reused). Index `num_blocks` is the list's sentinel: next of it is the head,
    previous of it the tail, and no operation has a special case for an empty list.
    """

    __slots__ = ("_next", "_previous", "_ref_counts", "num_blocks", "num_free_blocks")

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self.num_free_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        # All blocks are free at first, in the order of their ids: sentinel -> 0 -> 1 -> ... -> sentinel.
        self._next = [*range(1, num_blocks + 1), 0]
        self._previous = [num_blocks, *range(num_blocks)]

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes the least recently used free blocks, with one reference each. Their content is lost to everyone.

        There must be as many free blocks.
        """
        assert 0 <= num_blocks <= self.num_free_blocks
        following, ref_counts, sentinel = self._next, self._ref_counts, self.num_blocks
        block_ids = []
        block_id = following[sentinel]
        for _ in range(num_blocks):
            block_ids.append(block_id)
            ref_counts[block_id] = 1
            block_id = following[block_id]
        following[sentinel] = block_id
        self._previous[block_id] = sentinel
        self.num_free_blocks -= num_blocks
        return block_ids

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Adds a reference to each block; a free one leaves the list with its content intact."""
        following, previous, ref_counts = self._next, self._previous, self._ref_counts
        for block_id in block_ids:
            if not ref_counts[block_id]:
                before, after = previous[block_id], following[block_id]
                following[before] = after
                previous[after] = before
                self.num_free_blocks -= 1
            ref_counts[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Drops a reference of each block. Those that lose their last become free: the first given is reused first."""
        following, previous, ref_counts, sentinel = self._next, self._previous, self._ref_counts, self.num_blocks
        for block_id in block_ids:
            assert ref_counts[block_id] > 0, f"block {block_id} is free already"
            ref_counts[block_id] -= 1
            if not ref_counts[block_id]:
                tail = previous[sentinel]
                following[tail] = block_id
                previous[block_id] = tail
                following[block_id] = sentinel
                previous[sentinel] = block_id
                self.num_free_blocks += 1

    def ref_count(self, block_id: int) -> int:
        """How many requests hold the block; 0 means free."""
        return self._ref_counts[block_id]
