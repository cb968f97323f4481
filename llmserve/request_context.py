"""Who asks, and what became of it: the one object that follows a request through every room. Knows no route, no engine.

It travels in a context variable, so that a route, a model or a queue that wants to know who asks need not be handed it
by all that stand between, and none of those can forget to hand it on. Tasks that a request starts inherit it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from llmserve.errors import RateLimitError
from llmserve.rate_limit import RateLimits


@dataclass(slots=True)
class TenantUsage:
    """What one key has used since the server started."""

    num_requests: int = 0
    num_refused: int = 0  # answered 403 or 429
    prompt_tokens: int = 0
    generation_tokens: int = 0


@dataclass(slots=True, kw_only=True)
class Tenant:
    """The holder of an API key, or everyone where there are none."""

    name: str
    scopes: frozenset[str] = frozenset()
    weight: float = 1.0  # its part of the tokens under the policy `fair`
    share: float = 1.0  # the most it may take of what the server queues, 0 to 1
    limits: RateLimits = field(default_factory=RateLimits)
    usage: TenantUsage = field(default_factory=TenantUsage)

    def require_tokens(self, tokens: float, now_s: float) -> None:
        """Raises RateLimitError if the key may not have so many now."""
        bucket = self.limits.tokens
        if wait_s := bucket.wait_s(tokens, now_s):
            self.usage.num_refused += 1
            raise RateLimitError(
                f"The key {self.name!r} has used its {bucket.per_minute} tokens a minute. Try again in {wait_s:.1f} s.",
                wait_s,
            )


EVERYONE = Tenant(name="")
STRANGER = Tenant(name="")  # asks without a known key where keys are set: gets a yes or a no, and no details


@dataclass(slots=True, kw_only=True)
class RequestContext:
    """Written by whoever knows: the door, the model, the engine's messages. Times are seconds of time.monotonic()."""

    tenant: Tenant = field(default_factory=lambda: EVERYONE)
    request_id: str = ""  # the client's X-Request-Id, else ours
    trace_id: str = ""  # of W3C trace context
    traceparent: str = ""  # what the client is told of it
    span: Any = None  # OpenTelemetry's, while it lasts
    route: str = ""
    arrival_s: float = field(default_factory=time.monotonic)
    deadline_s: float | None = None  # when the answer is no longer wanted
    on_deadline: Callable[[float], None] | None = None  # moves the timer that ends the request
    status: int = 0  # of the answer, as HTTP has it
    is_complete: bool = False  # all of the answer is there, if not sent: no deadline can pass, and nothing comes behind
    error: str = ""  # the code of the error it was answered with
    model: str = ""
    completion_id: str = ""
    num_sequences: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    queue_s: float | None = None  # arrival to first scheduling
    prefill_s: float | None = None  # first scheduling to first token
    decode_s: float | None = None  # first to last token
    finish_reason: str = ""
    num_preemptions: int = 0
    num_restarts: int = 0  # of the engine, while it was in flight

    def limit_time(self, timeout_s: float) -> None:
        """The answer is wanted within `timeout_s` of the arrival; of several limits the first to pass counts."""
        deadline_s = self.arrival_s + timeout_s
        if self.deadline_s is None or deadline_s < self.deadline_s:
            self.deadline_s = deadline_s
            if self.on_deadline is not None:
                self.on_deadline(deadline_s - time.monotonic() + asyncio.get_running_loop().time())

    def count_input(self, model: str, num_tokens: int) -> None:
        """Tokens that a model has read and answered without saying any: embeddings, scores, classes."""
        self.model = model
        self.prompt_tokens += num_tokens
        self.tenant.usage.prompt_tokens += num_tokens
        self.tenant.limits.tokens.take(num_tokens, time.monotonic())

    @property
    def itl_s(self) -> float | None:
        """Mean time between tokens of its longest-running sequence; None before there are two."""
        per_sequence = self.generation_tokens / max(self.num_sequences, 1)
        return None if self.decode_s is None or per_sequence < 2 else self.decode_s / (per_sequence - 1)


CURRENT_REQUEST: ContextVar[RequestContext] = ContextVar("llmserve_request")


def current_request() -> RequestContext:
    """The request that this task works for; one of its own for work that came by no door (tests, offline use)."""
    context = CURRENT_REQUEST.get(None)
    return RequestContext() if context is None else context
