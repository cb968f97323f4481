"""What quantised weights may cost: bounds on perplexity and top-1 agreement over real prose, against bfloat16.

The figures over ten times the text are in `benchmarks/bench_quality.py`; bounds leave room for another CPython's text.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bench_quality import VARIANTS, Score, read_windows, score
from llmserve.kernels.cpu.build import find_compiler

NUM_TOKENS = 2048
pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")


@pytest.fixture(scope="module")
def windows(smollm2_path: Path) -> list[list[int]]:
    return read_windows(smollm2_path, NUM_TOKENS)


@pytest.fixture(scope="module")
def bfloat16(smollm2_path: Path, windows: list[list[int]]) -> Score:
    [variant] = [variant for variant in VARIANTS if variant.name == "bf16"]
    found = score(variant, smollm2_path, windows, num_threads=1)
    assert len(found.logprobs) > 0.99 * NUM_TOKENS
    assert 5 < found.perplexity < 40  # it reads English, not noise
    return found


@pytest.mark.parametrize(
    ("name", "most_perplexity", "least_agreement"), [("q8_0", 1.01, 0.93), ("q4_1", 1.01, 0.945), ("int8", 1.06, 0.84)]
)
def test_quantised_weights_say_nearly_the_same(
    smollm2_path: Path,
    windows: list[list[int]],
    bfloat16: Score,
    name: str,
    most_perplexity: float,
    least_agreement: float,
) -> None:
    [variant] = [variant for variant in VARIANTS if variant.name == name]
    found = score(variant, smollm2_path, windows, num_threads=1)
    assert found.weight_bytes < 0.65 * bfloat16.weight_bytes
    assert found.perplexity < most_perplexity * bfloat16.perplexity
    assert found.agreement(bfloat16) > least_agreement
