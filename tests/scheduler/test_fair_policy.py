"""Fair sharing: who gets how many tokens, who waits, who is given up. The clock is the number of the step."""

from __future__ import annotations

import random

import pytest

from llmserve.scheduler.fair_policy import FairPolicy
from tests.scheduler.driver import Driver
from tests.scheduler.fake_worker import engine_request


class Load:
    """Tenants over one scheduler, and what each step brought them."""

    def __init__(self, policy: str = "fair", **limits: int) -> None:
        options = {"num_blocks": 512, "max_num_seqs": 8, "max_num_batched_tokens": 64} | limits
        self.driver = Driver(policy=FairPolicy() if policy == "fair" else None, **options)  # type: ignore[arg-type]
        self.num_added = 0
        self.tokens: dict[str, int] = {}
        self.ttft: dict[str, list[float]] = {}
        self._arrivals: dict[str, float] = {}

    def add(self, tenant: str, num_prompt: int, num_output: int, weight: float = 1.0) -> None:
        self.num_added += 1
        prompt = [self.num_added % 11, *([self.num_added % 7] * (num_prompt - 1))]
        request_id = f"{tenant}/{self.num_added}"
        request = engine_request(
            request_id,
            prompt,
            max_tokens=num_output,
            arrival_s=self.driver.now_s,
            tenant=tenant,
            weight=weight,
            cache_salt=request_id,
        )
        self.driver.add(request)
        self._arrivals[request_id] = self.driver.now_s

    def step(self) -> None:
        for update in self.driver.step()[1]:
            tenant = update.request_id.partition("/")[0]
            self.tokens[tenant] = self.tokens.get(tenant, 0) + len(update.token_ids)
            if update.first_scheduled_s:
                waited = self.driver.now_s - self._arrivals[update.request_id]
                self.ttft.setdefault(tenant, []).append(waited)

    def num_in_flight(self, tenant: str) -> int:
        return sum(request_id.startswith(f"{tenant}/") for request_id in self.driver.requests)


def quiet_ttft(flood: bool, policy: str) -> list[float]:
    """Steps to the first token of a tenant that asks every ten steps, beside one that always has 50 waiting."""
    load = Load(policy)
    for step in range(600):
        while flood and load.num_in_flight("flood") < 60:
            load.add("flood", 16, 24)
        if step >= 50 and step % 10 == 0:
            load.add("quiet", 16, 8)
        load.step()
    return sorted(load.ttft["quiet"])


def p99(values: list[float]) -> float:
    return values[min(len(values) - 1, int(len(values) * 0.99))]


def test_a_flood_does_not_move_a_quiet_tenants_first_token() -> None:
    alone, beside, unfair = quiet_ttft(False, "fair"), quiet_ttft(True, "fair"), quiet_ttft(True, "fcfs")
    assert len(beside) > 50
    assert p99(beside) <= 1.5 * p99(alone)
    assert p99(unfair) > 20 * p99(alone)  # what it is that the policy prevents


def test_who_is_served_at_once_need_not_share_the_step_with_the_prompts_of_a_flood() -> None:
    load = Load()
    for _ in range(4):
        load.add("flood", 4, 100)
    load.add("flood", 300, 8)
    for _ in range(3):
        load.step()
    load.tokens.clear()
    load.add("quiet", 58, 4)  # of 64 tokens a step the flood's long prompt would take all but four
    load.step()
    assert load.tokens == {"flood": 4, "quiet": 1}


@pytest.mark.parametrize(("weights", "expected"), [((1.0, 1.0), 1.0), ((1.0, 3.0), 3.0)])
def test_tokens_follow_the_weights(weights: tuple[float, float], expected: float) -> None:
    """Two floods, one of few long requests and one of many short ones."""
    load = Load()
    for _ in range(2500):
        while load.num_in_flight("a") < 30:
            load.add("a", 10, 60, weights[0])
        while load.num_in_flight("b") < 120:
            load.add("b", 4, 6, weights[1])
        load.step()
    generated = {name: 2 * tokens for name, tokens in load.tokens.items()}
    cost = {"a": generated["a"] * (1 + 10 / 120), "b": generated["b"] * (1 + 4 / 12)}
    assert cost["b"] / cost["a"] == pytest.approx(expected, rel=0.15)


def test_idleness_earns_no_credit() -> None:
    load = Load()
    for step in range(1000):
        while load.num_in_flight("busy") < 40:
            load.add("busy", 8, 16)
        if step >= 500:
            while load.num_in_flight("late") < 40:
                load.add("late", 8, 16)
        if step == 500:
            load.tokens.clear()
        load.step()
    assert load.tokens["late"] == pytest.approx(load.tokens["busy"], rel=0.2)


def test_what_was_not_said_is_not_paid_for() -> None:
    """A tenant whose answers end early gets as many tokens as one whose answers have the length they asked for."""
    policy = FairPolicy()
    driver = Driver(policy=policy, num_blocks=512)
    for index in range(40):
        driver.add(engine_request(f"modest/{index}", [1, 2], max_tokens=4, tenant="modest"))
        request = engine_request(f"greedy/{index}", [1, 2], max_tokens=900, tenant="greedy", stop_token_ids=range(11))
        driver.add(request)
    driver.add(engine_request("keeper", [1], max_tokens=900, tenant="keeper"))
    while len(driver.requests) > 1:
        driver.step()
    assert policy._ends["greedy"] < policy._ends["modest"]  # 2 + 2 x 1 tokens a request, against 2 + 2 x 4
    driver.run()
    assert [policy._started, policy._charges, policy._ends] == [{}, {}, {}]


def test_aborted_requests_cost_what_they_got() -> None:
    policy = FairPolicy()
    driver = Driver(policy=policy)
    for index in range(20):
        driver.add(engine_request(str(index), [1, 2, 3], max_tokens=50, tenant="t"))
    driver.add(engine_request("other", [1], tenant="other"))
    driver.abort([str(index) for index in range(20)])
    assert policy._ends["t"] == pytest.approx(0.0)


def test_tenants_that_are_done_are_forgotten() -> None:
    policy = FairPolicy()
    driver = Driver(policy=policy)
    for index in range(9000):
        driver.add(engine_request(str(index), [1], max_tokens=1, tenant=f"tenant {index}"))
        driver.run()
    assert len(policy._expected) <= 4097
    assert not policy._ends


def test_answers_do_not_depend_on_who_else_asks() -> None:
    """The driver checks every step: blocks, budgets, and that each answer is the one of an undisturbed run."""
    assert sum(random_load(seed).driver.num_preemptions for seed in range(6)) > 50


def random_load(seed: int) -> Load:
    random_ = random.Random(seed)
    load = Load(num_blocks=random_.choice([40, 64, 512]), max_num_seqs=random_.choice([2, 5, 8]))
    for _ in range(300):
        if load.driver.scheduler.stats().num_waiting < 30 and random_.random() < 0.6:
            tenant = random_.choice(["a", "a", "a", "b", "c"])
            load.add(tenant, random_.randint(1, 40), random_.randint(1, 30), random_.choice([0.5, 1.0, 4.0]))
        if load.driver.requests and random_.random() < 0.05:
            load.driver.abort([random_.choice(sorted(load.driver.requests))])
        load.step()
    load.driver.run()
    return load
