"""What a request's parameters do to its logits: each against its formula, written out plainly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmserve.kernels.ops import MAX_COUNT, MAX_ENTRIES
from llmserve.kernels.reference_adjustments import adjust_logits
from llmserve.messages import SamplingParams
from llmserve.worker.logits_processors import AdjustmentTables, bad_sequences, table_bytes

VOCAB = 50
CPU = torch.device("cpu")
ROW = 2


def tables() -> AdjustmentTables:
    return AdjustmentTables(4, VOCAB, CPU)


def params(**values: object) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 10, "seed": 0} | values))  # type: ignore[arg-type]


def tokens(ids: list[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def process(logits: torch.Tensor, prompt: list[int], output: list[int], **values: object) -> torch.Tensor:
    """The logits as they are drawn from, for a request that enters with this output."""
    made, wanted = tables(), params(**values)
    made.enter(ROW, wanted, tokens(prompt), tokens(output))
    processed = logits.clone()
    if bad_words := bad_sequences(wanted):
        bad_words.apply(processed, tokens(output))
    position = torch.tensor([len(prompt) + len(output)])
    adjust_logits(processed[None], position, made.of(torch.tensor([ROW])))
    return processed


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 3


def test_a_plain_request_uses_nothing_even_in_a_row_that_was_used() -> None:
    made = tables()
    made.enter(ROW, params(presence_penalty=1.0, logit_bias={3: 4.0}), tokens([1]), tokens([]))
    assert made.are_used(np.array([0, ROW]))
    assert not made.are_used(np.array([0, 1]))
    made.enter(ROW, params(temperature=0.7, top_k=5), tokens([1]), tokens([3]))
    assert not made.are_used(np.array([0, ROW]))
    logits = torch.randn(1, VOCAB)
    before = logits.clone()
    adjust_logits(logits, torch.tensor([1]), made.of(torch.tensor([ROW])))
    assert torch.equal(logits, before)


def test_a_row_forgets_who_had_it(logits: torch.Tensor) -> None:
    made = tables()
    allowed = {"allowed_token_ids": [3], "logit_bias": {5: 1.0, 6: 2.0}, "presence_penalty": 1.0}
    made.enter(ROW, params(**allowed), tokens([1, 2]), tokens([7]))
    made.enter(ROW, params(logit_bias={4: 1.0}), tokens([1]), tokens([]))
    processed = logits.clone()
    adjust_logits(processed[None], torch.tensor([1]), made.of(torch.tensor([ROW])))
    assert (processed != logits).nonzero().flatten().tolist() == [4]


def test_only_allowed_tokens_are_left(logits: torch.Tensor) -> None:
    processed = process(logits, [1], [], allowed_token_ids=[3, 7, 31, 32, 49])
    assert torch.isfinite(processed).nonzero().flatten().tolist() == [3, 7, 31, 32, 49]
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
    processed = process(logits, [1], [], logit_bias={8: -100.0, 3: 5.0})
    assert processed[3] == logits[3] + 5
    assert processed[8] == logits[8] - 100
    assert torch.equal(processed[9:], logits[9:])


def test_a_bias_does_not_bring_a_banned_token_back(logits: torch.Tensor) -> None:
    processed = process(logits, [1], [], logit_bias={4: 100.0}, bad_words=[[4]])
    assert processed[4].isneginf()


def test_penalties_follow_their_definitions(logits: torch.Tensor) -> None:
    prompt, output = [3, 4, 4], [10, 10, 3, 11]
    for length in range(5):
        seen = output[:length]
        expected = logits.clone()
        for token in set(prompt) | set(seen):
            expected[token] = logits[token] / 1.5 if logits[token] > 0 else logits[token] * 1.5
        for token in set(seen):
            expected[token] -= 0.25 * seen.count(token) + 0.5
        penalties = {"repetition_penalty": 1.5, "frequency_penalty": 0.25, "presence_penalty": 0.5}
        torch.testing.assert_close(process(logits, prompt, seen, **penalties), expected)


def test_counts_do_not_overflow(logits: torch.Tensor) -> None:
    processed = process(logits, [1], [7] * 40000, frequency_penalty=0.01)
    assert processed[7] == pytest.approx(float(logits[7]) - 0.01 * MAX_COUNT)


def test_memory_is_what_was_planned() -> None:
    made = vars(tables())["_tables"]
    held = [getattr(made, name) for name in made.__slots__]
    assert sum(tensor.nbytes for tensor in held) == table_bytes(4, VOCAB)


def test_there_is_room_for_all_a_request_may_name() -> None:
    """`ApiSettings` bounds them: biases, bad words in two spellings, and stop tokens beside the model's own."""
    from llmserve.api.settings import ApiSettings

    settings = ApiSettings()
    most = settings.max_logit_bias + 2 * settings.max_bad_words + settings.max_stop_token_ids
    assert most + 128 <= MAX_ENTRIES
