"""Fair sharing between tenants by tokens: start-time fair queueing over what requests cost. Knows no queue, no clock.

Each request gets a virtual start time: where its tenant's last one ends, but not before the oldest that runs, so that
nobody saves up credit by being idle. It ends after its cost: prompt tokens, and twice the tokens it will probably
generate (a token that is generated takes a step of its own), divided by the tenant's weight. What it said in the end is
settled with the tenant's next request. So tenants that always have something waiting get tokens in proportion to their
weights, and one that asks seldom is served as if it were nearly alone.

Goyal et al., "Start-time fair queueing" (SIGCOMM '96); Sheng et al., "Fairness in serving large language models"
(OSDI '24), whose virtual token counter charges tokens as they are served. Here they are charged ahead and corrected: a
rank that never changes keeps the queues sorted, and decides who is preempted by the same measure.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmserve.messages import EngineRequest
from llmserve.scheduler.request import Request

_GENERATED_COST = 2.0
_FIRST_GUESS_TOKENS = 128.0
_LEARN = 0.1
_MAX_TENANTS = 4096  # remembered after they have nothing left in flight


@dataclass(slots=True)
class _Charge:
    """One request in flight."""

    tenant: str
    weight: float
    start: float
    cost: float  # as charged, over the weight
    num_prompt_tokens: int


class FairPolicy:
    """Ranks by virtual start time. `weight` of a tenant is that of its requests."""

    name = "fair"

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}  # by tenant: where its last request ends
        self._expected: dict[str, float] = {}  # by tenant: tokens of an answer
        self._charges: dict[str, _Charge] = {}
        self._started: dict[str, float] = {}  # virtual start times of requests that have begun
        self._now = 0.0

    def rank(self, request: EngineRequest) -> float:
        """Its virtual start time."""
        tenant, weight = request.tenant, max(request.weight, 1e-6)
        self._advance()
        start = max(self._now, self._ends.get(tenant, 0.0))
        num_expected = min(self._expected.get(tenant, _FIRST_GUESS_TOKENS), request.params.max_tokens)
        num_prompt_tokens = len(request.prompt_token_ids)
        cost = (num_prompt_tokens + _GENERATED_COST * num_expected) / weight
        self._charges[request.request_id] = _Charge(tenant, weight, start, cost, num_prompt_tokens)
        self._ends[tenant] = start + cost
        return start

    def started(self, request: Request) -> None:
        """It is scheduled for the first time."""
        self._started[request.request_id] = self._charges[request.request_id].start

    def finished(self, request: Request) -> None:
        """It has ended, or was aborted: the tenant pays for what it got, no more and no less."""
        charge = self._charges.pop(request.request_id)
        has_run = self._started.pop(request.request_id, None) is not None
        num_generated = request.num_tokens - request.num_prompt_tokens
        if has_run:
            expected = self._expected.get(charge.tenant, _FIRST_GUESS_TOKENS)
            self._expected[charge.tenant] = expected + _LEARN * (num_generated - expected)
            actual = (charge.num_prompt_tokens + _GENERATED_COST * num_generated) / charge.weight
        else:
            actual = 0.0
        self._ends[charge.tenant] += actual - charge.cost
        self._advance()
        if not self._charges:  # nobody is there to whom anything could be owed
            self._ends.clear()
        if len(self._expected) > _MAX_TENANTS:
            self._forget()

    def makes_way(self, waiting: Request, running: Request) -> bool:
        """Whether the one that waits would end before the one that runs had its turn to begin."""
        charge = self._charges[waiting.request_id]
        return charge.start + charge.cost <= self._charges[running.request_id].start

    def _advance(self) -> None:
        """Virtual time is that of the oldest that runs; it never goes back."""
        if self._started:
            self._now = max(self._now, min(self._started.values()))

    def _forget(self) -> None:
        """Of tenants with nothing in flight, nothing is kept but what they owe."""
        active = {charge.tenant for charge in self._charges.values()}
        self._expected = {name: value for name, value in self._expected.items() if name in active}
        self._ends = {name: end for name, end in self._ends.items() if name in active or end > self._now}
