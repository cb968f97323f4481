"""Scheduling a step ahead of the tokens: what stands in for those that are still being drawn. Knows no device.

While step k runs, step k + 1 is scheduled. What k draws is not known then, only for whom: so a PENDING token stands at
the end of each such request, and the scheduler, which counts tokens, goes on as ever. It reads tokens to hash blocks
that are full of computed tokens, and a PENDING token is computed in the step being scheduled, at the earliest: it never
reads one. Drafts are guessed from the tokens themselves. A step that may have drafts waits for them, and so does the
one behind it, because what it computes depends on how many drafts came true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llmserve.messages import SequenceOutput
from llmserve.scheduler.drafts import DraftCandidate, Drafter
from llmserve.scheduler.output import SchedulerOutput
from llmserve.scheduler.request import PENDING, Request
from llmserve.scheduler.scheduler import Scheduler

_LONGEST_WAIT = 31  # steps ahead of the tokens, between two that wait to see whether drafts can be guessed


class _Promise(NamedTuple):
    """What a step in flight will bring."""

    drawing: list[Request]  # each gets a token
    pending: list[Request]  # of them, those behind which a PENDING one stands


class TokensInFlight:
    """Puts PENDING tokens behind requests, and takes them away when the real ones come, in the order of the steps."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._promises: list[_Promise] = []

    def promise(self, output: SchedulerOutput) -> None:
        """A step has been scheduled and will run. A request that its token is sure to end gets no PENDING one: so
        nothing more is scheduled for it."""
        drawing = self._scheduler.complete_requests(output)
        pending = [request for request in drawing if len(request.token_ids) + 1 < request.max_num_tokens]
        for request in pending:
            request.token_ids.append(PENDING)
        self._promises.append(_Promise(drawing, pending))

    def settle(self, output: SchedulerOutput, sampled: Mapping[str, list[int]]) -> list[SequenceOutput]:
        """`Scheduler.update` for the oldest step in flight, the tokens of later ones put aside meanwhile. Who ended
        since gets nothing, nor does another request that has taken its id."""
        drawing, pending = self._promises.pop(0)
        ahead = [request for promise in self._promises for request in promise.pending]
        for request in (*ahead, *pending):
            request.token_ids.pop()
        known = {request.request_id: sampled[request.request_id] for request in drawing}
        for request in drawing:
            if not self._scheduler.holds(request):
                del known[request.request_id]
                output.draft_token_ids.pop(request.request_id, None)
        outputs = self._scheduler.update(output, known)
        for request in ahead:
            request.token_ids.append(PENDING)  # of one that has ended too: it is popped like the others
        return outputs


class SettledDrafter:
    """Another drafter, asked only in steps whose requests' tokens are all known. Those are rarer the longer they
    brought no drafts: where drafts do not come, or do not pay, one step in 32 waits."""

    def __init__(self, drafter: Drafter) -> None:
        self.is_settled = False  # said by whoever runs the steps, before each is scheduled
        self._drafter = drafter
        self._wait = 0
        self._num_steps = 0  # since the last that was settled

    def should_settle(self) -> bool:
        """Whether the next step is to wait for the tokens of the one in flight. Asked once a step."""
        self._num_steps += 1
        return self._num_steps > self._wait

    def wants_drafts(self, num_seqs: int, num_tokens: int) -> bool:
        if not self.is_settled:
            return False
        self._num_steps = 0
        self._wait = min(2 * self._wait + 1, _LONGEST_WAIT)
        return self._drafter.wants_drafts(num_seqs, num_tokens)

    def draft(self, candidates: Sequence[DraftCandidate], max_drafts: int) -> dict[str, list[int]]:
        drafts = self._drafter.draft(candidates, max_drafts)
        if drafts:
            self._wait = 0
        return drafts

    def observe(self, num_seqs: int, num_tokens: int, num_drafts: int, duration_s: float) -> None:
        self._drafter.observe(num_seqs, num_tokens, num_drafts, duration_s)

    def forget(self, request_id: str) -> None:
        self._drafter.forget(request_id)
