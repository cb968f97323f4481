"""Speculation as the scheduler sees it: who guesses tokens, and who says how many guesses a step shall verify.

A step computes a sequence's last token and, behind it, drafts of those to come. Each row is sampled as if the drafts
before it were true, with the random numbers of its own position, so what is accepted is what would have been sampled
anyway: drafts change when tokens come, never which. Nothing here knows blocks, budgets or the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

MAX_DRAFTS = 15  # of a sequence in one step: with its last token 16 rows, one tile of a matrix kernel
MAX_STEP_DRAFTS = 32  # of all sequences in one step: it bounds the memory of the logits


class Proposal(NamedTuple):
    """Guesses of the next tokens. Those of equal `strength` are expected to come true equally often."""

    token_ids: list[int]
    strength: int


class DraftProposer(Protocol):
    """Guesses what comes after a sequence of tokens."""

    def propose(self, request_id: str, token_ids: Sequence[int], max_drafts: int) -> Proposal | None:
        """Up to `max_drafts` (at least 1) tokens. `token_ids` is what it was at the last call, or longer."""
        ...

    def forget(self, request_id: str) -> None:
        """The request is over. Ids never seen are ignored."""
        ...


class DraftCandidate(NamedTuple):
    """A sequence that may have drafts in this step."""

    request_id: str
    token_ids: Sequence[int]
    max_drafts: int


class Drafter(Protocol):
    """Chooses the drafts of a step; told after it how long the step took."""

    def wants_drafts(self, num_seqs: int, num_tokens: int) -> bool:
        """Whether to ask for drafts in a step that computes `num_tokens` of `num_seqs` sequences without them.
        Called once a step: a no is all that speculation costs."""
        ...

    def draft(self, candidates: Sequence[DraftCandidate], max_drafts: int) -> dict[str, list[int]]:
        """Drafts, at most `max_drafts` in all and at least one for each request named."""
        ...

    def observe(self, num_seqs: int, num_tokens: int, num_drafts: int, duration_s: float) -> None:
        """A step computed `num_tokens` of `num_seqs` sequences, `num_drafts` of them drafts."""
        ...

    def forget(self, request_id: str) -> None:
        """The request is over. Ids never seen are ignored."""
        ...


class FixedDrafter:
    """As many drafts as the proposer finds, up to `num_drafts` a sequence, in every step: whether it pays or not."""

    def __init__(self, proposer: DraftProposer, num_drafts: int) -> None:
        assert 0 < num_drafts <= MAX_DRAFTS
        self._proposer = proposer
        self._num_drafts = num_drafts

    def wants_drafts(self, num_seqs: int, num_tokens: int) -> bool:
        return True

    def draft(self, candidates: Sequence[DraftCandidate], max_drafts: int) -> dict[str, list[int]]:
        drafts = {}
        for request_id, token_ids, most in candidates:
            num_drafts = min(most, max_drafts, self._num_drafts)
            if not num_drafts:
                continue
            if (proposal := self._proposer.propose(request_id, token_ids, num_drafts)) is not None:
                drafts[request_id] = proposal.token_ids
                max_drafts -= len(proposal.token_ids)
        return drafts

    def observe(self, num_seqs: int, num_tokens: int, num_drafts: int, duration_s: float) -> None:
        """A fixed number learns nothing."""

    def forget(self, request_id: str) -> None:
        self._proposer.forget(request_id)
