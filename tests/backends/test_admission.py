"""Who may join the queue, and what those who may not are told. The clock is a number."""

from __future__ import annotations

import asyncio
import time

import pytest

from llmserve.backends.admission import Admission, AdmissionLimits, DrainMeter, Ticket, overdue
from llmserve.backends.generation import GenerationSpec
from llmserve.errors import QueueFullError, RateLimitError
from llmserve.messages import SamplingParams
from llmserve.rate_limit import RateLimits
from llmserve.request_context import RequestContext, Tenant


def spec(num_prompt: int = 100, max_tokens: int = 100, n: int = 1, priority: int = 0) -> GenerationSpec:
    params = SamplingParams(max_tokens=max_tokens, seed=0)
    return GenerationSpec(prompt_token_ids=[1] * num_prompt, sampling=params, n=n, priority=priority)


def context(name: str = "", **fields: float) -> RequestContext:
    return RequestContext(tenant=Tenant(name=name, **fields))  # type: ignore[arg-type]


def saturated(**limits: object) -> tuple[Admission, list[Ticket]]:
    """Books of 4 seats: 8 in flight, of which 4 wait; one of 200 tokens left the queue each second so far."""
    admission = Admission(AdmissionLimits(**limits))  # type: ignore[arg-type]
    admission.max_running = 4
    tickets = [admission.admit(spec(), context(), 0.0)[0] for _ in range(16)]
    for now_s, ticket in enumerate(tickets[:12]):
        ticket.start(float(now_s))
        if now_s >= 4:
            tickets[now_s - 4].end(100, 100, float(now_s))
    return admission, tickets


def test_the_drain_rate_is_measured_while_somebody_waits() -> None:
    meter = DrainMeter()
    meter.left(1000, 1.0)  # nobody waited
    assert meter.tokens_per_s == 0
    meter.busy(10.0)
    meter.left(300, 11.0)
    assert meter.tokens_per_s == pytest.approx(300)
    for second in range(12, 60):
        meter.left(100, float(second))
    assert meter.tokens_per_s == pytest.approx(100, rel=0.05)  # what is long ago counts for little
    meter.idle()
    meter.busy(1000.0)
    meter.left(100, 1001.0)
    assert meter.tokens_per_s == pytest.approx(100, rel=0.05)  # the pause is no time of the queue


def test_the_wait_is_the_queue_over_the_measured_rate() -> None:
    admission, _ = saturated()
    assert admission.queued_tokens == 4 * 200
    assert admission.meter.tokens_per_s == pytest.approx(200, rel=0.15)
    assert admission.wait_s(Tenant(name=""), "", 1) == pytest.approx(4.0, rel=0.15)


def test_who_would_wait_too_long_is_refused_at_the_door_and_told_when_to_come_back() -> None:
    admission, _ = saturated(max_queue_time_s=3.0)
    with pytest.raises(QueueFullError) as refused:
        admission.admit(spec(), context(), 11.0)
    assert refused.value.retry_after_s == pytest.approx(1.0, abs=0.7)
    assert "3.0 s are allowed" in refused.value.message
    assert admission.num_sequences == 8  # it is not in the books


def test_a_deadline_that_would_pass_in_the_queue_is_refused_at_once() -> None:
    admission, _ = saturated()
    with pytest.raises(QueueFullError, match=r"1\.0 s are allowed"):
        admission.admit(spec().until(15.0).until(12.0).until(None), context(), 11.0)
    admission.admit(spec(), context(), 11.0)


def test_a_free_seat_means_no_wait() -> None:
    admission, tickets = saturated(max_queue_time_s=0.5)
    for ticket in tickets:
        ticket.end(100, 100, 12.0)
    assert admission.num_sequences == 0
    admission.admit(spec(n=4), context(), 13.0)


def test_tokens_are_bounded_and_a_lone_request_always_fits() -> None:
    admission = Admission(AdmissionLimits(max_tokens=500))
    big = admission.admit(spec(num_prompt=5000), context(), 0.0)
    with pytest.raises(QueueFullError, match="tokens are waiting"):
        admission.admit(spec(), context(), 0.0)
    big[0].start(1.0)
    admission.admit(spec(), context(), 1.0)


