"""Adjustments of logits against their definition, token by token; counts; log-probabilities."""

from __future__ import annotations

import pytest
import torch

from llmserve.kernels.ops import MAX_COUNT, Ops
from llmserve.kernels.reference import ReferenceOps
from llmserve.kernels.reference_adjustments import adjust_logits
from tests.kernels.adjustment_cases import adjusted_value, empty_adjustments, random_adjustments, with_adjustments
from tests.kernels.cpu_cases import ISA_NAMES, cpu_ops, needs_compiler
from tests.kernels.test_reference_sampling import sampling

CPU = torch.device("cpu")


@pytest.mark.parametrize("vocab", [33, 64, 200])
def test_adjustments_are_what_they_are_said_to_be(vocab: int) -> None:
    made = random_adjustments(vocab)
    logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(0)) * 3
    positions = torch.arange(8) * 3
    expected = torch.tensor(
        [
            [adjusted_value(float(logits[row, i]), row, i, int(positions[row]), made) for i in range(vocab)]
            for row in range(8)
        ]
    )
    untouched = (made.is_used[made.slots] == 0).nonzero().flatten()
    before = logits.clone()
    adjust_logits(logits, positions, made)
    assert torch.allclose(logits, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits[untouched], before[untouched])
    assert len(untouched) == 2
    assert (logits != before).any(dim=1).sum() == 6


def test_an_entry_ends_at_its_position() -> None:
    made = empty_adjustments([0, 0, 0], 1, 40)
    made.is_used[0], made.num_entries[0] = 1, 1
    made.entry_ids[0, 0], made.entry_values[0, 0], made.entry_until[0, 0] = 7, -torch.inf, 12
    logits = torch.zeros(3, 40)
    adjust_logits(logits, torch.tensor([11, 12, 13]), made)
    assert logits.isneginf().nonzero().tolist() == [[0, 7]]


def _all_ops() -> list[Ops]:
    return [ReferenceOps(), cpu_ops(ISA_NAMES[0])]


@needs_compiler
def test_drawn_tokens_are_counted_where_there_are_penalties() -> None:
    for ops in _all_ops():
        made = empty_adjustments([2, 0, 1, 3], 4, 50)
        made.is_used[:3] = 1
        made.presence[2], made.frequency[1], made.presence[3] = 1.0, 1.0, 1.0
        made.token_counts[1, 9] = 2 * MAX_COUNT + 1
        logits = torch.zeros(4, 50)
        logits[torch.arange(4), [5, 6, 9, 8]] = 1e6
        greedy = sampling(4, temperature=torch.zeros(4), all_greedy=True)
        drawing = with_adjustments(greedy, made, CPU)
        assert drawing.adjustments is not None
        assert ops.sample(logits, drawing).tolist() == [5, 6, 9, 8]
        counts = drawing.adjustments.token_counts
        assert counts.nonzero().tolist() == [[1, 9], [2, 5]]  # 0 has no penalty, and 3 is not used
        assert counts[2, 5] == 2
        assert counts[1, 9] == 2 * MAX_COUNT + 1  # as many as it can hold


@needs_compiler
def test_every_implementation_draws_the_same_adjusted() -> None:
    made = random_adjustments(500)
    logits = torch.randn(8, 500, generator=torch.Generator().manual_seed(1)) * 2
    found = []
    for ops in _all_ops():
        row, drawing = logits.clone(), with_adjustments(sampling(8), made, CPU)
        assert drawing.adjustments is not None
        found.append((ops.sample(row, drawing), row, drawing.adjustments.token_counts))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_penalised_draws_follow_the_penalised_softmax() -> None:
    """The counts a draw leaves are those the next one is made with: 4000 rows draw 12 tokens each."""
    rows, vocab, steps = 4000, 6, 12
    made = empty_adjustments(list(range(rows)), rows, vocab)
    made.is_used[:], made.frequency[:], made.repetition[:] = 1, 0.4, 1.2
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5, 1.5, -1.0])
    expected = torch.zeros(vocab, dtype=torch.float64)
    found = torch.zeros(vocab, dtype=torch.float64)
    for step in range(steps):
        counts = (made.token_counts >> 1).double()
        seen = torch.where(logits > 0, logits / 1.2, logits * 1.2).double()
        values = torch.where(counts > 0, seen, logits.double()) - 0.4 * counts
        expected += values.softmax(dim=1).sum(dim=0)
        drawing = sampling(rows, seeds=torch.arange(rows) + 77, positions=torch.full((rows,), step), adjustments=made)
        found += ReferenceOps().sample(logits.repeat(rows, 1), drawing).bincount(minlength=vocab)
    assert (made.token_counts >> 1).sum() == rows * steps
    chi_square = float(((found - expected) ** 2 / expected).sum())
    assert chi_square < 20.5  # the 99.9% point of 5 degrees of freedom; penalties make draws less, not more, varied


def test_logprobs() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.tensor([0, 299, 5, 17, 3])
    scores = ReferenceOps().token_logprobs(logits, ids, 20)
    exact = logits.double().log_softmax(dim=1)
    ordered = logits.argsort(dim=1, descending=True)
    assert torch.allclose(scores.logprobs.double(), exact[torch.arange(5), ids], atol=1e-5)
    assert torch.equal(scores.top_ids, ordered[:, :20])
    assert torch.allclose(scores.top_logprobs.double(), exact.gather(1, ordered[:, :20]), atol=1e-5)
    assert [int(ordered[row, rank - 1]) for row, rank in enumerate(scores.ranks.tolist())] == ids.tolist()
    assert ReferenceOps().token_logprobs(logits, ids, 0).top_ids.shape == (5, 0)
