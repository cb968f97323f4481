"""The dynamic batcher's rules, one at a time, on a clock that stands still."""

from __future__ import annotations

import pytest

from llmserve.errors import QueueFullError
from llmserve.scheduler.dynamic_batcher import BatchReason, DynamicBatcher
from llmserve.scheduler.priority_level import QueuedRequest
from llmserve.scheduler.queue_policy import BatcherConfig, QueuePolicy
from llmserve.scheduler.response_order import ResponseOrder


def batcher_with(config: BatcherConfig, *requests: QueuedRequest, now_s: float = 0.0) -> DynamicBatcher:
    """All of them came while every instance was busy."""
    batcher = DynamicBatcher(config)
    for request in requests:
        batcher.add(request, now_s, instance_idle=False)
    return batcher


def taken(batcher: DynamicBatcher, now_s: float = 0.0) -> tuple[list[int], BatchReason] | None:
    batch = batcher.next_batch(now_s)
    return None if batch is None else ([request.id for request in batch.requests], batch.reason)


def test_without_dynamic_batching_each_request_runs_alone() -> None:
    batcher = batcher_with(BatcherConfig(), QueuedRequest(1, rows=4), QueuedRequest(2))
    assert taken(batcher) == ([1], BatchReason.NOT_BATCHED)
    assert taken(batcher) == ([2], BatchReason.NOT_BATCHED)
    assert taken(batcher) is None


def test_a_batch_takes_all_that_fit_and_splits_no_request() -> None:
    batcher = batcher_with(BatcherConfig(max_batch_size=8), *(QueuedRequest(i, rows=3) for i in range(4)))
    assert taken(batcher) == ([0, 1], BatchReason.NO_ROOM)
    assert taken(batcher) == ([2, 3], BatchReason.QUEUE_EMPTY)
    batcher = batcher_with(BatcherConfig(max_batch_size=8), *(QueuedRequest(i, rows=4) for i in range(4)))
    assert taken(batcher) == ([0, 1], BatchReason.FULL)


def test_the_largest_preferred_size_is_cut_off() -> None:
    config = BatcherConfig(max_batch_size=8, preferred_batch_sizes=frozenset({2, 4}))
    batcher = batcher_with(config, *(QueuedRequest(i) for i in range(7)))
    assert taken(batcher) == ([0, 1, 2, 3], BatchReason.PREFERRED)
    assert taken(batcher) == ([4, 5], BatchReason.PREFERRED)
    assert taken(batcher) == ([6], BatchReason.QUEUE_EMPTY)


def test_the_delay_is_paid_only_by_requests_that_found_all_instances_busy() -> None:
    config = BatcherConfig(max_batch_size=8, max_queue_delay_s=1.0)
    batcher = DynamicBatcher(config)
    batcher.add(QueuedRequest(1), 5.0, instance_idle=True)
    assert taken(batcher, 5.0) == ([1], BatchReason.IDLE)
    batcher.add(QueuedRequest(2), 5.0, instance_idle=False)
    batcher.add(QueuedRequest(3), 5.5, instance_idle=True)  # it joins the one that waits
    assert taken(batcher, 5.9) is None
    assert batcher.next_event_s(True) == 6.0
    assert batcher.next_event_s(False) is None  # nobody could take it then
    assert taken(batcher, 6.0) == ([2, 3], BatchReason.DELAY_PAST)


def test_a_batch_that_can_grow_no_more_does_not_wait_for_its_delay() -> None:
    config = BatcherConfig(max_batch_size=4, max_queue_delay_s=9.0, preferred_batch_sizes=frozenset({2}))
    batcher = batcher_with(config, QueuedRequest(1))
    assert taken(batcher) is None
    batcher.add(QueuedRequest(2), 0.0, instance_idle=False)
    assert taken(batcher) == ([1, 2], BatchReason.PREFERRED)
    batcher = batcher_with(config, QueuedRequest(1, rows=3), QueuedRequest(2, rows=3))
    assert taken(batcher) == ([1], BatchReason.NO_ROOM)


def test_other_shapes_are_stepped_over_unless_answers_keep_their_order() -> None:
    shapes = [QueuedRequest(i, shape_key=key) for i, key in enumerate("abab")]
    batcher = batcher_with(BatcherConfig(max_batch_size=8), *shapes)
    assert taken(batcher) == ([0, 2], BatchReason.OTHER_SHAPE)
    assert taken(batcher) == ([1, 3], BatchReason.QUEUE_EMPTY)
    batcher = batcher_with(BatcherConfig(max_batch_size=8, preserve_ordering=True), *shapes)
    assert [taken(batcher) for _ in range(3)] == [([i], BatchReason.OTHER_SHAPE) for i in range(3)]


