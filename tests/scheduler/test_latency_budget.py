"""The budget learns what a prompt token costs a decode step, and spends no more than it was allowed."""

from __future__ import annotations

import random

import pytest

from llmserve.errors import ConfigError
from llmserve.scheduler.latency_budget import LatencyBudget


class Machine:
    """A machine whose steps take decode_s + token_s * prompt tokens, give or take `noise`, or `mixed_noise`."""

    def __init__(self, decode_s: float, token_s: float, noise: float = 0.0, mixed_noise: float | None = None) -> None:
        self.decode_s, self.token_s = decode_s, token_s
        self.noise, self.mixed_noise = noise, noise if mixed_noise is None else mixed_noise
        self._source = random.Random(1)

    def step(self, budget: LatencyBudget, num_decoding: int, prompt_left: int) -> tuple[int, float]:
        """(prompt tokens computed, seconds) of a step with a prompt of `prompt_left` tokens beside the decodes."""
        running = num_decoding + (1 if prompt_left else 0)
        chunk = min(budget.next_step(running) - num_decoding, prompt_left)
        noise = self.mixed_noise if chunk > 1 else self.noise
        seconds = (self.decode_s + self.token_s * chunk) * (1 + self._source.uniform(-noise, noise))
        budget.observe(num_decoding + chunk, chunk, num_decoding, seconds)
        return chunk, seconds


def test_with_nothing_decoding_a_prompt_gets_all() -> None:
    assert LatencyBudget(2048, 2.0).next_step(1) == 2048


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("slowdown", [1.5, 2.0, 3.0])
def test_a_long_prompt_stretches_steps_by_what_was_allowed(slowdown: float, noise: float) -> None:
    machine = Machine(decode_s=0.020, token_s=0.0004, noise=noise)
    budget = LatencyBudget(2048, slowdown)
    budget.observe(500, 500, 8, 0.25)  # the prompts that now decode
    for _ in range(30):
        machine.step(budget, 8, 0)
    times, left = [], 4000
    while left:
        chunk, seconds = machine.step(budget, 8, left)
        assert chunk >= 1
        left -= chunk
        times.append(seconds)
    settled = sorted(times[5:])
    assert settled[len(settled) // 2] == pytest.approx(slowdown * 0.020, rel=0.35 if noise else 0.1)
    assert settled[-1] <= slowdown * 0.020 * (1.9 if noise else 1.1)


def test_the_share_of_prompts_holds_when_every_step_is_mixed_and_the_batch_grows() -> None:
    machine = Machine(decode_s=0.020, token_s=0.0004)
    budget = LatencyBudget(2048, 2.0)
    budget.observe(500, 500, 8, 0.25)
    for _ in range(30):
        machine.step(budget, 8, 0)
    machine.decode_s = 0.040  # four times the streams: no step is without a prompt any more
    chunks = [machine.step(budget, 32, 10**6)[0] for _ in range(1500)]
    budgeted = [chunk for chunk in chunks[1:] if chunk > 1]  # 1: the prompts left out, to measure decodes alone
    assert min(budgeted) >= 16
    assert budgeted[-1] == pytest.approx(0.040 / 0.0004, rel=0.25)


@pytest.mark.parametrize(("before", "now"), [(1, 64), (64, 1)])
def test_a_jump_of_the_number_of_streams_is_measured_at_once(before: int, now: int) -> None:
    """Prompts neither starve, because all their steps are called slow, nor take what was right for many more."""

    def decode_s(num_decoding: int) -> float:
        return 0.006 + 0.001 * num_decoding

    machine = Machine(decode_s=decode_s(before), token_s=0.0012)
    budget = LatencyBudget(2048, 2.0)
    budget.observe(500, 500, before, 0.6)
    for _ in range(200):
        machine.step(budget, before, 0)
    for _ in range(100):
        machine.step(budget, before, 10**6)
    machine.decode_s = decode_s(now)
    machine.step(budget, now, 10**6)  # nobody knows yet
    steps = [machine.step(budget, now, 10**6) for _ in range(60)]
    assert sum(seconds > 2.2 * decode_s(now) for _, seconds in steps) <= 3
    fitting = decode_s(now) / 0.0012
    assert sum(chunk for chunk, _ in steps) / 60 >= 0.4 * fitting


def test_drafts_have_room_where_no_prompt_is_in_progress() -> None:
    budget = LatencyBudget(2048, 2.0)
    for _ in range(30):
        budget.observe(1, 0, 1, 0.050)
        budget.observe(9, 8, 1, 0.050 + 8 * 0.008)
    assert budget.next_step(1) == 1 + 16
    assert budget.next_step(2) < 1 + 10


def test_a_prompt_so_dear_that_its_chunks_are_tiny_is_not_taken_for_decodes() -> None:
    machine = Machine(decode_s=0.010, token_s=0.0015)  # deep in a context
    budget = LatencyBudget(2048, 2.0)
    budget.observe(500, 500, 8, 0.25)
    for _ in range(30):
        machine.step(budget, 8, 0)
    steps = [machine.step(budget, 8, 10**6) for _ in range(400)][200:]
    assert max(chunk for chunk, _ in steps) <= 8
    assert max(seconds for _, seconds in steps) <= 0.0225


def test_slow_steps_stay_within_what_was_allowed_of_slow_steps() -> None:
    """The noise of mixed steps is larger than that of decodes alone: their mean must be lower than allowed."""
    machine = Machine(decode_s=0.010, token_s=0.0002, noise=0.3, mixed_noise=0.5)
    budget = LatencyBudget(2048, 2.0)
    budget.observe(500, 500, 8, 0.1)
    quiet = sorted(machine.step(budget, 8, 0)[1] for _ in range(1000))
    beside = sorted(machine.step(budget, 8, 10**6)[1] for _ in range(3000))
    assert beside[2850] <= 2.0 * quiet[970]
    assert sum(beside) / len(beside) >= 1.5 * 0.010  # and prompts go on


def test_a_whole_prompt_that_kept_nobody_waiting_does_not_make_chunks_smaller() -> None:
    budget = LatencyBudget(2048, 2.0)
    for _ in range(50):
        budget.observe(64, 63, 1, 0.0242)
        for num_left in [1] * 15 + [0]:
            budget.observe(1, 0, num_left, 0.0055)
    budget.observe(64, 63, 1, 0.0242)
    assert budget.next_step(2) >= 1 + 15


def test_no_step_is_given_more_than_the_maximum_or_less_than_its_requests() -> None:
    budget = LatencyBudget(64, 2.0)
    budget.observe(8, 0, 8, 0.01)
    budget.observe(72, 64, 8, 0.011)
    assert budget.next_step(9) <= 64
    assert budget.next_step(60) >= 60


def test_one_slow_step_does_not_starve_a_prompt() -> None:
    machine = Machine(decode_s=0.020, token_s=0.0004)
    budget = LatencyBudget(2048, 2.0)
    for _ in range(30):
        machine.step(budget, 8, 0)
    for _ in range(10):
        machine.step(budget, 8, 10**6)
    before = budget.next_step(9)
    budget.observe(58, 50, 8, 5.0)
    assert budget.next_step(9) >= before / 2


def test_a_slowdown_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="itl_slowdown"):
        LatencyBudget(64, 1.0)
