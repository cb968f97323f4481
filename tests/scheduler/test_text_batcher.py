"""Which texts run together: the budget, fairness between requests, age, kinds; and that none is lost."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from llmserve.scheduler.text_batcher import TextBatcher
from llmserve.scheduler.text_queue import QueuedText


def ids(batch: list[QueuedText]) -> list[int]:
    return [text.id for text in batch]


def filled(*texts: tuple[int, int, int], budget: int = 100) -> TextBatcher:
    """(id, request, tokens), all at the time 0."""
    batcher = TextBatcher(budget)
    for text_id, request_id, num_tokens in texts:
        batcher.add(QueuedText(text_id, request_id, num_tokens), 0.0)
    return batcher


def test_a_batch_is_filled_up_to_the_budget_and_no_further() -> None:
    batcher = filled((1, 1, 40), (2, 1, 50), (3, 1, 20), (4, 1, 80))
    assert ids(batcher.next_batch(0.0)) == [1, 2]
    assert ids(batcher.next_batch(0.0)) == [3, 4]
    assert batcher.next_batch(0.0) == []


def test_a_text_beyond_the_budget_runs_alone() -> None:
    batcher = filled((1, 1, 500), (2, 2, 600))
    assert ids(batcher.next_batch(0.0)) == [1]
    assert ids(batcher.next_batch(0.0)) == [2]


def test_one_text_is_not_behind_the_thousand_of_another_client() -> None:
    batcher = filled(*((number, 1, 10) for number in range(1000)))
    assert len(batcher.next_batch(0.0)) == 10
    batcher.add(QueuedText(5000, 2, 10), 0.0)
    assert 5000 in ids(batcher.next_batch(0.0))


def test_two_clients_with_many_texts_share_by_tokens() -> None:
    batcher = TextBatcher(120)
    for number in range(60):
        batcher.add(QueuedText(number, 1, 30), 0.0)  # long texts
        batcher.add(QueuedText(1000 + number, 2, 10), 0.0)  # short ones
    taken = [text for _ in range(8) for text in batcher.next_batch(0.0)]
    tokens = [sum(text.num_tokens for text in taken if text.request_id == request) for request in (1, 2)]
    assert abs(tokens[0] - tokens[1]) <= 60


def test_short_texts_of_many_clients_go_before_a_long_one_until_it_is_old() -> None:
    batcher = TextBatcher(100, max_wait_s=1.0)
    batcher.add(QueuedText(1, 1, 90), 0.0)
    batcher.add(QueuedText(2, 2, 10), 0.0)
    assert ids(batcher.next_batch(0.0)) == [2, 1]
    batcher.add(QueuedText(3, 3, 90), 1.0)
    batcher.add(QueuedText(4, 4, 20), 1.5)
    assert ids(batcher.next_batch(2.0)) == [3]  # a second old: first, though 4 is shorter and they do not both fit


def test_no_text_waits_for_ever_behind_shorter_ones_that_keep_coming() -> None:
    batcher = TextBatcher(100, max_wait_s=10**9)  # by the tags alone
    batcher.add(QueuedText(0, 0, 100), 0.0)
    for number in range(1, 100):
        batcher.add(QueuedText(number, number, 60), float(number))
        if 0 in ids(batcher.next_batch(float(number))):
            return
    raise AssertionError("it starves")


def test_kinds_do_not_mix_and_what_is_stepped_over_keeps_its_place() -> None:
    batcher = TextBatcher(100)
    for number, kind in enumerate(["embed", "classify", "embed", "classify"]):
        batcher.add(QueuedText(number, number, 10, kind), 0.0)
    assert ids(batcher.next_batch(0.0)) == [0, 2]
    assert ids(batcher.next_batch(0.0)) == [1, 3]


def test_a_text_that_a_second_request_wants_moves_forward() -> None:
    batcher = filled(*((number, 1, 10) for number in range(100)), budget=20)
    batcher.join(99, request_id=2)
    assert 99 in ids(batcher.next_batch(0.0))
    assert 99 not in batcher
    batcher.join(99, request_id=3)  # gone: nothing happens
    assert len(batcher) == 98


def served(batcher: TextBatcher, num_batches: int) -> dict[str, int]:
    """Tokens by tenant."""
    tokens: dict[str, int] = {}
    for number in range(num_batches):
        for text in batcher.next_batch(float(number)):
            tokens[text.tenant] = tokens.get(text.tenant, 0) + text.num_tokens
    return tokens


def test_a_tenant_of_many_requests_gets_no_more_than_one_of_few() -> None:
    batcher = TextBatcher(100)
    for number in range(1000):  # a request each
        batcher.add(QueuedText(number, number, 10, tenant="flood"), 0.0)
    for number in range(100):
        batcher.add(QueuedText(5000 + number, 5000, 10, tenant="quiet"), 0.0)
    assert served(batcher, 10) == {"flood": 500, "quiet": 500}


def test_a_flood_that_has_waited_long_does_not_go_before_another_tenant() -> None:
    batcher = TextBatcher(100, max_wait_s=1.0)
    for number in range(1000):
        batcher.add(QueuedText(number, number, 10, tenant="flood"), 0.0)
    served(batcher, 3)
    batcher.add(QueuedText(5000, 5000, 10, tenant="quiet"), 50.0)
    assert 5000 in ids(batcher.next_batch(50.0))


def test_tokens_follow_the_weights() -> None:
    batcher = TextBatcher(100)
    for number in range(500):
        batcher.add(QueuedText(number, number, 10, tenant="one", weight=1.0), 0.0)
        batcher.add(QueuedText(1000 + number, number, 10, tenant="three", weight=3.0), 0.0)
    tokens = served(batcher, 12)
    assert abs(tokens["three"] - 3 * tokens["one"]) <= 40


def test_who_was_idle_has_saved_nothing_up() -> None:
    batcher = TextBatcher(100)
    for number in range(100):
        batcher.add(QueuedText(number, 1, 10, tenant="busy"), 0.0)
    served(batcher, 5)
    for number in range(100):
        batcher.add(QueuedText(1000 + number, 2, 10, tenant="late"), 5.0)
    tokens = served(batcher, 4)
    assert abs(tokens["late"] - tokens["busy"]) <= 20


def test_a_text_that_another_tenant_wants_too_comes_in_its_turn() -> None:
    batcher = TextBatcher(20)
    for number in range(100):
        batcher.add(QueuedText(number, number, 10, tenant="flood"), 0.0)
    served(batcher, 5)
    batcher.join(99, 7, "quiet")
    assert 99 in ids(batcher.next_batch(0.0))


def test_a_removed_text_is_not_run() -> None:
    batcher = filled((1, 1, 10), (2, 1, 10), (3, 2, 10))
    assert batcher.remove(1)
    assert not batcher.remove(1)
    assert sorted(ids(batcher.next_batch(0.0))) == [2, 3]
    assert batcher.num_tokens == 0


@given(st.integers(0, 2**32 - 1))
def test_every_text_runs_once_unless_it_was_removed(seed: int) -> None:
    source = random.Random(seed)
    budget = source.randint(1, 200)
    batcher = TextBatcher(budget, max_batch_texts=source.randint(1, 20), max_wait_s=source.choice([0.0, 1.0, 50.0]))
    waiting: dict[int, int] = {}
    now_s, next_id = 0.0, 0
    for _ in range(source.randint(1, 120)):
        now_s += source.random()
        action = source.random()
        if action < 0.5:
            num_tokens = source.randint(1, 150)
            request, kind, tenant = source.randint(0, 4), source.choice(["a", "b"]), source.choice(["", "x", "y"])
            text = QueuedText(next_id, request, num_tokens, kind, tenant, source.choice([0.5, 1.0, 3.0]))
            batcher.add(text, now_s)
            waiting[next_id] = num_tokens
            next_id += 1
        elif action < 0.6 and waiting:
            gone = source.choice(list(waiting))
            assert batcher.remove(gone)
            del waiting[gone]
        elif action < 0.7 and waiting:
            batcher.join(source.choice(list(waiting)), source.randint(0, 4), source.choice(["", "x", "y"]))
        else:
            batch = batcher.next_batch(now_s)
            assert bool(batch) == bool(waiting)
            assert len({text.kind for text in batch}) <= 1
            assert sum(text.num_tokens for text in batch) <= budget or len(batch) == 1
            for text in batch:
                del waiting[text.id]
        assert (len(batcher), batcher.num_tokens) == (len(waiting), sum(waiting.values()))
    while batch := batcher.next_batch(now_s):
        for text in batch:
            del waiting[text.id]
    assert not waiting
