"""A step's inputs made by one kernel, against plain torch: ragged, empty and padded sequences."""

from __future__ import annotations

import random
from dataclasses import fields

import pytest
import torch

from llmserve.kernels.step_ops import HEADER, ReferenceStepOps, StagedStep
from llmserve.kernels.triton.step_inputs import TritonStepOps
from tests.kernels.triton.triton_cases import DEVICE

NUM_ROWS, BLOCK_SIZE, MAX_BLOCKS = 12, 16, 20


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def random_step(seed: int, num_seqs: int, padding: tuple[int, int, int]) -> tuple[torch.Tensor, StagedStep]:
    """Sequences of 1 to 40 tokens or one; `padding`: tokens, sequences and draws more than there are."""
    source = random.Random(seed)
    rows = torch.randint(0, 2**20, (NUM_ROWS + 1, HEADER + MAX_BLOCKS), dtype=torch.int32)
    counts = [source.choice([1, 1, source.randint(1, 40)]) for _ in range(num_seqs)]
    computed = [source.randint(0, MAX_BLOCKS * BLOCK_SIZE - count) for count in counts]
    start = [sum(counts[:index]) for index in range(num_seqs + 1)]
    draws = [end - 1 for end in start[1:] if source.random() < 0.8]
    token_ids = [source.choice([-1, source.randrange(1000)]) for _ in range(start[-1])]
    more_tokens, more_seqs, more_draws = padding
    chosen = source.sample(range(NUM_ROWS), num_seqs)
    staged = StagedStep(
        rows=ints(chosen + [NUM_ROWS] * more_seqs),
        num_computed=ints(computed + [0] * more_seqs),
        query_start=ints(start + [start[-1]] * more_seqs),
        draw_tokens=ints(draws + [0] * more_draws),
        draw_rows=ints([0] * (len(draws) + more_draws)),
        token_ids=ints(token_ids + [0] * more_tokens),
    )
    return rows.to(DEVICE), staged


@pytest.mark.parametrize("padding", [(0, 0, 0), (5, 3, 2), (140, 1, 130), (0, 4, 0)])
@pytest.mark.parametrize(("seed", "num_seqs"), [(1, 1), (2, 2), (3, 7), (4, 12)])
def test_inputs_are_those_of_the_reference(seed: int, num_seqs: int, padding: tuple[int, int, int]) -> None:
    rows, staged = random_step(seed, num_seqs, padding)
    expected = ReferenceStepOps().expand(rows, staged, BLOCK_SIZE)
    found = TritonStepOps().expand(rows, staged, BLOCK_SIZE)
    for field in fields(expected):
        name = field.name
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert getattr(found, name).dtype == getattr(expected, name).dtype, name


def test_a_step_of_padding_alone_touches_nothing_of_anyones() -> None:
    """What a graph is captured with: the staging buffer cleared."""
    rows = torch.zeros((NUM_ROWS + 1, HEADER + MAX_BLOCKS), dtype=torch.int32, device=DEVICE)
    rows[-1, HEADER:] = 77
    staged = StagedStep(ints([0] * 4), ints([0] * 4), ints([0] * 5), ints([0] * 4), ints([0] * 4), ints([0] * 9))
    step = TritonStepOps().expand(rows, staged, BLOCK_SIZE)
    assert step.slot_mapping.tolist() == [77 * BLOCK_SIZE] * 9
    assert step.seq_lens.tolist() == [0] * 4
