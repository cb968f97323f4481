"""Drafts in the scheduler: what they may take, what they may not, and what becomes of those that are wrong."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from llmserve.kv_cache.manager import KVCacheManager
from llmserve.scheduler.budget import FixedBudget
from llmserve.scheduler.drafts import MAX_STEP_DRAFTS, FixedDrafter, Proposal
from llmserve.scheduler.policy import make_policy
from llmserve.scheduler.scheduler import Scheduler
from tests.scheduler.fake_worker import engine_request

BLOCK_SIZE = 4


class Nines:
    """Guesses 9 for ever."""

    def propose(self, request_id: str, token_ids: Sequence[int], max_drafts: int) -> Proposal | None:
        return Proposal([9] * max_drafts, 1)

    def forget(self, request_id: str) -> None:
        """It keeps nothing."""


def scheduler_of(num_blocks: int, budget: int = 100, max_num_seqs: int = 4) -> tuple[Scheduler, KVCacheManager]:
    kv_cache = KVCacheManager(num_blocks, BLOCK_SIZE)
    scheduler = Scheduler(
        kv_cache,
        policy=make_policy("fcfs"),
        budget=FixedBudget(budget),
        max_num_seqs=max_num_seqs,
        max_model_len=1000,
        watermark=0.0,
        drafter=FixedDrafter(Nines(), 5),
    )
    return scheduler, kv_cache


def test_accepted_drafts_are_computed_and_rejected_ones_are_computed_again() -> None:
    scheduler, _ = scheduler_of(20)
    scheduler.add(engine_request("a", [1, 2, 3]))
    first = scheduler.schedule(0.0)
    assert first.num_scheduled_tokens == {"a": 3 + 5}
    assert first.draft_token_ids == {"a": [9] * 5}
    [update] = scheduler.update(first, {"a": [9, 9, 4]})
    assert update.token_ids == [9, 9, 4]
    assert scheduler.stats().num_accepted_tokens == 2
    second = scheduler.schedule(1.0)
    assert second.num_scheduled_tokens == {"a": 1 + 5}  # the 4 is new; the two nines are in the cache
    assert scheduler.update(second, {"a": [5]})[0].token_ids == [5]
    assert scheduler.stats().num_accepted_tokens == 0


def test_drafts_get_what_is_left_of_the_budget() -> None:
    scheduler, _ = scheduler_of(50, budget=7, max_num_seqs=2)
    scheduler.add(engine_request("a", [1, 2]))
    scheduler.add(engine_request("b", [3, 4]))
    output = scheduler.schedule(0.0)
    assert output.num_scheduled_tokens == {"a": 2 + 3, "b": 2}
    assert output.total_num_scheduled_tokens == 7
    scheduler, _ = scheduler_of(50, budget=2, max_num_seqs=2)
    scheduler.add(engine_request("a", [1]))
    scheduler.add(engine_request("b", [3]))
    assert not scheduler.schedule(0.0).draft_token_ids


def test_a_step_has_a_bounded_number_of_drafts() -> None:
    scheduler, _ = scheduler_of(100, max_num_seqs=20)
    for index in range(20):
        scheduler.add(engine_request(str(index), [1]))
    output = scheduler.schedule(0.0)
    assert sum(map(len, output.draft_token_ids.values())) == MAX_STEP_DRAFTS


@pytest.mark.parametrize(("num_blocks", "num_drafts"), [(6, 5), (5, 5), (4, 1), (3, 1), (2, 1)])
def test_drafts_take_no_block_that_a_running_request_may_need_next(num_blocks: int, num_drafts: int) -> None:
    """Two requests with a block each. The first has one slot left in its own; more drafts than one need another block,
    which it gets if after that there is one left for each of the two."""
    scheduler, kv_cache = scheduler_of(num_blocks)
    scheduler.add(engine_request("a", [1, 2, 3]))
    scheduler.add(engine_request("b", [1, 2, 3, 4], max_tokens=1))
    output = scheduler.schedule(0.0)
    assert len(output.draft_token_ids["a"]) == num_drafts
    assert kv_cache.num_free_blocks == num_blocks - 2 - (num_drafts > 1)


def test_only_verified_tokens_reach_the_prefix_cache() -> None:
    scheduler, kv_cache = scheduler_of(50)
    scheduler.add(engine_request("a", [1, 2, 3], max_tokens=7))
    output = scheduler.schedule(0.0)
    scheduler.update(output, {"a": [9, 9, 4]})  # 1 2 3 9 | 9 4
    output = scheduler.schedule(1.0)
    scheduler.update(output, {"a": [9, 9, 9, 9]})  # 1 2 3 9 | 9 4 9 9 | 9 9: it ends here
    assert not scheduler.has_work()
    kv_cache.add("probe")
    assert len(kv_cache.match_prefix("probe", [1, 2, 3, 9, 9, 4, 9, 9, 0])) == 2
    kv_cache.add("wrong")
    assert len(kv_cache.match_prefix("wrong", [1, 2, 3, 9, 9, 9, 9, 9, 0])) == 1
    assert kv_cache.num_free_blocks == 50
