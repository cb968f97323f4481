"""As many drafts as pay, by what was measured: how often they come true and what their rows cost. Knows no clock.

The drafts of a step are worth trying if they raise its tokens a second:

    (sequences + drafts expected to be accepted) / seconds with them  >  sequences / seconds without

How often drafts come true is learnt per request and strength of proposal, from proposals that were not tried too: the
next token shows whether they would have been right. What rows cost is learnt from the steps, and has no simple form:
where weights are read from memory once a step, rows are free up to the width of a kernel's tile, and with many
sequences they are not. So a table is kept, by number of sequences and of rows. A step that computes prompts carries no
drafts: rows cost most there, and it would teach nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmserve.errors import ConfigError
from llmserve.scheduler.drafts import MAX_DRAFTS, DraftCandidate, Drafter, DraftProposer, FixedDrafter, Proposal
from llmserve.scheduler.ngram_proposer import NgramProposer

_RATE_GAIN = 0.1  # share of a new observation in a request's acceptance rate
_SHARED_GAIN = 0.02  # and in that of all requests, with which new ones begin
_FIRST_RATE = 0.5
_MAX_RATE = 0.97  # a few hits in a row are no certainty
_MIN_CHANCE = 0.1  # a draft less likely than this is not considered
_TIME_GAIN = 0.3
_MAX_JUMP = 2.0  # one slow step (another process had the core) counts for at most this factor
_WORTHWHILE = 1.05  # a gain below this is noise
_PLAIN_EVERY = 64  # steps with drafts in a row, after which one without shows what that costs now
_OPTIMISM = 0.999  # a size declined is thought a little cheaper each time, so that it is tried again some day
_FIXED_NUM_DRAFTS = 7  # without a controller
_PAUSE_SHARE = 4  # drafts that do not pay for n sequences are looked at again n / 4 steps later


class _StepTimes:
    """What steps of one number of sequences took: seconds without drafts, and how many times that with them."""

    __slots__ = ("_num_declined", "_num_in_a_row", "_num_seqs", "_plain_s", "_ratios")

    def __init__(self, num_seqs: int) -> None:
        self._num_seqs = num_seqs
        self._plain_s = 0.0  # 0: not known yet
        self._ratios: dict[int, float] = {}  # by size, as last measured,
        self._num_declined: dict[int, int] = {}  # and how often each was not chosen since
        self._num_in_a_row = 0  # steps with drafts since one without

    @property
    def need_plain(self) -> bool:
        return not self._plain_s or self._num_in_a_row >= _PLAIN_EVERY

    def observe(self, num_drafts: int, duration_s: float) -> None:
        if not num_drafts:
            self._num_in_a_row = 0
            self._plain_s = _follow(self._plain_s, duration_s)
        elif self._plain_s:
            self._num_in_a_row += 1
            size = _size(self._num_seqs + num_drafts)
            self._ratios[size] = max(_follow(self._ratios.get(size, 0.0), duration_s / self._plain_s), 1.0)
            self._num_declined[size] = 0

    def best_num_drafts(self, chances: Sequence[float]) -> int:
        """How many drafts to verify, given for each the chance that it is accepted, the best first; 0: none pays.

        A size that was never tried is thought to cost what the next smaller one does, so it will be.
        """
        num_seqs, expected, ratio = self._num_seqs, 0.0, 1.0
        best, best_gain = 0, _WORTHWHILE
        for num_drafts, chance in enumerate(chances, start=1):
            expected += chance
            num_rows = num_seqs + num_drafts
            if num_rows & (num_rows - 1) and num_drafts < len(chances):
                continue  # a size costs the same, so it is used to the full: its last number of rows is a power of 2
            ratio = max(ratio, self._ratio(_size(num_rows)))
            gain = (num_seqs + expected) / (num_seqs * ratio)
            if gain > best_gain:
                best, best_gain = num_drafts, gain
        used = _size(num_seqs + best) if best else None
        for size in self._num_declined:
            self._num_declined[size] += size != used
        return best

    def _ratio(self, size: int) -> float:
        """What a size is thought to cost; of one that was never tried, nothing is known."""
        if size not in self._ratios:
            return 1.0
        return 1.0 + (self._ratios[size] - 1.0) * _OPTIMISM ** self._num_declined[size]


class _Record:
    """What one request's proposals were worth."""

    __slots__ = ("length", "proposal", "rates")

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}  # by strength: how often a draft is right, if those before it are
        self.proposal: Proposal | None = None  # the last one, tried or not,
        self.length = 0  # and how many tokens there were then


