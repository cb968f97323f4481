"""Makes prompts of a wanted number of tokens, with a shared prefix if asked. Knows no tokenizer: it asks the server.

A prompt is "The" and common words after it. In any tokenizer that splits at spaces the count of such a text is the
sum over its words, so it is enough to find, once, words that are one token each, and what "The" alone comes to
(template and special tokens included). Where a server has no `/tokenize` one token a word is assumed; the report shows
the length that the server counted, in any case.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from llmserve.errors import ConfigError
from llmserve.tools.openai_client import Endpoint, OpenAIClient

FIRST_WORD = "The"
_WORD_LIST = """
    time year people way day man thing woman life child world school state family student group country problem hand
    part place case week company system program question work government number night point home water room mother
    area money story fact month lot right study book eye job word business issue side kind head house service friend
    father power hour game line end member law car city community name president team minute idea body information
    back parent face others level office door health person art war history party result change morning reason
    research girl guy moment air teacher force education good new first last long great little own other old big high
    different small large next early young important few public bad same able make know take see come think look want
    give use find tell ask seem feel try leave call need become put mean keep let begin help talk turn start show hear
    play run move like live believe hold bring happen write provide sit stand lose pay meet include continue set learn
    lead understand watch follow stop create speak read allow add spend grow open walk win offer remember love
    consider appear buy wait serve send expect build stay fall cut reach remain
"""
COMMON_WORDS = tuple(_WORD_LIST.split())
_REPEATS = 4  # a word counts as one token if so many of them add as many tokens


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Words for prompts, and what they come to in tokens."""

    words: tuple[str, ...]
    base_tokens: int  # tokens of a prompt that is FIRST_WORD alone
    exact: bool  # each word was seen to be one token; otherwise one token a word is an assumption

    def num_words(self, num_tokens: int) -> int:
        """Words after the first one, for a prompt of `num_tokens`; a template can alone be longer than that."""
        return max(num_tokens - self.base_tokens, 0)


ASSUMED = Vocabulary(COMMON_WORDS, base_tokens=1, exact=False)


async def learn_vocabulary(client: OpenAIClient, endpoint: Endpoint, model: str) -> Vocabulary:
    """Finds the words that are one token each, by asking the server's `/tokenize`; ASSUMED where it has none."""
    base_tokens = await client.count_tokens(endpoint, model, FIRST_WORD)
    if base_tokens is None:
        return ASSUMED
    limit = asyncio.Semaphore(8)

    async def is_one_token(word: str) -> bool:
        async with limit:
            count = await client.count_tokens(endpoint, model, " ".join([FIRST_WORD, *[word] * _REPEATS]))
        return count == base_tokens + _REPEATS

    found = await asyncio.gather(*(is_one_token(word) for word in COMMON_WORDS))
    words = tuple(word for word, one_token in zip(COMMON_WORDS, found, strict=True) if one_token)
    if len(words) < 32:  # too few to tell prompts apart
        return Vocabulary(COMMON_WORDS, base_tokens, exact=False)
    return Vocabulary(words, base_tokens, exact=True)


class PromptFactory:
    """Draws prompts. `shared_prefix` of each is the same within one of `num_groups`, drawn alike often."""

    def __init__(
        self, vocabulary: Vocabulary, rng: random.Random, shared_prefix: float = 0.0, num_groups: int = 1
    ) -> None:
        if not 0 <= shared_prefix <= 1:
            raise ConfigError(f"--shared-prefix {shared_prefix} is not a share: give a number from 0 to 1.")
        if num_groups < 1:
            raise ConfigError(f"--prefix-groups {num_groups}: there must be at least one group.")
        self._vocabulary = vocabulary
        self._rng = rng
        self._shared_prefix = shared_prefix
        self._group_words: list[list[str]] = [[] for _ in range(num_groups)]  # grown when a longer prefix is asked for

    def make(self, num_tokens: int) -> str:
        """A prompt of `num_tokens`, or of the template's own length and one word if that is more."""
        num_words = self._vocabulary.num_words(num_tokens)
        num_shared = round(num_words * self._shared_prefix)
        words = [FIRST_WORD]
        if num_shared:
            prefix = self._rng.choice(self._group_words)
            prefix += self._draw(num_shared - len(prefix))
            words += prefix[:num_shared]
        words += self._draw(num_words - num_shared)
        return " ".join(words)

    def _draw(self, count: int) -> list[str]:
        return self._rng.choices(self._vocabulary.words, k=max(count, 0))
