"""Drafts are tried where they pay, by a machine's own step times and a text's own acceptance, and else left alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from llmserve.errors import ConfigError
from llmserve.scheduler.adaptive_drafter import AdaptiveDrafter, make_drafter
from llmserve.scheduler.drafts import MAX_DRAFTS, MAX_STEP_DRAFTS, DraftCandidate, FixedDrafter, Proposal

RIGHT, WRONG = 1, 0


class SureProposer:
    """Always proposes; the machine decides what comes true."""

    def __init__(self) -> None:
        self.num_calls = 0

    def propose(self, request_id: str, token_ids: Sequence[int], max_drafts: int) -> Proposal | None:
        self.num_calls += 1
        return Proposal([RIGHT] * max_drafts, 2)

    def forget(self, request_id: str) -> None:
        """It keeps nothing."""


class Machine:
    """`num_seqs` requests that go on for ever. A draft is right with a chance of `rate`, if those before it are; a step
    takes `step_s(rows)` seconds, give or take `noise`."""

    def __init__(self, step_s: Callable[[int], float], rate: float, num_seqs: int = 1, noise: float = 0.0) -> None:
        self.step_s, self.rate, self.num_seqs, self.noise = step_s, rate, num_seqs, noise
        self.proposer = SureProposer()
        self.drafter = AdaptiveDrafter(self.proposer)
        self._source = random.Random(4)
        self._texts: dict[str, list[int]] = {}
        self.num_tokens = self.num_drafts = 0
        self.seconds = 0.0

    def step(self) -> None:
        requests = [str(number) for number in range(self.num_seqs)]
        texts = {request_id: self._texts.setdefault(request_id, [WRONG]) for request_id in requests}
        drafts: dict[str, list[int]] = {}
        if self.drafter.wants_drafts(self.num_seqs, self.num_seqs):
            candidates = [DraftCandidate(request_id, texts[request_id], MAX_DRAFTS) for request_id in requests]
            drafts = self.drafter.draft(candidates, MAX_STEP_DRAFTS)
        num_drafts = sum(map(len, drafts.values()))
        assert num_drafts <= MAX_STEP_DRAFTS
        assert all(drafts.values())
        for request_id, text in texts.items():
            for _ in range(len(drafts.get(request_id, [])) + 1):
                text.append(RIGHT if self._source.random() < self.rate else WRONG)
                self.num_tokens += 1
                if text[-1] == WRONG:
                    break
        seconds = self.step_s(self.num_seqs + num_drafts) * (1 + self._source.uniform(-self.noise, self.noise))
        self.drafter.observe(self.num_seqs, self.num_seqs + num_drafts, num_drafts, seconds)
        self.num_drafts += num_drafts
        self.seconds += seconds

    def speed(self, num_steps: int) -> float:
        """Tokens a second over so many steps, as a multiple of that without drafts."""
        self.num_tokens = self.num_drafts = 0
        self.seconds = 0.0
        for _ in range(num_steps):
            self.step()
        return self.num_tokens / self.seconds / (self.num_seqs / self.step_s(self.num_seqs))


def from_memory(rows: int) -> float:
    """Weights are read once a step: 16 rows cost little more than one."""
    return 0.010 + 0.0002 * rows


def from_tiles(rows: int) -> float:
    """One row is a matrix-vector product; two cost as much as eight."""
    return 0.010 if rows == 1 else 0.016 + 0.004 * ((rows - 1) // 8)


def by_arithmetic(rows: int) -> float:
    """Every row costs the same."""
    return 0.001 + 0.009 * rows


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize(
    ("step_s", "rate", "num_seqs", "least"),
    [
        (from_memory, 0.95, 1, 5.0),
        (from_memory, 0.95, 2, 5.0),
        (from_memory, 0.5, 4, 1.4),
        (from_tiles, 0.95, 1, 3.0),
        (from_tiles, 0.8, 1, 1.5),
    ],
)
def test_drafts_that_pay_are_tried(
    step_s: Callable[[int], float], rate: float, num_seqs: int, least: float, noise: float
) -> None:
    machine = Machine(step_s, rate, num_seqs, noise)
    machine.speed(100)
    assert machine.speed(1000) > least


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize(
    ("step_s", "rate", "num_seqs"),
    [
        (from_tiles, 0.3, 1),
        (from_tiles, 0.05, 1),
        (by_arithmetic, 0.6, 1),
        (by_arithmetic, 0.9, 16),
        (by_arithmetic, 0.3, 64),
        (from_memory, 0.0, 8),
    ],
)
def test_drafts_that_do_not_pay_are_left_alone(
    step_s: Callable[[int], float], rate: float, num_seqs: int, noise: float
) -> None:
    machine = Machine(step_s, rate, num_seqs, noise)
    machine.speed(100)
    assert machine.speed(2000) > 0.97
    assert machine.num_drafts < 0.2 * 2000 * num_seqs


def test_a_text_that_begins_to_repeat_is_noticed_without_having_been_tried() -> None:
    machine = Machine(from_tiles, 0.1)
    machine.speed(500)
    machine.rate = 0.97
    machine.speed(40)
    assert machine.speed(200) > 3


def test_a_machine_that_becomes_faster_is_noticed() -> None:
    machine = Machine(by_arithmetic, 0.9)
    machine.speed(300)
    machine.step_s = from_memory
    machine.speed(3000)
    assert machine.speed(300) > 3


def test_one_slow_step_does_not_end_speculation() -> None:
    machine = Machine(from_memory, 0.95)
    machine.speed(200)
    machine.drafter.observe(1, 16, 15, 1.0)
    machine.speed(50)
    assert machine.speed(200) > 5


def test_a_crowd_for_which_drafts_do_not_pay_is_seldom_asked() -> None:
    machine = Machine(by_arithmetic, 0.3, num_seqs=64)
    machine.speed(200)
    before = machine.proposer.num_calls
    machine.speed(1700)
    assert machine.proposer.num_calls - before <= 101 * 64


def test_steps_that_compute_prompts_carry_no_drafts_and_teach_nothing() -> None:
    drafter = AdaptiveDrafter(SureProposer())
    drafter.observe(2, 300, 0, 0.5)
    assert not drafter.wants_drafts(2, 2)
    drafter.observe(2, 2, 0, 0.01)
    assert drafter.wants_drafts(2, 2)
    assert not drafter.wants_drafts(2, 300)


def test_a_proposal_is_compared_with_what_came_even_after_a_pause() -> None:
    """A request that was right 15 times in a row is believed more than one that was wrong."""
    drafter = AdaptiveDrafter(SureProposer())
    texts = {"right": [WRONG], "wrong": [WRONG]}
    for _ in range(5):
        drafter.observe(2, 2, 0, 0.010)
        assert drafter.wants_drafts(2, 2)
        candidates = [DraftCandidate(name, text, MAX_DRAFTS) for name, text in texts.items()]
        drafts = drafter.draft(candidates, MAX_STEP_DRAFTS)
        texts["right"] += [RIGHT] * MAX_DRAFTS
        texts["wrong"] += [WRONG] * MAX_DRAFTS
    assert len(drafts["right"]) == MAX_DRAFTS
    assert len(drafts.get("wrong", [])) <= 2


def test_the_setting_names_a_drafter() -> None:
    assert make_drafter("off") is None
    assert isinstance(make_drafter("auto"), AdaptiveDrafter)
    assert isinstance(make_drafter("ngram"), FixedDrafter)
    with pytest.raises(ConfigError, match="speculation"):
        make_drafter("medusa")
