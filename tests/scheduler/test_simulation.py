"""Tens of thousands of steps of random traffic over pools that are too small: nothing leaks and nobody starves."""

from __future__ import annotations

import random

import pytest

from llmserve.messages import EngineRequest
from llmserve.scheduler.policy import FCFSPolicy, Policy, PriorityPolicy
from tests.scheduler.driver import Driver
from tests.scheduler.fake_worker import STOP_TOKEN_ID, engine_request

NUM_STEPS = 5000
MAX_TOKENS = 60  # of prompt and answer together
MAX_LIVE = 20
AGEING_S = 8.0
NUM_PRIORITIES = 3

CONFIGS = {
    "roomy": {"num_blocks": 200},
    "tiny pool": {"num_blocks": 16},
    "one long request fills the pool": {"num_blocks": 14, "watermark": 0.0},
    "small budget": {"num_blocks": 30, "max_num_batched_tokens": 6, "max_num_seqs": 6},
    "blocks of one token": {"num_blocks": 80, "block_size": 1},
    "no prefix cache": {"num_blocks": 18, "enable_prefix_caching": False},
    "host tier": {"num_blocks": 18, "num_host_blocks": 40},
    "host tier smaller than a prompt": {"num_blocks": 30, "num_host_blocks": 5},
    "high watermark": {"num_blocks": 24, "watermark": 0.4},
}


class Traffic:
    """Random requests: some share a system prompt, some are copies, some go on with an earlier answer."""

    def __init__(self, source: random.Random, max_num_tokens: int) -> None:
        self.source = source
        self.max_prompt = min(MAX_TOKENS, max_num_tokens) - 1
        self.system_prompts = [[source.randrange(5) for _ in range(17)] for _ in range(3)]
        self.last: list[int] = []
        self.num_added = 0

    def next(self, now_s: float) -> EngineRequest:
        source = self.source
        kind = source.random()
        if kind < 0.4:
            prompt = source.choice(self.system_prompts) + [source.randrange(5) for _ in range(source.randrange(20))]
        elif kind < 0.6 and self.last:
            prompt = self.last + [source.randrange(5) for _ in range(source.randrange(4))]
        else:
            prompt = [source.randrange(5) for _ in range(source.randrange(1, 40))]
        self.last = prompt = prompt[: self.max_prompt]
        self.num_added += 1
        return engine_request(
            str(self.num_added),
            prompt,
            max_tokens=source.randrange(1, MAX_TOKENS - len(prompt) + 1),
            stop_token_ids=[STOP_TOKEN_ID] if source.random() < 0.3 else [],
            prompt_logprobs=1 if source.random() < 0.05 else None,
            arrival_s=now_s,
            priority=source.randrange(NUM_PRIORITIES),
            cache_salt=source.choice(["", "", "", "tenant"]),
        )


class WaitingTimes:
    """Counts for every live request who was ever in front of it, and from that the longest it may take."""

    def __init__(self, policy: Policy, max_overtaking_s: float) -> None:
        self.policy = policy
        self.max_overtaking_s = max_overtaking_s
        self.live: dict[str, tuple[float, EngineRequest]] = {}  # rank, request
        self.num_in_front: dict[str, int] = {}

    def add(self, request: EngineRequest) -> None:
        rank = self.policy.rank(request)
        for other_id, (other_rank, other) in self.live.items():
            if rank < other_rank:
                assert request.arrival_s <= other.arrival_s + self.max_overtaking_s
                self.num_in_front[other_id] += 1
        self.num_in_front[request.request_id] = sum(other_rank <= rank for other_rank, _ in self.live.values())
        self.live[request.request_id] = rank, request

    def finish(self, request_id: str, now_s: float) -> None:
        """The first in order waits at worst until those behind it have ended, a token a step, and then needs as long
        itself; after that the next is first."""
        _, request = self.live.pop(request_id)
        assert now_s - request.arrival_s <= 2 * MAX_TOKENS * (self.num_in_front[request_id] + 1)


@pytest.mark.parametrize("policy_name", ["fcfs", "priority"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("drafts", [False, True])
def test_random_traffic(name: str, policy_name: str, drafts: bool) -> None:
    source = random.Random(f"{name} {policy_name}")
    by_priority = policy_name == "priority"
    policy = PriorityPolicy(AGEING_S) if by_priority else FCFSPolicy()
    driver = Driver(
        **CONFIGS[name],  # type: ignore[arg-type]
        policy=policy,
        num_sampled=lambda: source.choice((1, 1, 1, 2, 4)),
        drafts_seed=1 if drafts else None,
    )
    traffic = Traffic(source, driver.max_num_tokens)
    waiting_times = WaitingTimes(policy, AGEING_S * (NUM_PRIORITIES - 1) if by_priority else 0.0)
    num_aborted = num_steps = 0
    while num_steps < NUM_STEPS or driver.scheduler.has_work():
        while num_steps < NUM_STEPS and source.random() < 0.3 and len(driver.requests) < MAX_LIVE:
            request = traffic.next(driver.now_s)
            driver.add(request)
            waiting_times.add(request)
        if driver.requests and source.random() < 0.02:
            for request_id in driver.abort(source.sample(sorted(driver.requests), 1)):
                del waiting_times.live[request_id]
                num_aborted += 1
        _, updates = driver.step()
        for update in updates:
            if update.finish_reason is not None:
                waiting_times.finish(update.request_id, driver.now_s)
        num_steps += 1
        assert num_steps < 2 * NUM_STEPS
    driver.check_empty()

    # The traffic did what it is for.
    assert len(driver.finish_reasons) + num_aborted == traffic.num_added > 300
    assert num_aborted > 30
    assert name == "roomy" or driver.num_preemptions > 10
    assert (driver.num_accepted_tokens > 100) == drafts
    assert (driver.num_cached_tokens > 1000) == (name != "no prefix cache")
    assert (driver.num_restored_tokens > 100) == ("host tier" in name)
