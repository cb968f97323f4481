"""Ten times more than a server can serve, in simulated time: who is let in keeps the queue time, no seat is idle."""

from __future__ import annotations

import pytest

from llmserve.backends.admission import Admission, AdmissionLimits, Ticket
from llmserve.backends.generation import GenerationSpec
from llmserve.errors import QueueFullError
from llmserve.messages import SamplingParams
from llmserve.request_context import RequestContext

SEATS, STEP_S, NUM_OUTPUT, QUEUE_S = 16, 0.01, 64, 2.0
SPEC = GenerationSpec(prompt_token_ids=[1] * 64, sampling=SamplingParams(max_tokens=NUM_OUTPUT, seed=0))


class SimulatedServer:
    """Every sequence that has a seat gets a token a step."""

    def __init__(self) -> None:
        self.admission = Admission(AdmissionLimits(max_queue_time_s=QUEUE_S))
        self.admission.max_running = SEATS
        self.waiting: list[Ticket] = []
        self.running: dict[Ticket, int] = {}
        self.waited_s: list[float] = []
        self.retry_after_s: list[float] = []
        self.num_tokens = 0

    def ask(self, now_s: float) -> None:
        try:
            self.waiting += self.admission.admit(SPEC, RequestContext(), now_s)
        except QueueFullError as refused:
            self.retry_after_s.append(refused.retry_after_s)

    def step(self, now_s: float) -> None:
        while self.waiting and len(self.running) < SEATS:
            ticket = self.waiting.pop(0)
            self.running[ticket] = 0
            self.waited_s.append(now_s - ticket.arrival_s)
        for ticket in list(self.running):
            self.running[ticket] += 1
            self.num_tokens += 1
            if self.running[ticket] == 1:
                ticket.start(now_s)
            if self.running[ticket] == NUM_OUTPUT:
                ticket.end(64, NUM_OUTPUT, now_s)
                del self.running[ticket]


@pytest.mark.parametrize("times", [1.5, 10.0])
def test_overload(times: float) -> None:
    server = SimulatedServer()
    due = 0.0
    for number in range(6000):  # a minute
        due += times * SEATS / NUM_OUTPUT
        while due >= 1:
            server.ask(number * STEP_S)
            due -= 1
        server.step(number * STEP_S)
    settled = server.waited_s[200:]  # before the first seats were free again, nothing was measured
    assert len(settled) > 1000
    assert max(settled) <= 1.25 * QUEUE_S
    assert sum(settled) / len(settled) > 0.5 * QUEUE_S  # the queue is used, not only bounded
    assert server.num_tokens >= 0.95 * 6000 * SEATS
    assert 0 < max(server.retry_after_s[len(server.retry_after_s) // 10 :]) < 2 * QUEUE_S
