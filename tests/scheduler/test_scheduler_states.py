"""Any order of add, abort and step, found by hypothesis: every step is consistent, and the end is empty."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmserve.scheduler.policy import FCFSPolicy, PriorityPolicy
from tests.scheduler.driver import Driver
from tests.scheduler.fake_worker import STOP_TOKEN_ID, engine_request


class SchedulerMachine(RuleBasedStateMachine):
    """Tiny pools, so that preemption and eviction are the rule; two token values, so that prompts are often equal.

    What must hold after each step is checked by the driver and its worker, and every answer is compared with that of a
    request that ran alone.
    """

    @initialize(
        num_blocks=st.integers(2, 12),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 5),
        extra_budget=st.integers(0, 10),
        watermark=st.sampled_from([0.0, 0.1, 0.5]),
        enable_prefix_caching=st.booleans(),
        by_priority=st.booleans(),
        num_sampled=st.integers(1, 3),
        drafts_seed=st.sampled_from([None, 0, 1, 2, 3]),
        num_host_blocks=st.sampled_from([0, 1, 3, 20]),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        extra_budget: int,
        watermark: float,
        enable_prefix_caching: bool,
        by_priority: bool,
        num_sampled: int,
        drafts_seed: int | None,
        num_host_blocks: int,
    ) -> None:
        self.num_added = 0
        self.driver = Driver(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + extra_budget,
            watermark=watermark,
            enable_prefix_caching=enable_prefix_caching,
            policy=PriorityPolicy(ageing_s=5.0) if by_priority else FCFSPolicy(),
            num_sampled=lambda: num_sampled,
            drafts_seed=drafts_seed,
            num_host_blocks=num_host_blocks if enable_prefix_caching else 0,
        )

    @rule(
        token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        max_tokens=st.integers(1, 25),
        min_tokens=st.integers(0, 4),
        stops=st.booleans(),
        prompt_logprobs=st.sampled_from([None, None, 1]),
        priority=st.integers(0, 2),
        cache_salt=st.sampled_from(["", "", "x"]),
        copies=st.integers(1, 3),
    )
    def add(
        self,
        token_ids: list[int],
        max_tokens: int,
        min_tokens: int,
        stops: bool,
        prompt_logprobs: int | None,
        priority: int,
        cache_salt: str,
        copies: int,
    ) -> None:
        for _ in range(copies):
            self.num_added += 1
            self.driver.add(
                engine_request(
                    str(self.num_added),
                    token_ids[: self.driver.max_num_tokens - 1],
                    max_tokens=max_tokens,
                    min_tokens=min_tokens,
                    stop_token_ids=[STOP_TOKEN_ID] if stops else [],
                    prompt_logprobs=prompt_logprobs,
                    priority=priority,
                    cache_salt=cache_salt,
                    arrival_s=self.driver.now_s,
                )
            )

    @precondition(lambda self: self.driver.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.driver.requests)))
        assert self.driver.abort([request_id]) == [request_id]

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.driver.step()

    @invariant()
    def has_work_as_long_as_a_request_is_unfinished(self) -> None:
        if hasattr(self, "driver"):
            assert self.driver.scheduler.has_work() == bool(self.driver.requests)

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.run()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