class AdaptiveDrafter:
    """Implements `Drafter` over any proposer."""

    def __init__(self, proposer: DraftProposer) -> None:
        self._proposer = proposer
        self._records: dict[str, _Record] = {}
        self._shared_rates: dict[int, float] = {}  # by strength, over all requests
        self._times: dict[int, _StepTimes] = {}  # by number of sequences: no more than there are seats
        self._num_seqs = 0  # of the step being scheduled
        self._num_paused = 0

    def wants_drafts(self, num_seqs: int, num_tokens: int) -> bool:
        if self._num_paused:
            self._num_paused -= 1
            return False
        self._num_seqs = num_seqs
        return num_tokens == num_seqs and num_seqs in self._times and not self._times[num_seqs].need_plain

    def draft(self, candidates: Sequence[DraftCandidate], max_drafts: int) -> dict[str, list[int]]:
        proposals = [(candidate, *found) for candidate in candidates if (found := self._propose(candidate))]
        chances = sorted((chance for _, _, chances in proposals for chance in chances), reverse=True)[:max_drafts]
        num_left = self._times[self._num_seqs].best_num_drafts(chances)
        if not num_left:
            self._num_paused = self._num_seqs // _PAUSE_SHARE
            return {}
        least = chances[num_left - 1]
        drafts = {}
        for candidate, token_ids, own_chances in proposals:
            num_drafts = min(sum(chance >= least for chance in own_chances), num_left)
            if num_drafts:
                drafts[candidate.request_id] = token_ids[:num_drafts]
                num_left -= num_drafts
        return drafts

    def observe(self, num_seqs: int, num_tokens: int, num_drafts: int, duration_s: float) -> None:
        if num_seqs and num_tokens - num_drafts == num_seqs and duration_s > 0:
            if num_seqs not in self._times:
                self._times[num_seqs] = _StepTimes(num_seqs)
            self._times[num_seqs].observe(num_drafts, duration_s)

    def forget(self, request_id: str) -> None:
        self._records.pop(request_id, None)
        self._proposer.forget(request_id)

    def _propose(self, candidate: DraftCandidate) -> tuple[list[int], list[float]] | None:
        """Drafts for a sequence and the chances that each is accepted, which fall."""
        request_id, token_ids, max_drafts = candidate
        record = self._records.get(request_id)
        if record is None:
            record = self._records[request_id] = _Record()
        self._learn(record, token_ids)
        record.proposal = proposal = self._proposer.propose(request_id, token_ids, MAX_DRAFTS)
        record.length = len(token_ids)
        if proposal is None:
            return None
        rate = min(self._rate(record, proposal.strength), _MAX_RATE)
        chances: list[float] = []
        chance = rate
        while chance >= _MIN_CHANCE and len(chances) < min(len(proposal.token_ids), max_drafts):
            chances.append(chance)
            chance *= rate
        return proposal.token_ids, chances

    def _learn(self, record: _Record, token_ids: Sequence[int]) -> None:
        """Compares the last proposal with what came, up to the first difference."""
        if record.proposal is None:
            return
        drafts, strength = record.proposal
        rate = self._rate(record, strength)
        shared = self._shared_rates.get(strength, _FIRST_RATE)
        for draft, token_id in zip(drafts, token_ids[record.length :], strict=False):
            hit = float(draft == token_id)
            rate += _RATE_GAIN * (hit - rate)
            shared += _SHARED_GAIN * (hit - shared)
            if not hit:
                break
        record.rates[strength] = rate
        self._shared_rates[strength] = shared

    def _rate(self, record: _Record, strength: int) -> float:
        return record.rates.get(strength, self._shared_rates.get(strength, _FIRST_RATE))


def _size(num_rows: int) -> int:
    """1 for 2 rows, 2 for 3 and 4, 3 for 5 to 8, ...: rows of one size cost about the same."""
    return (num_rows - 1).bit_length()


def _follow(estimate: float, observed: float) -> float:
    """An exponential mean that starts at the first observation (an estimate of 0)."""
    if not estimate:
        return observed
    bounded = min(max(observed, estimate / _MAX_JUMP), estimate * _MAX_JUMP)
    return estimate + _TIME_GAIN * (bounded - estimate)


def make_drafter(speculation: str) -> Drafter | None:
    """The drafter of that setting: "auto" (n-grams, where they pay), "ngram" (always) or "off". Raises ConfigError."""
    match speculation:
        case "off":
            return None
        case "auto":
            return AdaptiveDrafter(NgramProposer())
        case "ngram":
            return FixedDrafter(NgramProposer(), _FIXED_NUM_DRAFTS)
    raise ConfigError(f"Unknown speculation {speculation!r}. Choose one of: auto, off, ngram.")
