"""The Triton sampler draws what the reference draws, by noise of the same bits."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.kernels.ops import SamplingTensors
from llmserve.kernels.reference_sampling import gumbel_noise
from llmserve.kernels.triton.noise import gumbel, noise_keys
from llmserve.kernels.triton.sampling import sample
from llmserve.kernels.triton.thresholds import MAX_CANDIDATES
from tests.kernels.adjustment_cases import random_adjustments, with_adjustments
from tests.kernels.sampling_cases import DRAWS, sampling_tensors
from tests.kernels.test_reference_sampling import FILTERS, check_distribution
from tests.kernels.triton.interpreter import KernelFault
from tests.kernels.triton.triton_cases import DEVICE, IS_INTERPRETED, REFERENCE, triton_ops

SEEDS = [0, 1, -1, 42, 2**31, 2**63 - 1, -(2**63), 0x123456789ABCDEF]
POSITIONS = [0, 1, 7, 2**31 - 1, 2**31, 8191, 2**32 + 5, 3]


def draw(logits: torch.Tensor, sampling: SamplingTensors, max_candidates: int = MAX_CANDIDATES) -> torch.Tensor:
    """On the device the tests run on."""
    values = {f.name: getattr(sampling, f.name) for f in fields(sampling)}
    moved = {name: value.to(DEVICE) for name, value in values.items() if isinstance(value, torch.Tensor)}
    return sample(logits.to(DEVICE), replace(sampling, **moved), max_candidates).cpu()


@triton.jit
def noise_kernel(seeds_ptr, positions_ptr, out_ptr, SIZE: tl.constexpr):
    row = tl.program_id(0)
    key0, key1 = noise_keys(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    token_id = tl.arange(0, SIZE)
    tl.store(out_ptr + row * SIZE + token_id, gumbel(token_id, key0, key1))


def test_noise_is_that_of_the_reference() -> None:
    """The integers bit for bit, or the logarithms would be far off."""
    seeds, positions = torch.tensor(SEEDS), torch.tensor(POSITIONS)
    out = torch.empty(len(SEEDS), 1024, device=DEVICE)
    noise_kernel[(len(SEEDS),)](seeds.to(DEVICE), positions.to(DEVICE), out, 1024)
    expected = gumbel_noise(seeds, positions, 1024)
    assert torch.allclose(out.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("parameters", DRAWS, ids=str)
def test_draws_equal_the_reference(spread: float, parameters: dict[str, float]) -> None:
    rows, vocab = 6, 5003  # two chunks
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3)) * spread
    logits[:, 100:140] = -torch.inf  # masked
    sampling = sampling_tensors(rows, **parameters)  # type: ignore[arg-type]
    assert torch.equal(draw(logits, sampling), REFERENCE.sample(logits, sampling))


@pytest.mark.parametrize("parameters", [{"top_p": 0.3}, {"top_k": 4000}, {"top_k": 300, "top_p": 0.5}], ids=str)
def test_more_candidates_than_there_is_room_for(parameters: dict[str, float]) -> None:
    """The search then runs over the row itself, and finds the same."""
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(3)) * 0.1
    sampling = sampling_tensors(2, **parameters)  # type: ignore[arg-type]
    expected = REFERENCE.sample(logits, sampling)
    assert torch.equal(draw(logits, sampling, max_candidates=64), expected)
    assert torch.equal(draw(logits, sampling), expected)


def test_the_smallest_id_wins_among_equals() -> None:
    logits = torch.zeros(3, 5000)
    logits[1, [37, 4700]], logits[2, 4999] = 2.0, 3.0
    assert draw(logits, sampling_tensors(3, 0.0)).tolist() == [0, 37, 4999]


def test_rows_mix_and_do_not_depend_on_their_neighbours() -> None:
    logits, sampling = torch.randn(4, 300) * 3, sampling_tensors(4)
    sampling.temperature[0] = 0
    sampling.top_k[1] = 5
    sampling.top_p[2] = 0.5
    sampling = replace(sampling, any_top_k=True, any_top_p=True)
    drawn = draw(logits, sampling)
    assert torch.equal(drawn, REFERENCE.sample(logits, sampling))
    assert drawn[0] == logits[0].argmax()
    for row in range(4):
        values = {f.name: getattr(sampling, f.name) for f in fields(sampling)}
        one = {name: v[row : row + 1] for name, v in values.items() if isinstance(v, torch.Tensor)}
        assert draw(logits[row : row + 1], replace(sampling, **one))[0] == drawn[row]


@pytest.mark.parametrize(
    "parameters", [{"temperature": 0.0}, {"temperature": 0.7}, {"top_k": 9, "top_p": 0.9}], ids=str
)
def test_adjustments_equal_the_reference(parameters: dict[str, float]) -> None:
    """Logits, draws and counts; a vocabulary of two chunks, no multiple of a word."""
    vocab = 4503
    made = random_adjustments(vocab)
    logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(2)) * 3
    sampling = sampling_tensors(8, **parameters)  # type: ignore[arg-type]
    results = []
    for ops, device in ((REFERENCE, torch.device("cpu")), (triton_ops(), DEVICE)):
        adjusted, drawing = logits.to(device, copy=True), with_adjustments(sampling, made, device)
        assert drawing.adjustments is not None
        token_ids = ops.sample(adjusted, drawing)
        results.append((token_ids.cpu(), adjusted.cpu(), drawing.adjustments.token_counts.cpu()))
    (ids, adjusted, counts), (expected_ids, expected, expected_counts) = results[1], results[0]
    assert torch.allclose(adjusted, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(counts, expected_counts)
    assert (counts != made.token_counts).sum() == 3  # of the slots with penalties that are used


@pytest.mark.skipif(not IS_INTERPRETED, reason="hardware does not tell")
def test_two_rows_of_one_penalised_slot_are_found_out() -> None:
    made = random_adjustments(64)
    made.slots[:2] = 2
    drawing = with_adjustments(sampling_tensors(8, temperature=0.0), made, DEVICE)
    with pytest.raises(KernelFault, match="race"):
        triton_ops().sample(torch.zeros(8, 64), drawing)


@pytest.mark.parametrize("vocab", [7, 256, 4096, 5003])
def test_logprobs_equal_the_reference(vocab: int) -> None:
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(4)) * 4
    logits[1] = logits[1].round()  # ties
    logits[2], logits[2, 3] = -torch.inf, 1.0  # one token alone
    ids, num_top = torch.tensor([0, vocab - 1, 3, vocab // 2]), min(20, vocab)
    expected = REFERENCE.token_logprobs(logits, ids, num_top)
    found = triton_ops().token_logprobs(logits.to(DEVICE), ids.to(DEVICE), num_top)
    assert torch.allclose(found.logprobs.cpu(), expected.logprobs, atol=1e-5)
    assert torch.equal(found.ranks.cpu(), expected.ranks)
    assert torch.allclose(found.top_logprobs.cpu(), expected.top_logprobs, atol=1e-5)
    taken = found.top_ids.cpu()
    assert torch.allclose(logits.log_softmax(1).gather(1, taken), expected.top_logprobs, atol=1e-5)
    for row in (0, 1, 3):
        assert len(set(taken[row].tolist())) == num_top
        in_order = sorted(range(vocab), key=lambda i, row=row: (-float(logits[row, i]), i))  # type: ignore[misc]
        assert taken[row].tolist() == in_order[:num_top]
    assert found.logprobs[2].cpu() == 0
    assert torch.equal(triton_ops().token_logprobs(logits.to(DEVICE), ids.to(DEVICE), 0).ranks.cpu(), expected.ranks)


def test_one_token_left_of_all_is_drawn() -> None:
    logits = torch.full((4, 4200), -torch.inf)
    logits[:, 4150] = -80.0
    for parameters in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5, "temperature": 0.1}):
        assert draw(logits, sampling_tensors(4, **parameters)).tolist() == [4150] * 4  # type: ignore[arg-type]


@pytest.mark.skipif(IS_INTERPRETED, reason="a program a row is too much to interpret")
@pytest.mark.parametrize("parameters", FILTERS, ids=str)
def test_draws_follow_the_filtered_softmax(parameters: dict[str, float]) -> None:
    rows = 20_000
    logits = torch.randn(12, generator=torch.Generator().manual_seed(8)) * 1.5
    sampling = replace(sampling_tensors(rows, **parameters), seeds=torch.arange(rows) * 7919)  # type: ignore[arg-type]
    found = draw(logits.repeat(rows, 1), sampling).bincount(minlength=12)
    check_distribution(found, logits, **parameters)  # type: ignore[arg-type]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_draws_of_any_row_with_any_filters(data: st.DataObject) -> None:
    """Few different logits make ties, and floors, limits and masses that fall on them."""
    rows, vocab = data.draw(st.integers(1, 3)), data.draw(st.sampled_from((1, 2, 31, 260, 4097)))
    step = data.draw(st.sampled_from((0.0, 0.25, 3.0)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randint(-9, 9, (rows, vocab), generator=generator) * step
    logits[torch.rand(rows, vocab, generator=generator) < data.draw(st.sampled_from((0.0, 0.5)))] = -torch.inf
    logits[:, 0] = 0.0  # something is left
    sampling = replace(
        sampling_tensors(rows),
        temperature=torch.tensor(
            data.draw(st.lists(st.sampled_from((0.0, 0.3, 1.0, 2.5)), min_size=rows, max_size=rows))
        ),
        top_k=torch.tensor(data.draw(st.lists(st.integers(0, vocab + 1), min_size=rows, max_size=rows))),
        top_p=torch.tensor(
            data.draw(st.lists(st.sampled_from((0.013, 0.37, 0.9173, 1.0)), min_size=rows, max_size=rows))
        ),
        min_p=torch.tensor(data.draw(st.lists(st.sampled_from((0.0, 0.07, 0.61)), min_size=rows, max_size=rows))),
        any_top_k=True,
        any_top_p=True,
        any_min_p=True,
    )
    max_candidates = data.draw(st.sampled_from((16, MAX_CANDIDATES)))
    assert torch.equal(draw(logits, sampling, max_candidates), REFERENCE.sample(logits, sampling))


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_a_row_of_nothing_gives_some_token_and_harms_nobody() -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(6))
    sampling = sampling_tensors(3, top_k=9, top_p=0.7, min_p=0.01)
    expected = draw(logits, sampling)[2]
    logits[0], logits[1] = torch.nan, -torch.inf
    drawn = draw(logits, sampling)
    assert drawn[2] == expected
    assert ((drawn >= 0) & (drawn < 300)).all()
