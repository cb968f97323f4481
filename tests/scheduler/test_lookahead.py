"""Scheduling a step ahead: any interleaving of arrivals, aborts and steps ends with the words of each request alone.

The worker of these tests knows its tokens at once and tells them a step late; it checks every block it reads.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.engine.overlap import OverlappedCore
from llmserve.kv_cache.manager import KVCacheManager
from llmserve.messages import EngineRequest, FinishReason
from llmserve.scheduler.budget import FixedBudget
from llmserve.scheduler.drafts import DraftCandidate
from llmserve.scheduler.lookahead import SettledDrafter
from llmserve.scheduler.output import SchedulerOutput
from llmserve.scheduler.policy import make_policy
from llmserve.scheduler.scheduler import Scheduler
from llmserve.worker.output import ModelRunnerOutput
from tests.scheduler.fake_worker import FakeWorker, engine_request, expected_answer
from tests.scheduler.random_drafter import RandomDrafter

BLOCK_SIZE = 4


class KnownTokens(KVCacheManager):
    """Hashes no token that is still being drawn."""

    def commit(self, request_id: str, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        num_hashed = min(num_computed_tokens, len(token_ids)) // self.block_size * self.block_size
        assert min(token_ids[:num_hashed], default=0) >= 0
        super().commit(request_id, token_ids, num_computed_tokens)

    def match_prefix(self, request_id: str, token_ids: Sequence[int]) -> list[int]:
        assert min(token_ids) >= 0
        return super().match_prefix(request_id, token_ids)


@dataclass
class Told:
    """A step that the worker has done."""

    output: ModelRunnerOutput
    holds_up_next: bool

    def result(self) -> ModelRunnerOutput:
        return self.output


class Worker:
    """Does a step when it is launched; its tokens are asked for later."""

    def __init__(self, num_blocks: int) -> None:
        self.fake = FakeWorker(num_blocks, BLOCK_SIZE)

    def launch(self, output: SchedulerOutput) -> Told:
        return Told(ModelRunnerOutput(sampled=self.fake.execute(output)), bool(output.draft_token_ids))

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        return self.launch(output).result()


class Overlapped:
    def __init__(self, num_blocks: int, budget: int, drafts_seed: int | None, policy: str = "fcfs") -> None:
        self.worker = Worker(num_blocks)
        self.blocks = KnownTokens(num_blocks, BLOCK_SIZE)
        drafter = None
        if drafts_seed is not None:
            drafter = SettledDrafter(RandomDrafter(random.Random(drafts_seed), self.worker.fake.salts))
        scheduler = Scheduler(
            self.blocks,
            policy=make_policy(policy),
            budget=FixedBudget(budget),
            max_num_seqs=6,
            max_model_len=1000,
            drafter=drafter,
        )
        self.core = OverlappedCore(scheduler, FixedBudget(budget), self.worker, lambda: 0.0, drafter)
        self.answers: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason | None] = {}
        self.num_tokens = 0

    def add(self, request: EngineRequest) -> None:
        self.worker.fake.salts[request.request_id] = request.cache_salt
        self.answers[request.request_id] = []
        self.core.add(request)

    def step(self) -> None:
        step = self.core.step()
        self.num_tokens += step.stats.num_step_tokens
        for output in step.outputs:
            assert min(output.token_ids) >= 0
            assert self.reasons.get(output.request_id) is None
            self.answers[output.request_id] += output.token_ids
            self.reasons[output.request_id] = output.finish_reason


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(12, 40),
    budget=st.sampled_from([6, 9, 32]),
    drafts_seed=st.none() | st.integers(0, 100),
    policy=st.sampled_from(["fcfs", "fair", "priority"]),
)
def test_every_interleaving_ends_with_the_words_of_each_alone(
    seed: int, num_blocks: int, budget: int, drafts_seed: int | None, policy: str
) -> None:
    source = random.Random(seed)
    engine = Overlapped(num_blocks, budget, drafts_seed, policy)
    requests: dict[str, EngineRequest] = {}
    gone: set[str] = set()
    for number in range(60):
        if number < 40 and source.random() < 0.3:
            name = f"r{number}"
            prompt = [source.randrange(3)] * source.randint(1, 30)
            request = engine_request(
                name,
                prompt,
                max_tokens=source.choice([1, 2, 9, 40]),
                stop_token_ids=source.choice([(), (3,), (3, 5)]),
                tenant=source.choice("xyz"),
                priority=source.randrange(3),
                arrival_s=float(number),
            )
            requests[name] = request
            engine.add(request)
        if requests and source.random() < 0.1:
            taken = source.choice(list(requests))
            engine.core.abort([taken])
            gone.add(taken)
        if engine.core.has_work():
            engine.step()
    while engine.core.has_work():
        engine.step()
    for name, request in requests.items():
        expected = expected_answer(request, num_blocks * BLOCK_SIZE)
        said = engine.answers[name]
        assert said == (expected[: len(said)] if name in gone else expected)
    assert engine.blocks.num_free_blocks == num_blocks


def test_an_end_by_length_is_known_ahead_and_one_by_a_stop_token_a_step_late() -> None:
    by_length = Overlapped(40, 32, None)
    by_length.add(engine_request("a", [1, 2], max_tokens=6))
    while by_length.core.has_work():
        by_length.step()
    assert by_length.num_tokens == 2 + 5
    answer = by_length.answers["a"]
    stop = answer[2]
    by_stop = Overlapped(40, 32, None)
    by_stop.add(engine_request("a", [1, 2], max_tokens=6, stop_token_ids=[stop]))
    while by_stop.core.has_work():
        by_stop.step()
    assert by_stop.answers["a"] == answer[: answer.index(stop) + 1]
    assert by_stop.reasons["a"] is FinishReason.STOP


class NoDrafts:
    """Asked, and finds nothing; then something."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.drafts: dict[str, list[int]] = {}

    def wants_drafts(self, num_seqs: int, num_tokens: int) -> bool:
        self.num_asked += 1
        return True

    def draft(self, candidates: Sequence[DraftCandidate], max_drafts: int) -> dict[str, list[int]]:
        return self.drafts

    def observe(self, num_seqs: int, num_tokens: int, num_drafts: int, duration_s: float) -> None: ...

    def forget(self, request_id: str) -> None: ...


def test_a_drafter_that_finds_nothing_is_asked_ever_more_rarely() -> None:
    inner = NoDrafts()
    drafter = SettledDrafter(inner)
    asked_at = []
    for step in range(200):
        drafter.is_settled = drafter.should_settle()
        before = inner.num_asked
        if drafter.wants_drafts(1, 1):
            drafter.draft([], 8)
        if inner.num_asked > before:
            asked_at.append(step)
    assert [b - a for a, b in pairwise(asked_at)][:7] == [2, 4, 8, 16, 32, 32, 32]
    inner.drafts = {"a": [1]}
    num_before = inner.num_asked
    for _ in range(64):
        drafter.is_settled = drafter.should_settle()
        if drafter.wants_drafts(1, 1):
            drafter.draft([], 8)
    assert inner.num_asked - num_before > 30, "as soon as there are drafts, every step is settled"


@pytest.mark.parametrize("is_settled", [False, True])
def test_a_drafter_sees_only_tokens_that_are_known(is_settled: bool) -> None:
    inner = NoDrafts()
    drafter = SettledDrafter(inner)
    drafter.is_settled = is_settled
    assert drafter.wants_drafts(1, 1) is is_settled
