"""Drafts change when tokens come, never which: with and without them, answers are equal to the last bit.

Most drafts here are made from the answer that is known, with errors strewn in, so that runs of every length are
accepted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmserve.messages import EngineRequest, FinishReason
from llmserve.scheduler.adaptive_drafter import AdaptiveDrafter
from llmserve.scheduler.drafts import MAX_DRAFTS, FixedDrafter, Proposal
from llmserve.scheduler.ngram_proposer import NgramProposer

MAX_TOKENS = 60
MakeEngine = Callable[..., Any]
MakeRequest = Callable[..., EngineRequest]

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.0, "seed": 1234},
    "filtered": {"temperature": 0.8, "seed": 99, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "biased": {"temperature": 0.7, "seed": 3, "logit_bias": {5: 4.0, 6: 4.0}, "min_tokens": 10, "stop_token_ids": [2]},
}


class KnowingProposer:
    """Drafts from answers that are known (by the prompt they begin with), one in `num_right` of them wrong."""

    def __init__(self, num_right: int = 4) -> None:
        self._sequences: list[list[int]] = []
        self._num_right = num_right
        self._source = random.Random(5)

    def know(self, prompt: list[int], answer: list[int]) -> None:
        self._sequences.append(prompt + answer)

    def propose(self, request_id: str, token_ids: Sequence[int], max_drafts: int) -> Proposal | None:
        for sequence in self._sequences:
            if sequence[: len(token_ids)] == token_ids:
                drafts = sequence[len(token_ids) : len(token_ids) + max_drafts]
                wrong = [token_id if self._source.randrange(self._num_right) else token_id ^ 1 for token_id in drafts]
                return Proposal(wrong, 1) if wrong else None
        return None

    def forget(self, request_id: str) -> None:
        """It knows answers, not requests."""


def prompts(count: int) -> list[list[int]]:
    """Half random, half made of a phrase that is repeated."""
    source = random.Random(3)
    made = []
    for index in range(count):
        size = source.randint(20, 110)
        tokens = [source.randrange(3, 320) for _ in range(size if index % 2 else 9)]
        made.append((tokens * size)[:size])
    return made


def same(ours: Any, expected: Any) -> bool:
    """Tokens, log-probabilities to the bit, and the end."""
    return (ours.token_ids, ours.logprobs, ours.finish_reason, ours.prompt_logprobs) == (
        expected.token_ids,
        expected.logprobs,
        expected.finish_reason,
        expected.prompt_logprobs,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_alone_among_strangers_chunked_warm_and_preempted(
    tiny_llama: Path, make_engine: MakeEngine, make_request: MakeRequest, sampling: str, dtype: str
) -> None:
    prompt = prompts(1)[0]

    def subject() -> EngineRequest:
        return make_request(prompt, MAX_TOKENS, logprobs=3, **SAMPLING[sampling])

    def strangers() -> list[EngineRequest]:
        return [make_request(p, 40, temperature=i % 2, seed=i) for i, p in enumerate(prompts(15))]

    def answer(engine: Any, *others: EngineRequest) -> Any:
        request = subject()
        found = engine.run(*others[:7], request, *others[7:])[request.request_id]
        assert engine.num_draft_tokens > engine.num_accepted_tokens > 0
        return found

    plain_engine = make_engine(tiny_llama, dtype)
    proposer = KnowingProposer()
    request = subject()
    expected = plain_engine.run(request)[request.request_id]
    proposer.know(prompt, expected.token_ids)
    for stranger in strangers():
        found = plain_engine.run(stranger)[stranger.request_id]
        proposer.know(stranger.prompt_token_ids, found.token_ids)

    drafter = FixedDrafter(proposer, 5)
    engine = make_engine(tiny_llama, dtype, drafter=drafter)
    assert same(answer(engine), expected)
    warm = answer(engine)
    assert warm.num_cached_tokens > 0
    assert same(warm, expected)
    assert same(answer(make_engine(tiny_llama, dtype, drafter=drafter), *strangers()), expected)
    assert same(answer(make_engine(tiny_llama, dtype, max_chunk=7, drafter=drafter)), expected)
    mixed = make_engine(tiny_llama, dtype, max_chunk=7, budget=64, drafter=drafter)
    assert same(answer(mixed, *strangers()), expected)
    tight = make_engine(tiny_llama, dtype, num_blocks=24, max_num_seqs=16, drafter=drafter)
    assert same(answer(tight, *strangers()), expected)


def test_a_request_that_is_preempted_between_drafts_says_the_same(
    tiny_llama: Path, make_engine: MakeEngine, make_request: MakeRequest
) -> None:
    requests = [make_request(p[:30], 90, temperature=0.5, seed=i, logprobs=1) for i, p in enumerate(prompts(6))]
    plain = make_engine(tiny_llama).run(*requests)
    proposer = KnowingProposer(num_right=20)
    for request in requests:
        proposer.know(request.prompt_token_ids, plain[request.request_id].token_ids)
    engine = make_engine(tiny_llama, num_blocks=28, drafter=FixedDrafter(proposer, 7))
    drafted = engine.run(*requests)
    assert sum(answer.num_preemptions for answer in drafted.values()) >= 2
    assert engine.num_accepted_tokens > 100
    assert all(same(drafted[request_id], answer) for request_id, answer in plain.items())
    assert engine.cache.num_free_blocks == engine.cache.num_blocks


@pytest.mark.parametrize("max_num_tokens", range(1, 20))
def test_every_end_inside_an_accepted_run(
    tiny_llama: Path, make_engine: MakeEngine, make_request: MakeRequest, max_num_tokens: int
) -> None:
    """`max_tokens` cuts a run at every place, and so does a stop token; drafts are all right here."""
    prompt = prompts(2)[1]
    plain = make_engine(tiny_llama)
    whole = next(iter(plain.run(make_request(prompt, 24, temperature=1.0, logprobs=0)).values()))
    proposer = KnowingProposer(num_right=10**9)
    proposer.know(prompt, whole.token_ids)
    engine = make_engine(tiny_llama, drafter=FixedDrafter(proposer, MAX_DRAFTS))
    cut = next(iter(engine.run(make_request(prompt, max_num_tokens, temperature=1.0, logprobs=0)).values()))
    assert cut.token_ids == whole.token_ids[:max_num_tokens]
    assert cut.logprobs == whole.logprobs[:max_num_tokens]
    assert cut.finish_reason is FinishReason.LENGTH

    stop = whole.token_ids[max_num_tokens]
    request = make_request(prompt, 24, temperature=1.0, logprobs=0, stop_token_ids=[stop])
    stopped = next(iter(engine.run(request).values()))
    end = whole.token_ids.index(stop) + 1
    assert stopped.token_ids == whole.token_ids[:end]
    assert stopped.logprobs == whole.logprobs[:end]
    assert stopped.finish_reason is FinishReason.STOP
    assert engine.num_accepted_tokens > 0
    # What the cache now holds of prompt and answer is what was verified: an answer that starts from it goes on so.
    known = prompt + whole.token_ids[: end - 1]
    follow = make_request(known, 24 - end, temperature=1.0, logprobs=0)
    assert same(next(iter(engine.run(follow).values())), next(iter(plain.run(follow).values())))


def test_requests_whose_penalties_look_back_get_no_drafts(
    tiny_llama: Path, make_engine: MakeEngine, make_request: MakeRequest
) -> None:
    prompt = [7, 8, 9] * 12
    looks_back: list[dict[str, Any]] = [
        {"repetition_penalty": 1.2},
        {"frequency_penalty": 0.3},
        {"presence_penalty": 0.3},
        {"bad_words": [[5, 6]]},
        {"min_tokens": 20, "stop_token_ids": [2]},
    ]
    for params in looks_back:
        engine = make_engine(tiny_llama, drafter=FixedDrafter(NgramProposer(), 5))
        drafted = engine.run(make_request(prompt, 20, **params))
        plain = make_engine(tiny_llama).run(make_request(prompt, 20, **params))
        assert engine.num_draft_tokens == 0
        assert same(next(iter(drafted.values())), next(iter(plain.values())))


@pytest.mark.parametrize("drafter", [FixedDrafter(NgramProposer(), 5), AdaptiveDrafter(NgramProposer())])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_prompt_lookup_finds_what_is_said_again(
    tiny_llama: Path, make_engine: MakeEngine, make_request: MakeRequest, drafter: Any, temperature: float
) -> None:
    """With three words in its vocabulary a model repeats itself."""
    params = {"logprobs": 0, "prompt_logprobs": 0, "allowed_token_ids": [5, 6, 7], "temperature": temperature}
    requests = [make_request(p, 150, **params) for p in prompts(4)]
    plain = make_engine(tiny_llama).run(*requests)
    engine = make_engine(tiny_llama, drafter=drafter)
    drafted = engine.run(*requests)
    if isinstance(drafter, FixedDrafter):  # the other one may find that it does not pay
        assert engine.num_accepted_tokens > 100
    assert all(same(drafted[request_id], answer) for request_id, answer in plain.items())
