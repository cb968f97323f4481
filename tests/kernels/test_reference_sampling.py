"""Sampling against the definition in plain Python integers, the distribution it must have, and filters with ties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.kernels.ops import SamplingTensors
from llmserve.kernels.reference import ReferenceOps
from llmserve.kernels.reference_sampling import apply_min_p, apply_top_k, apply_top_p, gumbel_noise, noise_bits

SEEDS = [0, 1, -1, 42, 2**31, 2**63 - 1, -(2**63), 0x123456789ABCDEF]
POSITIONS = [0, 1, 7, 2**31 - 1, 8191]


def mix(h: int) -> int:
    h = ((h ^ h >> 16) * 0x85EBCA6B) % 2**32
    h = ((h ^ h >> 13) * 0xC2B2AE35) % 2**32
    return h ^ h >> 16


def expected_bits(seed: int, position: int, token_id: int) -> int:
    """The docstring of `reference_sampling`, word for word."""
    low, high = seed % 2**32, (seed >> 32) % 2**32
    key0 = mix(position % 2**32 ^ mix(low ^ mix(high ^ 0x9E3779B9)))
    key1 = mix((position + mix(high ^ mix(low ^ 0x7F4A7C15))) % 2**32)
    return mix(mix(token_id ^ key0) ^ key1)


def sampling(rows: int, **changes: object) -> SamplingTensors:
    values: dict[str, object] = {
        "temperature": torch.ones(rows),
        "top_k": torch.zeros(rows, dtype=torch.int64),
        "top_p": torch.ones(rows),
        "min_p": torch.zeros(rows),
        "seeds": torch.arange(rows),
        "positions": torch.arange(rows) * 3,
        "all_greedy": False,
        "any_top_k": False,
        "any_top_p": False,
        "any_min_p": False,
    }
    return SamplingTensors(**(values | changes))


def test_noise_bits_equal_the_definition():
    for seed in SEEDS:
        for position in POSITIONS:
            found = noise_bits(torch.tensor([seed]), torch.tensor([position]), 50)[0].tolist()
            assert [x % 2**32 for x in found] == [expected_bits(seed, position, token) for token in range(50)]


def test_noise_bits_recorded():
    """Values that other implementations may copy into their own tests."""
    found = noise_bits(torch.tensor([42, -7]), torch.tensor([0, 1000]), 3)
    assert [[x % 2**32 for x in row] for row in found.tolist()] == RECORDED


RECORDED = [[2259081647, 1311008072, 647801869], [283405557, 1758671774, 1587906707]]


def test_noise_is_gumbel():
    noise = gumbel_noise(torch.tensor([11]), torch.tensor([5]), 1 << 20)[0].double()
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.01)
    for quantile in (0.01, 0.5, 0.99):
        assert (noise < -math.log(-math.log(quantile))).double().mean().item() == pytest.approx(quantile, abs=0.002)


def test_extreme_bits_give_finite_noise():
    for bits in (0, 2**32 - 1):
        u = torch.tensor(float((bits >> 9) + 0.5)) * 2.0**-23
        assert 0 < u.item() < 1
        assert (-(-u.log()).log()).isfinite()


def test_draws_follow_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf, 0.5])
    rows = 20_000
    for temperature in (1.0, 0.5):
        ids = ReferenceOps().sample(
            logits.expand(rows, -1),
            sampling(rows, temperature=torch.full((rows,), temperature), seeds=torch.full((rows,), 9)),
        )
        expected = (logits / temperature).softmax(0) * rows
        counts = ids.bincount(minlength=6)
        assert counts[4] == 0
        likely = expected > 0
        chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum().item()
        assert chi_square < 18.5  # the 99.9% point of 4 degrees of freedom; the draw is fixed by its seed


FILTERS = [{"temperature": 0.8}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.15}, {"top_k": 6, "top_p": 0.9}]


def check_distribution(
    counts: torch.Tensor,
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> None:
    """How often each of 12 tokens was drawn, against the softmax of what the filters leave."""
    scaled = apply_min_p(logits[None] / temperature, torch.tensor([min_p]))
    scaled = apply_top_p(apply_top_k(scaled, torch.tensor([top_k])), torch.tensor([top_p]))
    expected = scaled[0].softmax(dim=0) * counts.sum()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    assert chi_square < 31.3  # the 99.9% point of 11 degrees of freedom; the draw is fixed by its seeds


@pytest.mark.parametrize("parameters", FILTERS, ids=str)
def test_draws_follow_the_filtered_softmax(parameters):
    rows = 20_000
    logits = torch.randn(12, generator=torch.Generator().manual_seed(8)) * 1.5
    values = {name: torch.full((rows,), value) for name, value in parameters.items()}
    switches = {f"any_{name}": True for name in parameters if name != "temperature"}
    drawn = ReferenceOps().sample(
        logits.repeat(rows, 1), sampling(rows, seeds=torch.arange(rows) * 7919, **values, **switches)
    )
    check_distribution(drawn.bincount(minlength=12), logits, **parameters)


def test_a_row_does_not_depend_on_its_batch():
    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(0)) * 3
    batch = sampling(
        40,
        temperature=torch.tensor([0.0, 0.3, 1.0, 1.7]).repeat(10),
        top_k=torch.tensor([0, 1, 5, 50, 4000]).repeat(8),
        top_p=torch.tensor([1.0, 0.9, 0.2, 0.9999, 0.5, 1.0, 0.99, 0.7]).repeat(5),
        min_p=torch.tensor([0.0, 0.1]).repeat(20),
        any_top_k=True,
        any_top_p=True,
        any_min_p=True,
    )
    ops = ReferenceOps()
    together = ops.sample(logits, batch)
    for row in range(40):
        one = {
            f: getattr(batch, f)[row : row + 1]
            for f in ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
        }
        # Switched off where this row needs none of it: what others ask for must not matter.
        switches = {
            "all_greedy": bool(one["temperature"] == 0),
            "any_top_k": bool(one["top_k"] > 0),
            "any_top_p": bool(one["top_p"] < 1),
            "any_min_p": bool(one["min_p"] > 0),
        }
        assert ops.sample(logits[row : row + 1], SamplingTensors(**one, **switches)) == together[row]


def test_greedy_takes_the_smallest_id_among_equals():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [-torch.inf, -torch.inf, -5.0, -5.0], [1.0, 1.0, 1.0, 1.0]])
    mixed = sampling(3, temperature=torch.tensor([0.0, 0.0, 1.0]))
    assert ReferenceOps().sample(logits, mixed)[:2].tolist() == [1, 2]
    assert ReferenceOps().sample(logits, sampling(3, temperature=torch.zeros(3), all_greedy=True)).tolist() == [1, 2, 0]
    unsaid = sampling(3, temperature=torch.zeros(3), any_top_k=True, any_top_p=True, any_min_p=True)
    assert ReferenceOps().sample(logits, unsaid).tolist() == [1, 2, 0]


def test_masked_tokens_are_never_drawn():
    logits = torch.full((500, 8), -torch.inf)
    logits[:, 3] = -80.0
    assert set(ReferenceOps().sample(logits, sampling(500)).tolist()) == {3}


# Small integers make ties; the filters must treat equals alike.
rows_of_logits = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12)


def kept(logits: torch.Tensor) -> list[bool]:
    return (logits[0] > -torch.inf).tolist()


@given(rows_of_logits, st.integers(0, 15))
@settings(max_examples=200, deadline=None)
def test_top_k_keeps_k_and_ties(values, top_k):
    threshold = sorted(values, reverse=True)[top_k - 1] if 0 < top_k < len(values) else -math.inf
    assert kept(apply_top_k(torch.tensor([values]), torch.tensor([top_k]))) == [v >= threshold for v in values]


@given(rows_of_logits, st.floats(0.01, 1.0))
@settings(max_examples=200, deadline=None)
def test_min_p_keeps_what_is_likely_enough(values, min_p):
    found = kept(apply_min_p(torch.tensor([values]), torch.tensor([min_p])))
    for value, is_kept in zip(values, found, strict=True):
        ratio = math.exp(value - max(values))
        assert is_kept == (ratio >= min_p) or ratio == pytest.approx(min_p, rel=1e-5)


@given(rows_of_logits, st.floats(0.01, 1.0))
@settings(max_examples=200, deadline=None)
def test_top_p_keeps_the_smallest_set_and_ties(values, top_p):
    found = kept(apply_top_p(torch.tensor([values]), torch.tensor([top_p])))
    total = sum(math.exp(v) for v in values)
    for value, is_kept in zip(values, found, strict=True):
        larger = sum(math.exp(v) for v in values if v > value) / total  # a tie with a kept one is kept
        assert is_kept == (larger < top_p) or larger == pytest.approx(top_p, rel=1e-5)
    assert any(found)


def test_top_p_beyond_the_first_candidates():
    """A flat distribution needs more than the candidates sorted at first; a peaked row beside it must not notice."""
    logits = torch.stack([torch.linspace(0.0, -1e-3, 5000), torch.linspace(0.0, -500.0, 5000)])
    found = apply_top_p(logits, torch.tensor([0.5, 0.5])) > -torch.inf
    alone = apply_top_p(logits[1:], torch.tensor([0.5])) > -torch.inf
    assert abs(int(found[0].sum()) - 2500) < 10
    assert torch.equal(found[1:], alone)


def test_filters_off_leave_all():
    logits = torch.randn(2, 2000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(apply_top_k(logits, torch.tensor([0, 2000])), logits)
    assert torch.equal(apply_top_p(logits, torch.tensor([1.0, 1.0])), logits)
    assert torch.equal(apply_min_p(logits, torch.tensor([0.0, 0.0])), logits)
