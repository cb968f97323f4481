"""Policies and budgets: who is served first, and that nobody waits for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.errors import ConfigError
from llmserve.scheduler.budget import FixedBudget
from llmserve.scheduler.policy import FCFSPolicy, PriorityPolicy, make_policy
from llmserve.scheduler.request import Request
from llmserve.scheduler.request_queue import RequestQueue
from tests.scheduler.fake_worker import engine_request


def test_fcfs_goes_by_arrival_and_ignores_priority() -> None:
    policy = FCFSPolicy()
    early = engine_request("a", [1], arrival_s=1.0, priority=9)
    late = engine_request("b", [1], arrival_s=2.0, priority=0)
    assert policy.rank(early) < policy.rank(late)


def test_priority_serves_the_lower_value_first() -> None:
    policy = PriorityPolicy()
    early = engine_request("a", [1], arrival_s=1.0, priority=1)
    late = engine_request("b", [1], arrival_s=2.0, priority=0)
    assert policy.rank(late) < policy.rank(early)
    late = engine_request("b", [1], arrival_s=2.0, priority=1)
    assert policy.rank(early) < policy.rank(late)


@given(st.integers(-5, 5), st.integers(-5, 5), st.floats(0, 1000), st.floats(0, 1000))
def test_a_level_of_priority_is_worth_ageing_s_seconds(mine: int, other: int, my_s: float, other_s: float) -> None:
    """Whoever arrives more than ageing_s times the difference in priority later cannot overtake."""
    policy = PriorityPolicy(ageing_s=10.0)
    me = policy.rank(engine_request("a", [1], arrival_s=my_s, priority=mine))
    them = policy.rank(engine_request("b", [1], arrival_s=other_s, priority=other))
    if other_s > my_s + 10.0 * (mine - other) + 1e-6:
        assert me < them


def test_policies_are_made_by_name() -> None:
    assert isinstance(make_policy("fcfs"), FCFSPolicy)
    assert isinstance(make_policy("priority"), PriorityPolicy)
    with pytest.raises(ConfigError, match=r"'lifo'.*fcfs, priority"):
        make_policy("lifo")


def test_ageing_cannot_be_switched_off() -> None:
    with pytest.raises(ConfigError, match="ageing_s"):
        PriorityPolicy(ageing_s=0)


def test_a_fixed_budget_is_fixed() -> None:
    assert FixedBudget(64).next_step(0) == FixedBudget(64).next_step(64) == 64
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        FixedBudget(0)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30), st.data())
def test_the_queue_is_always_sorted(ranks: list[tuple[int, int]], data: st.DataObject) -> None:
    queue = RequestQueue()
    model: list[Request] = []
    for index, (rank, arrival) in enumerate(ranks):
        request = Request(engine_request(str(index), [1]), (float(rank), float(arrival), index), 10)
        queue.add(request)
        model.append(request)
        if data.draw(st.integers(0, 3)) == 0:
            gone = data.draw(st.sampled_from(model))
            queue.remove(gone)
            model.remove(gone)
        model.sort(key=lambda request: request.key)
        assert list(queue) == model
        assert len(queue) == len(model)
        if model:
            assert queue.first is model[0]
            assert queue.last is model[-1]
