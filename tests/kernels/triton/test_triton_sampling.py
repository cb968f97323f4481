"""The Triton sampler draws what the reference draws, by noise of the same bits."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
import triton
import triton.language as tl

from llmserve.kernels.ops import SamplingTensors
from llmserve.kernels.reference_sampling import gumbel_noise
from llmserve.kernels.triton.noise import gumbel, noise_keys
from llmserve.kernels.triton.sampling import sample
from tests.kernels.sampling_cases import DRAWS
from tests.kernels.triton.triton_cases import DEVICE, REFERENCE

SEEDS = [0, 1, -1, 42, 2**31, 2**63 - 1, -(2**63), 0x123456789ABCDEF]
POSITIONS = [0, 1, 7, 2**31 - 1, 2**31, 8191, 2**32 + 5, 3]


def sampling_tensors(
    rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> SamplingTensors:
    return SamplingTensors(
        temperature=torch.full((rows,), temperature),
        top_k=torch.full((rows,), top_k),
        top_p=torch.full((rows,), top_p),
        min_p=torch.full((rows,), min_p),
        seeds=torch.arange(rows) * 0x1_2345_6789 - 40,
        positions=torch.arange(rows) * 3,
        all_greedy=temperature == 0,
        any_top_k=top_k > 0,
        any_top_p=top_p < 1,
        any_min_p=min_p > 0,
    )


def draw(logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
    """On the device the tests run on."""
    values = {f.name: getattr(sampling, f.name) for f in fields(sampling)}
    moved = {name: value.to(DEVICE) for name, value in values.items() if isinstance(value, torch.Tensor)}
    return sample(logits.to(DEVICE), replace(sampling, **moved)).cpu()


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


@pytest.mark.parametrize("parameters", [{"top_p": 0.3}, {"top_k": 8500}], ids=str)
def test_more_candidates_than_there_is_room_for(parameters: dict[str, float]) -> None:
    """The search then runs over the row itself."""
    logits = torch.randn(2, 9000, generator=torch.Generator().manual_seed(3)) * 0.01
    sampling = sampling_tensors(2, **parameters)  # type: ignore[arg-type]
    assert torch.equal(draw(logits, sampling), REFERENCE.sample(logits, sampling))


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