def test_long_rows_make_small_batches() -> None:
    config = BatcherConfig(max_batch_size=8, max_batch_tokens=64)
    requests = [QueuedRequest(i, shape_key=n, tokens_per_row=n) for i, n in enumerate([16] * 6 + [100] * 2)]
    batcher = batcher_with(config, *requests)
    assert taken(batcher) == ([0, 1, 2, 3], BatchReason.TOKEN_BUDGET)
    assert taken(batcher) == ([4, 5], BatchReason.OTHER_SHAPE)
    assert taken(batcher) == ([6], BatchReason.TOKEN_BUDGET)  # one that is beyond it alone still runs


def test_a_long_queue_of_other_shapes_is_not_searched_to_its_end() -> None:
    requests = [QueuedRequest(0, shape_key="a"), *(QueuedRequest(i, shape_key="b") for i in range(1, 100))]
    batcher = batcher_with(BatcherConfig(max_batch_size=4), *requests, QueuedRequest(100, shape_key="a"))
    assert taken(batcher) == ([0], BatchReason.OTHER_SHAPE)


def test_priorities_are_strict_and_one_out_of_range_is_the_default() -> None:
    config = BatcherConfig(max_batch_size=1, priority_levels=3, default_priority_level=2)
    batcher = batcher_with(config, *(QueuedRequest(i, priority=p) for i, p in enumerate((3, 0, 9, 1))))
    assert [taken(batcher)[0][0] for _ in range(4)] == [3, 1, 2, 0]  # type: ignore[index]
    assert batcher.num_queued_by_level == [0, 0, 0]


def test_a_full_level_refuses_and_the_others_do_not() -> None:
    config = BatcherConfig(
        max_batch_size=1,
        priority_levels=2,
        default_priority_level=1,
        priority_policies={2: QueuePolicy(max_queue_size=1)},
    )
    batcher = batcher_with(config, QueuedRequest(1, priority=2), QueuedRequest(2), QueuedRequest(3))
    with pytest.raises(QueueFullError, match="Exceeds maximum queue size"):
        batcher.add(QueuedRequest(4, priority=2), 0.0, instance_idle=False)
    assert 4 not in batcher
    assert len(batcher) == 3


def test_a_time_out_rejects_when_it_is_due() -> None:
    policy = QueuePolicy(default_timeout_s=0.1)
    batcher = batcher_with(BatcherConfig(max_batch_size=1, default_policy=policy), QueuedRequest(1), now_s=1.0)
    batcher.add(QueuedRequest(2), 1.05, instance_idle=False)
    assert batcher.next_event_s(True) == pytest.approx(1.1)
    assert batcher.expire(1.09) == []
    assert [request.id for request in batcher.expire(1.1)] == [1]
    assert batcher.next_event_s(True) == pytest.approx(1.15)
    assert taken(batcher, 1.1) == ([2], BatchReason.FULL)
    assert batcher.next_event_s(True) is None


def test_a_delayed_request_is_served_behind_those_in_time() -> None:
    policy = QueuePolicy(default_timeout_s=0.1, delay_expired=True)
    batcher = batcher_with(BatcherConfig(max_batch_size=1, default_policy=policy), QueuedRequest(1), QueuedRequest(2))
    batcher.add(QueuedRequest(3), 0.05, instance_idle=False)
    assert batcher.expire(0.12) == []
    assert [taken(batcher)[0][0] for _ in range(3)] == [3, 1, 2]  # type: ignore[index]


@pytest.mark.parametrize(
    ("default_s", "allowed", "asked_s", "expected_s"),
    [
        (0.1, True, 0.05, 0.05),
        (0.1, True, 2.0, 0.1),
        (0.1, False, 0.05, 0.1),
        (0.0, True, 2.0, 2.0),
        (0.0, False, 2.0, 0.0),
    ],
)
def test_a_request_may_shorten_its_time_out_never_lengthen_it(
    default_s: float, allowed: bool, asked_s: float, expected_s: float
) -> None:
    assert QueuePolicy(default_timeout_s=default_s, allow_timeout_override=allowed).timeout_s(asked_s) == expected_s


def test_who_has_gone_is_in_no_batch() -> None:
    batcher = batcher_with(BatcherConfig(max_batch_size=4), QueuedRequest(1), QueuedRequest(2))
    assert batcher.remove(1)
    assert not batcher.remove(1)
    assert taken(batcher) == ([2], BatchReason.QUEUE_EMPTY)


def test_entries_of_requests_that_left_do_not_pile_up() -> None:
    policy = QueuePolicy(default_timeout_s=1000.0)
    batcher = DynamicBatcher(BatcherConfig(max_batch_size=1, default_policy=policy))
    for i in range(10_000):
        batcher.add(QueuedRequest(i), 0.0, instance_idle=True)
        assert taken(batcher) == ([i], BatchReason.FULL)
    assert len(batcher._deadlines) < 200


def test_answers_come_out_in_the_order_of_their_requests() -> None:
    order = ResponseOrder()
    for i in range(4):
        order.begin(i)
    assert order.finish(2) == []
    assert order.finish(0) == [0]
    assert order.finish(1) == [1, 2]
    assert order.finish(7) == []
    assert order.finish(3) == [3]
    assert len(order) == 0