def test_sequences_are_bounded() -> None:
    admission = Admission(AdmissionLimits(max_sequences=4))
    admission.admit(spec(n=3), context(), 0.0)
    with pytest.raises(QueueFullError, match="more than 4"):
        admission.admit(spec(n=2), context(), 0.0)


def test_no_tenant_takes_more_than_its_share() -> None:
    admission = Admission(AdmissionLimits(max_sequences=10))
    admission.admit(spec(n=5), context("flood", share=0.5), 0.0)
    with pytest.raises(QueueFullError, match="share of 5"):
        admission.admit(spec(), context("flood", share=0.5), 0.0)
    admission.admit(spec(n=5), context("quiet", share=0.5), 0.0)


def test_priorities_decide_who_waits() -> None:
    admission, _ = saturated(max_queue_time_s=3.0, policy="priority")
    with pytest.raises(QueueFullError):
        admission.admit(spec(priority=0), context(), 11.0)
    admission.admit(spec(priority=-1), context(), 11.0)  # all that wait stand behind it


def test_under_fair_the_flood_of_one_does_not_refuse_another() -> None:
    admission, _ = saturated(max_queue_time_s=3.0, policy="fair")
    with pytest.raises(QueueFullError):
        admission.admit(spec(), context(""), 11.0)
    admission.admit(spec(), context("quiet"), 11.0)


def test_tokens_a_minute_are_charged_as_expected_and_settled_as_used() -> None:
    tenant = Tenant(name="alice", limits=RateLimits(tokens_per_minute=600))
    asks = RequestContext(tenant=tenant)
    admission = Admission(AdmissionLimits())
    [ticket] = admission.admit(spec(num_prompt=100, max_tokens=50), asks, 0.0)
    assert tenant.limits.tokens.remaining(0.0) == 450
    ticket.start(0.0)
    ticket.end(100, 10, 0.0)
    assert tenant.limits.tokens.remaining(0.0) == 490
    assert (tenant.usage.prompt_tokens, tenant.usage.generation_tokens) == (100, 10)
    admission.admit(spec(num_prompt=450, max_tokens=1), asks, 0.0)
    with pytest.raises(RateLimitError) as refused:
        admission.admit(spec(num_prompt=100, max_tokens=1), asks, 0.0)
    assert refused.value.retry_after_s == pytest.approx((101 - 39) / 10)
    assert tenant.usage.num_refused == 1


def test_tickets_count_once() -> None:
    admission = Admission(AdmissionLimits())
    [ticket] = admission.admit(spec(), context(), 0.0)
    ticket.start(1.0)
    ticket.start(2.0)
    ticket.end(100, 5, 3.0)
    ticket.end(100, 5, 3.0)
    assert (admission.num_sequences, admission.queued_tokens) == (0, 0.0)


def test_who_waited_too_long_all_the_same_is_told_so() -> None:
    """The engine says that one request waits: of the two without a token, the older one's prompt is being computed."""

    async def wait() -> list[str]:
        told: list[str] = []
        loop = asyncio.get_running_loop()
        admission = Admission(AdmissionLimits(max_queue_time_s=0.02), loop.call_later)
        admission.num_engine_waiting = 1
        now_s = time.monotonic()
        done = asyncio.Event()
        for name in ("computed", "queued"):
            [ticket] = admission.admit(spec(), context(), now_s)

            def fail(error: QueueFullError, name: str = name, ticket: Ticket = ticket) -> None:
                told.append(name)
                ticket.end(0, 0, now_s)
                done.set()

            ticket.fail = fail
        await asyncio.wait_for(done.wait(), 5)
        return told

    assert asyncio.run(wait()) == ["queued"]


def test_all_that_wait_are_overdue_where_the_engine_counts_preempted_ones_too() -> None:
    admission = Admission(AdmissionLimits())
    tickets = [admission.admit(spec(), context(), float(arrival_s))[0] for arrival_s in range(3)]
    assert overdue(tickets, 2, 10.0) == tickets[1:]
    assert overdue(tickets, 5, 10.0) == tickets
    assert overdue(tickets, 5, 1.0) == tickets[:2]
    assert overdue(tickets, 0, 10.0) == []
