"""Whether one more request may join the queue of an LLM: by count, by tokens, and by how long it would have to wait.

Knows no engine and no HTTP; is told the time. How long the queue takes is measured, not guessed: how many tokens'
worth of requests left it in how much time, while there was one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llmserve.backends.generation import GenerationSpec
from llmserve.errors import QueueFullError
from llmserve.request_context import RequestContext, Tenant

_FORGET_S = 10.0  # what was measured longer ago than this counts for little
_FIRST_GUESS_TOKENS = 128.0  # how long an answer is, before any has ended
_LEARN = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """`policy` is the scheduling policy: it says who of those that wait is served before a request."""

    max_sequences: int = 4096
    max_tokens: int = 2**20
    max_queue_time_s: float = 0.0  # 0: any
    policy: str = "fcfs"


class DrainMeter:
    """Tokens' worth of requests that leave the queue a second, while there is one."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._since_s: float | None = None  # None: nobody waits

    def busy(self, now_s: float) -> None:
        """Somebody has to wait from here on, if not before."""
        if self._since_s is None:
            self._since_s = now_s

    def idle(self) -> None:
        """Nobody waits."""
        self._since_s = None

    def left(self, tokens: float, now_s: float) -> None:
        """One left the queue."""
        if self._since_s is None:
            return
        elapsed_s = max(now_s - self._since_s, 0.0)
        decay = math.exp(-elapsed_s / _FORGET_S)
        self._tokens = self._tokens * decay + tokens
        self._seconds = self._seconds * decay + elapsed_s
        self._since_s = now_s

    @property
    def tokens_per_s(self) -> float:
        """0 until something was measured."""
        return self._tokens / self._seconds if self._seconds > 0 else 0.0


class Ticket:
    """One sequence in the books: it waits until `start`, and is gone after `end`. Both may be called again."""

    __slots__ = ("_admission", "arrival_s", "fail", "group", "is_waiting", "tenant", "tokens")

    def __init__(self, admission: Admission, tenant: Tenant, group: Group, tokens: float, arrival_s: float) -> None:
        self._admission = admission
        self.tenant = tenant
        self.group = group
        self.tokens = tokens
        self.arrival_s = arrival_s
        self.is_waiting = True
        self.fail: Callable[[QueueFullError], None] | None = None  # ends the request, if it has waited too long

    def start(self, now_s: float) -> None:
        """Its first token is here."""
        if self.is_waiting:
            self.is_waiting = False
            self._admission.started(self, now_s)

    def end(self, num_prompt_tokens: int, num_generated: int, now_s: float) -> None:
        """However it ended."""
        admission, self._admission = self._admission, _CLOSED
        self.fail = None
        admission.ended(self, num_prompt_tokens, num_generated, now_s)


CallLater = Callable[[float, Callable[[], None]], object]
Group = int | str  # those that are ordered alike: one priority, or one tenant


