"""The C sampler draws what the reference draws."""

from __future__ import annotations

import pytest
import torch

from llmserve.kernels.ops import SamplingTensors
from llmserve.kernels.reference import ReferenceOps
from tests.kernels.cpu_cases import ISA_NAMES, cpu_ops, needs_compiler
from tests.kernels.sampling_cases import DRAWS, sampling_tensors

pytestmark = needs_compiler
REFERENCE = ReferenceOps()


@pytest.mark.parametrize("isa", ISA_NAMES)
@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("parameters", DRAWS, ids=str)
def test_draws_equal_the_reference(isa: str, spread: float, parameters: dict[str, float]) -> None:
    rows, vocab = 24, 5003
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3)) * spread
    logits[:, 100:140] = -torch.inf  # masked
    sampling = sampling_tensors(rows, **parameters)  # type: ignore[arg-type]
    assert torch.equal(cpu_ops(isa).sample(logits, sampling), REFERENCE.sample(logits, sampling))


@pytest.mark.parametrize("isa", ISA_NAMES)
def test_the_smallest_id_wins_among_equals(isa: str) -> None:
    logits = torch.zeros(3, 100)
    logits[1, [37, 70]], logits[2, 99] = 2.0, 3.0
    assert cpu_ops(isa).sample(logits, sampling_tensors(3, 0.0)).tolist() == [0, 37, 99]


def test_rows_mix_greedy_and_drawn() -> None:
    logits, sampling = torch.randn(4, 300), sampling_tensors(4)
    sampling.temperature[[0, 2]] = 0
    drawn = cpu_ops(ISA_NAMES[0]).sample(logits, sampling)
    assert torch.equal(drawn, REFERENCE.sample(logits, sampling))
    assert drawn[[0, 2]].tolist() == logits[[0, 2]].argmax(dim=1).tolist()
    for row in range(4):  # a draw does not depend on its neighbours
        alone = SamplingTensors(
            temperature=sampling.temperature[row : row + 1],
            top_k=sampling.top_k[row : row + 1],
            top_p=sampling.top_p[row : row + 1],
            min_p=sampling.min_p[row : row + 1],
            seeds=sampling.seeds[row : row + 1],
            positions=sampling.positions[row : row + 1],
            all_greedy=False,
            any_top_k=False,
            any_top_p=False,
            any_min_p=False,
        )
        assert cpu_ops(ISA_NAMES[0]).sample(logits[row : row + 1], alone)[0] == drawn[row]
