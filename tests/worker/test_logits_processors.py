"""Each processor against its formula, written out plainly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmserve.messages import SamplingParams
from llmserve.worker.logits_processors import build_processors

VOCAB = 50
CPU = torch.device("cpu")
NONE = np.empty(0, dtype=np.int32)


def process(logits: torch.Tensor, prompt: list[int], output: list[int], **params: object) -> torch.Tensor:
    """The logits after all processors of a request with these parameters."""
    values = {"max_tokens": 10, "seed": 0} | params
    processed = logits.clone()
    for processor in build_processors(SamplingParams(**values), VOCAB, CPU):  # type: ignore[arg-type]
        processor.apply(processed, np.array(prompt, dtype=np.int32), np.array(output, dtype=np.int32))
    return processed


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 3


def test_a_plain_request_has_none() -> None:
    assert build_processors(SamplingParams(max_tokens=5, seed=1, temperature=0.7, top_k=5), VOCAB, CPU) == []


def test_only_allowed_tokens_are_left(logits: torch.Tensor) -> None:
    processed = process(logits, [1], [], allowed_token_ids=[3, 7])
    assert torch.isfinite(processed).nonzero().flatten().tolist() == [3, 7]
    assert torch.equal(processed[[3, 7]], logits[[3, 7]])


@pytest.mark.parametrize(("num_output", "masked"), [(0, True), (2, True), (3, False)])
def test_nothing_ends_before_min_tokens(logits: torch.Tensor, num_output: int, masked: bool) -> None:
    processed = process(logits, [1], [9] * num_output, min_tokens=3, stop_token_ids=[2, 5])
    assert torch.isneginf(processed[[2, 5]]).all() == masked


@pytest.mark.parametrize(
    ("output", "banned"), [([], {4}), ([7], {4}), ([7, 8], {4, 9}), ([8], {4}), ([7, 8, 1], {4}), ([1, 7, 8], {4, 9})]
)
def test_a_bad_words_last_token_is_banned_where_it_would_complete_it(
    logits: torch.Tensor, output: list[int], banned: set[int]
) -> None:
    processed = process(logits, [7, 8], output, bad_words=[[7, 8, 9], [4]])
    assert set(torch.isneginf(processed).nonzero().flatten().tolist()) == banned


def test_logit_bias_is_added(logits: torch.Tensor) -> None:
    processed = process(logits, [1], [], logit_bias={3: 5.0, 8: -100.0})
    assert processed[3] == logits[3] + 5
    assert processed[8] == logits[8] - 100
    assert torch.equal(processed[9:], logits[9:])


def test_penalties_follow_their_definitions_as_the_output_grows(logits: torch.Tensor) -> None:
    params = SamplingParams(max_tokens=9, seed=0, repetition_penalty=1.5, frequency_penalty=0.25, presence_penalty=0.5)
    processors = build_processors(params, VOCAB, CPU)
    prompt = [3, 4, 4]
    output = [10, 10, 3, 11]
    for length in (0, 1, 3, 4):  # a step may bring several tokens
        seen = output[:length]
        expected = logits.clone()
        for token in set(prompt) | set(seen):
            expected[token] = logits[token] / 1.5 if logits[token] > 0 else logits[token] * 1.5
        for token in set(seen):
            expected[token] -= 0.25 * seen.count(token) + 0.5
        actual = logits.clone()
        for processor in processors:
            processor.apply(actual, np.array(prompt, dtype=np.int32), np.array(seen, dtype=np.int32))
        torch.testing.assert_close(actual, expected)


def test_a_recomputed_request_starts_its_counts_anew(logits: torch.Tensor) -> None:
    """A worker may meet a request with output already there."""
    fresh = process(logits, [3], [10, 10], frequency_penalty=1.0)
    assert fresh[10] == logits[10] - 2