class Admission:
    """The books of one LLM. `max_running` is how many sequences run at once: the others wait."""

    def __init__(self, limits: AdmissionLimits, call_later: CallLater | None = None) -> None:
        """Without `call_later` nobody who was let in is sent away again."""
        self.limits = limits
        self._call_later = call_later
        self.max_running = 0  # 0: not known yet
        self.num_engine_waiting = 0  # what the engine last said
        self.num_sequences = 0
        self.meter = DrainMeter()
        self._waiting: dict[Ticket, None] = {}  # in order of arrival
        self._queued_tokens: dict[Group, float] = {}
        self._weights: dict[Group, float] = {}
        self._of_tenant: dict[str, int] = {}
        self._mean_generated = _FIRST_GUESS_TOKENS
        self._is_watching = False

    @property
    def queued_tokens(self) -> float:
        """Of all that have no token yet: their prompts and what they will probably say."""
        return sum(self._queued_tokens.values())

    def admit(self, spec: GenerationSpec, context: RequestContext, now_s: float) -> list[Ticket]:
        """A ticket for each sequence. Raises QueueFullError, RateLimitError; then nothing is in the books."""
        tenant = context.tenant
        tokens = len(spec.prompt_token_ids) + min(spec.sampling.max_tokens, self._mean_generated)
        group = self._group(spec, tenant)
        tenant.require_tokens(tokens * spec.n, now_s)
        self._check_room(tenant, spec.n, tokens * spec.n)
        self._check_wait(tenant, group, spec.n, spec.deadline_s, now_s)
        tenant.limits.tokens.take(tokens * spec.n, now_s)
        self._weights[group] = tenant.weight
        tickets = [Ticket(self, tenant, group, tokens, now_s) for _ in range(spec.n)]
        self._queued_tokens[group] = self._queued_tokens.get(group, 0.0) + tokens * spec.n
        self._of_tenant[tenant.name] = self._of_tenant.get(tenant.name, 0) + spec.n
        self._waiting.update(dict.fromkeys(tickets))
        self.num_sequences += spec.n
        self._measure(now_s)
        self._watch(now_s)
        return tickets

    def wait_s(self, tenant: Tenant, group: Group, n: int) -> float:
        """How long `n` more sequences would probably wait; 0 if there is a seat for them, or nothing was measured."""
        rate = self.meter.tokens_per_s
        if not rate or not self.max_running or self.num_sequences + n <= self.max_running:
            return 0.0
        return self._tokens_before(tenant, group) / rate

    def started(self, ticket: Ticket, now_s: float) -> None:
        """A ticket's own affair."""
        self.meter.left(ticket.tokens, now_s)
        self._stop_waiting(ticket)
        self._measure(now_s)

    def ended(self, ticket: Ticket, num_prompt_tokens: int, num_generated: int, now_s: float) -> None:
        """A ticket's own affair."""
        if ticket.is_waiting:
            self._stop_waiting(ticket)
        else:
            self._mean_generated += _LEARN * (num_generated - self._mean_generated)
        self.num_sequences -= 1
        tenant = ticket.tenant
        left = self._of_tenant[tenant.name] - 1
        if left:
            self._of_tenant[tenant.name] = left
        else:
            del self._of_tenant[tenant.name]
        tenant.limits.tokens.give(ticket.tokens - num_prompt_tokens - num_generated, now_s)
        tenant.usage.prompt_tokens += num_prompt_tokens
        tenant.usage.generation_tokens += num_generated
        self._measure(now_s)

    def _group(self, spec: GenerationSpec, tenant: Tenant) -> Group:
        if self.limits.policy == "priority":
            return spec.priority
        return tenant.name if self.limits.policy == "fair" else ""

    def _check_room(self, tenant: Tenant, n: int, tokens: float) -> None:
        limits = self.limits
        if self.num_sequences + n > limits.max_sequences:
            self._refuse(
                f"{self.num_sequences} sequences are in flight, and with this request's {n} there would be more than "
                f"{limits.max_sequences}.",
                tokens,
                tenant,
            )
        own, share = self._of_tenant.get(tenant.name, 0), max(tenant.share * limits.max_sequences, 1)
        if own and own + n > share:
            self._refuse(
                f"{own} sequences of the key {tenant.name!r} are in flight, and with {n} more there would be more than "
                f"its share of {share:.0f}.",
                tokens,
                tenant,
            )
        queued = self.queued_tokens
        if queued and queued + tokens > limits.max_tokens:
            self._refuse(
                f"{queued:.0f} tokens are waiting, and with this request's {tokens:.0f} there would be more than "
                f"{limits.max_tokens}.",
                queued + tokens - limits.max_tokens,
                tenant,
            )

    def _check_wait(self, tenant: Tenant, group: Group, n: int, deadline_s: float | None, now_s: float) -> None:
        allowed_s = self.limits.max_queue_time_s or math.inf
        if deadline_s is not None:
            allowed_s = min(allowed_s, deadline_s - now_s)
        wait_s = self.wait_s(tenant, group, n)
        if wait_s > allowed_s:
            tenant.usage.num_refused += 1
            raise QueueFullError(
                f"The request would wait {wait_s:.1f} s for its turn; {allowed_s:.1f} s are allowed. Try again later.",
                wait_s - allowed_s,
            )

    def _refuse(self, reason: str, tokens: float, tenant: Tenant) -> None:
        """`tokens` must have left the queue before it is worth trying again."""
        tenant.usage.num_refused += 1
        rate = self.meter.tokens_per_s
        raise QueueFullError(f"{reason} Try again later.", tokens / rate if rate else 1.0)

    def _tokens_before(self, tenant: Tenant, group: Group) -> float:
        """What is served before a request that comes now."""
        total = self.queued_tokens
        if self.limits.policy == "priority":
            assert isinstance(group, int)
            before = (other for other in self._queued_tokens if isinstance(other, int) and other <= group)
            return sum(self._queued_tokens[other] for other in before)
        if self.limits.policy == "fair":
            weights = sum(self._weights[other] for other in self._queued_tokens if other != group) + tenant.weight
            return min(self._queued_tokens.get(group, 0.0) * weights / tenant.weight, total)
        return total

    def _stop_waiting(self, ticket: Ticket) -> None:
        del self._waiting[ticket]
        left = self._queued_tokens[ticket.group] - ticket.tokens
        if left > 0.5:
            self._queued_tokens[ticket.group] = left
        else:
            del self._queued_tokens[ticket.group], self._weights[ticket.group]

    def _measure(self, now_s: float) -> None:
        if self._waiting and self.max_running and self.num_sequences > self.max_running:
            self.meter.busy(now_s)
        else:
            self.meter.idle()

    # Who was let in and waits longer than was expected is told so too.

    def _watch(self, now_s: float) -> None:
        limit_s = self.limits.max_queue_time_s
        if limit_s and self._call_later is not None and not self._is_watching and self._waiting:
            self._is_watching = True
            oldest = next(iter(self._waiting))
            self._call_later(max(oldest.arrival_s + limit_s - now_s, limit_s / 20), self._expire)

    def _expire(self) -> None:
        self._is_watching = False
        now_s = time.monotonic()
        limit_s = self.limits.max_queue_time_s
        late = overdue(self._waiting, self.num_engine_waiting, now_s - limit_s)
        for ticket in late:
            if ticket.fail is not None:
                wait_s = self.wait_s(ticket.tenant, ticket.group, 1)
                ticket.fail(QueueFullError(f"The request waited {limit_s:g} s for its turn. Try again later.", wait_s))
        self._watch(now_s)


def overdue(waiting: Iterable[Ticket], num_engine_waiting: int, arrived_before_s: float) -> list[Ticket]:
    """Those that came before that time and are in the engine's queue still: the oldest of them are no longer, they
    have no token yet because their prompt is being computed. (The engine may count more: preempted ones wait too.)"""
    tickets = list(waiting)
    begin = max(len(tickets) - num_engine_waiting, 0)
    return [ticket for ticket in tickets[begin:] if ticket.arrival_s <= arrived_before_s]


class _Closed(Admission):
    """The books of a ticket that has ended: nothing more is written."""

    def started(self, ticket: Ticket, now_s: float) -> None:
        """Too late."""

    def ended(self, ticket: Ticket, num_prompt_tokens: int, num_generated: int, now_s: float) -> None:
        """Once is enough."""


_CLOSED = _Closed(AdmissionLimits())
