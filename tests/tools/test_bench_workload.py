"""Lengths, arrivals and prompts: their distributions, their forms on the command line, their reproducibility."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import statistics
from typing import Any

import pytest

from llmserve.errors import ConfigError
from llmserve.tools.bench.prompts import ASSUMED, COMMON_WORDS, PromptFactory, Vocabulary, learn_vocabulary
from llmserve.tools.bench.workload import Fixed, Uniform, arrival_times, parse_lengths
from llmserve.tools.openai_client import OpenAIClient


def draw(text: str, count: int = 20_000) -> list[int]:
    distribution = parse_lengths(text, "--prompt-len")
    rng = random.Random(7)
    return [distribution.sample(rng) for _ in range(count)]


def test_fixed_and_uniform() -> None:
    assert parse_lengths("128", "-") == Fixed(128)
    assert parse_lengths("64:192", "-") == Uniform(64, 192)
    assert set(draw("128", 10)) == {128}
    assert set(draw("3:6")) == {3, 4, 5, 6}
    assert draw("5:5", 3) == [5, 5, 5]


@pytest.mark.parametrize("name", ["normal", "lognormal"])
def test_bells_have_the_mean_and_deviation_they_say(name: str) -> None:
    lengths = draw(f"{name}:200,40")
    assert statistics.mean(lengths) == pytest.approx(200, rel=0.01)
    assert statistics.stdev(lengths) == pytest.approx(40, rel=0.03)
    skew = statistics.mean(((length - 200) / 40) ** 3 for length in lengths)
    assert skew == pytest.approx(0.0 if name == "normal" else 0.6, abs=0.12)  # lognormal: 3v + v^3, v = 40 / 200
    clipped = draw(f"{name}:200,40,190,210")
    assert (min(clipped), max(clipped)) == (190, 210)
    assert min(draw(f"{name}:1.2,5")) == 1
    assert set(draw(f"{name}:50,0", 5)) == {50}


NO_LENGTHS = (
    "|x|0|-3|1.5|0:5|9:5|5:|:5|1:2:3|normal:|normal:5|normal:5,1,9|normal:5,1,9,3|normal:5,1,0,9|lognormal:0,1"
    "|lognormal:5,-1|normal:nan,1|normal:inf,1|gauss:1,2"
)


@pytest.mark.parametrize("bad", NO_LENGTHS.split("|"))
def test_lengths_that_are_none(bad: str) -> None:
    with pytest.raises(ConfigError, match="--output-len"):
        parse_lengths(bad, "--output-len")


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5), (math.inf, 0.0)])
def test_arrivals_have_the_rate_and_the_variation_asked_for(burstiness: float, variation: float) -> None:
    times = list(itertools.islice(arrival_times(5.0, burstiness, random.Random(3)), 20_001))
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] == 0.0
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) / 0.2 == pytest.approx(variation, rel=0.07, abs=1e-6)


def test_a_poisson_process_has_exponential_gaps() -> None:
    times = list(itertools.islice(arrival_times(1.0, 1.0, random.Random(5)), 20_001))
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert sum(gap > 1 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.01)
    assert sum(gap > 2 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-2), abs=0.01)


def make(num: int, lengths: list[int], seed: int = 0, shared: float = 0.0, groups: int = 1) -> list[str]:
    factory = PromptFactory(ASSUMED, random.Random(seed), shared, groups)
    return [factory.make(length) for _, length in zip(range(num), itertools.cycle(lengths), strict=False)]


def test_prompts_have_their_length_and_differ() -> None:
    prompts = make(50, [1, 2, 64, 300])
    assert [len(prompt.split()) for prompt in prompts[:4]] == [1, 2, 64, 300]
    long_prompts = prompts[2::4]
    assert len(set(long_prompts)) == len(long_prompts)
    assert len({tuple(prompt.split()[:5]) for prompt in long_prompts}) == len(long_prompts)
    assert make(5, [64]) == make(5, [64])
    assert make(5, [64]) != make(5, [64], seed=1)


@pytest.mark.parametrize("groups", [1, 3])
def test_shared_prefixes_are_shared_in_groups_and_no_further(groups: int) -> None:
    prompts = [prompt.split()[1:] for prompt in make(60, [101], shared=0.7, groups=groups)]
    assert len({tuple(words[:70]) for words in prompts}) == groups
    assert len({tuple(words[:75]) for words in prompts}) == 60
    assert all(len(words) == 100 for words in prompts)


def test_a_shorter_prompt_shares_the_start_of_the_same_prefix() -> None:
    short, long, again = (prompt.split() for prompt in make(3, [41, 81, 41], shared=1.0))
    assert long[:41] == short == again


def test_a_prompt_shorter_than_the_template_is_one_word() -> None:
    factory = PromptFactory(Vocabulary(COMMON_WORDS, base_tokens=30, exact=True), random.Random(0))
    assert factory.make(10) == "The"
    assert len(factory.make(40).split()) == 11


@pytest.mark.parametrize(("share", "groups"), [(-0.1, 1), (1.1, 1), (math.nan, 1), (0.5, 0)])
def test_shares_that_are_none(share: float, groups: int) -> None:
    with pytest.raises(ConfigError, match="--"):
        PromptFactory(ASSUMED, random.Random(0), share, groups)


def fake_tokenizer(text: str, is_chat: bool) -> int:
    """Long words are two tokens; a chat has a template of twelve; a completion has one special token."""
    return sum(1 + (len(word) > 6) for word in text.split()) + (12 if is_chat else 1)


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_prompts_are_exact_where_the_server_counts(fake_server: Any, endpoint: Any) -> None:
    fake_server.count_tokens = fake_tokenizer
    client = OpenAIClient(fake_server.url)
    vocabulary = asyncio.run(learn_vocabulary(client, endpoint, "m"))
    assert vocabulary.exact
    assert set(vocabulary.words) == {word for word in COMMON_WORDS if len(word) <= 6}
    factory = PromptFactory(vocabulary, random.Random(0))
    for length in (14, 50, 333):
        assert fake_tokenizer(factory.make(length), endpoint == "chat") == length


def test_lengths_are_estimated_where_the_server_does_not_count(fake_server: Any) -> None:
    assert asyncio.run(learn_vocabulary(OpenAIClient(fake_server.url), "chat", "m")) == ASSUMED


def test_lengths_are_estimated_where_no_word_is_one_token(fake_server: Any) -> None:
    fake_server.count_tokens = lambda text, is_chat: len(text)
    vocabulary = asyncio.run(learn_vocabulary(OpenAIClient(fake_server.url), "chat", "m"))
    assert (vocabulary.words, vocabulary.base_tokens, vocabulary.exact) == (COMMON_WORDS, 3, False)
