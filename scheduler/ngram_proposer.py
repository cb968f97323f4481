"""Drafts by prompt lookup: what followed when the last few tokens stood here before. Knows no model and no request.

The idea is that of prompt lookup decoding (Saxena 2023; vLLM's `ngram` method): answers copy names, code and sentences
from their prompt and from themselves, and looking that up costs nothing. The index is deflate's (RFC 1951): for each
pair of tokens a chain of the places where it ended, the newest first.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from llmserve.scheduler.drafts import Proposal

MIN_NGRAM = 2  # the chains are of pairs
_MAX_INDEXED = 4096  # tokens a call takes into the index: a very long prompt is read over several steps


class _Index:
    """Where each pair of tokens of one sequence ended. Some 200 bytes a token: 1% of a small model's KV cache."""

    __slots__ = ("latest", "previous")

    def __init__(self) -> None:
        self.latest: dict[int, int] = {}  # pair -> position of its second token, where it last occurred
        self.previous = array("i", [-1])  # by position: where the pair that ends there ended before; -1: nowhere

    def extend(self, token_ids: Sequence[int]) -> bool:
        """Takes in tokens that are new; False if some are left for the next call. O(1) a token."""
        latest, previous = self.latest, self.previous
        stop = min(len(token_ids), len(previous) + _MAX_INDEXED)
        for position in range(len(previous), stop):
            pair = token_ids[position - 1] << 32 | token_ids[position]
            previous.append(latest.get(pair, -1))
            latest[pair] = position
        return stop == len(token_ids)


class NgramProposer:
    """Implements `DraftProposer`. A proposal's strength is the number of tokens that matched."""

    def __init__(self, max_ngram: int = 4, max_candidates: int = 8) -> None:
        """Of the last `max_candidates` places where the last two tokens stood before, the one with the longest match
        (up to `max_ngram` tokens; the newest of equals) is taken: a bounded search, whatever the text."""
        assert max_ngram >= MIN_NGRAM
        assert max_candidates > 0
        self._max_ngram = max_ngram
        self._max_candidates = max_candidates
        self._indexes: dict[str, _Index] = {}

    def propose(self, request_id: str, token_ids: Sequence[int], max_drafts: int) -> Proposal | None:
        index = self._indexes.get(request_id)
        if index is None:
            index = self._indexes[request_id] = _Index()
        if not index.extend(token_ids):
            return None
        at, length = self._longest_match(index.previous, token_ids)
        if not length:
            return None
        period = len(token_ids) - 1 - at
        drafts = list(token_ids[at + 1 : at + 1 + max_drafts])
        while len(drafts) < max_drafts:  # the match reaches the end: it repeats itself
            drafts.append(drafts[-period])
        return Proposal(drafts, length)

    def forget(self, request_id: str) -> None:
        self._indexes.pop(request_id, None)

    def _longest_match(self, previous: array[int], token_ids: Sequence[int]) -> tuple[int, int]:
        """(where the earlier occurrence ends, its length); a length of 0 is none."""
        last = len(token_ids) - 1
        best, best_length = -1, 0
        at = previous[last]
        for _ in range(self._max_candidates):
            if at < 0:
                break
            length = MIN_NGRAM
            while length < self._max_ngram and length <= at and token_ids[at - length] == token_ids[last - length]:
                length += 1
            if length > best_length:
                best, best_length = at, length
                if length == self._max_ngram:
                    break
            at = previous[at]
        return best, best_length
