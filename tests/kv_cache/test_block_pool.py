"""BlockPool: reference counts, and the order in which free blocks are reused."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from llmserve.kv_cache.block_pool import BlockPool


def test_blocks_are_handed_out_in_order_and_counted() -> None:
    pool = BlockPool(4)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.num_free_blocks == 1
    assert [pool.ref_count(block_id) for block_id in range(4)] == [1, 1, 1, 0]


def test_the_block_released_first_is_reused_first() -> None:
    pool = BlockPool(3)
    pool.allocate(3)
    pool.release([2, 0])
    pool.release([1])
    assert pool.allocate(3) == [2, 0, 1]


def test_a_shared_block_is_free_only_after_its_last_holder() -> None:
    pool = BlockPool(2)
    [block_id] = pool.allocate(1)
    pool.acquire([block_id])
    pool.release([block_id])
    assert pool.num_free_blocks == 1
    pool.release([block_id])
    assert pool.num_free_blocks == 2


def test_a_free_block_can_be_taken_out_of_the_middle() -> None:
    pool = BlockPool(4)
    pool.acquire([1, 3])
    assert pool.num_free_blocks == 2
    assert pool.allocate(2) == [0, 2]
    pool.release([3, 1])
    assert pool.allocate(2) == [3, 1]


def test_allocating_nothing_changes_nothing() -> None:
    pool = BlockPool(1)
    assert pool.allocate(0) == []
    assert pool.allocate(1) == [0]
    assert pool.allocate(0) == []


def test_misuse_is_caught() -> None:
    pool = BlockPool(1)
    with pytest.raises(AssertionError):
        pool.allocate(2)
    with pytest.raises(AssertionError, match="free already"):
        pool.release([0])


class BlockPoolMachine(RuleBasedStateMachine):
    """Against a model that is a plain list of free ids and a plain list of counts."""

    num_blocks = 7

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.num_blocks)
        self.free = list(range(self.num_blocks))  # least recently used first
        self.ref_counts = [0] * self.num_blocks

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        num_blocks = data.draw(st.integers(0, len(self.free)))
        expected, self.free = self.free[:num_blocks], self.free[num_blocks:]
        assert self.pool.allocate(num_blocks) == expected
        for block_id in expected:
            self.ref_counts[block_id] = 1

    @rule(block_ids=st.lists(st.integers(0, num_blocks - 1), max_size=4))
    def acquire(self, block_ids: list[int]) -> None:
        self.pool.acquire(block_ids)
        for block_id in block_ids:
            if not self.ref_counts[block_id]:
                self.free.remove(block_id)
            self.ref_counts[block_id] += 1

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = [block_id for block_id in range(self.num_blocks) for _ in range(self.ref_counts[block_id])]
        block_ids = data.draw(st.permutations(held).map(lambda order: order[: len(order) // 2 + 1]))
        self.pool.release(block_ids)
        for block_id in block_ids:
            self.ref_counts[block_id] -= 1
            if not self.ref_counts[block_id]:
                self.free.append(block_id)

    @invariant()
    def counts_agree(self) -> None:
        assert self.pool.num_free_blocks == len(self.free)
        assert [self.pool.ref_count(block_id) for block_id in range(self.num_blocks)] == self.ref_counts

    def teardown(self) -> None:
        self.pool.release(block_id for block_id in range(self.num_blocks) for _ in range(self.ref_counts[block_id]))
        assert self.pool.num_free_blocks == self.num_blocks
        assert sorted(self.pool.allocate(self.num_blocks)) == list(range(self.num_blocks))


TestBlockPoolMachine = BlockPoolMachine.TestCase
TestBlockPoolMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
