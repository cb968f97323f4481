"""A drafter that knows what the fake model will say, and says something else now and then."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from llmserve.scheduler.drafts import DraftCandidate
from tests.scheduler.fake_worker import VOCAB_SIZE, next_value, root_value, sample


class RandomDrafter:
    """Implements `Drafter`: any number of drafts for any of the candidates, each wrong with a chance of 1 in 4."""

    def __init__(self, source: random.Random, salts: Mapping[str, str]) -> None:
        self.live: set[str] = set()  # requests it was asked for and not told to forget
        self._source = source
        self._salts = salts

    def wants_drafts(self, num_seqs: int, num_tokens: int) -> bool:
        assert num_seqs <= num_tokens
        return self._source.random() < 0.8

    def draft(self, candidates: Sequence[DraftCandidate], max_drafts: int) -> dict[str, list[int]]:
        drafts = {}
        for request_id, token_ids, most in candidates:
            assert most > 0
            self.live.add(request_id)
            num_drafts = self._source.randint(0, min(most, max_drafts, 7))
            if num_drafts:
                drafts[request_id] = self._guess(root_value(self._salts[request_id]), token_ids, num_drafts)
                max_drafts -= num_drafts
        return drafts

    def observe(self, num_seqs: int, num_tokens: int, num_drafts: int, duration_s: float) -> None:
        """It does not care."""

    def forget(self, request_id: str) -> None:
        self.live.discard(request_id)

    def _guess(self, value: int, token_ids: Sequence[int], num_drafts: int) -> list[int]:
        for token_id in token_ids:
            value = next_value(value, token_id)
        drafts = []
        for _ in range(num_drafts):
            wrong = self._source.random() < 0.25
            drafts.append((sample(value) + wrong) % VOCAB_SIZE)
            value = next_value(value, drafts[-1])
        return drafts
