"""In what order requests are served. A policy ranks one request at a time and knows no queue and no clock.

A rank is fixed for a request's life. That is enough for every policy that can be written as "smallest virtual time
first": arrival order, priorities with ageing, and fair sharing by virtual start times (`fair_policy`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from llmserve.errors import ConfigError
from llmserve.messages import EngineRequest
from llmserve.scheduler.fair_policy import FairPolicy
from llmserve.scheduler.request import Request


class Policy(Protocol):
    """Ranks requests: the smaller rank is served first and preempted last. Equal ranks go by arrival."""

    name: str

    def rank(self, request: EngineRequest) -> float:
        """Called once, when the request is added."""
        ...

    def started(self, request: Request) -> None:
        """Called once, when it is scheduled for the first time."""
        ...

    def finished(self, request: Request) -> None:
        """Called once, when it has ended or was aborted, whether it had been scheduled or not."""
        ...

    def makes_way(self, waiting: Request, running: Request) -> bool:
        """Whether `running`, the last of those that run, may be given up for `waiting`, the first that waits."""
        ...


class StaticPolicy:
    """A policy that looks at a request once, and never takes back what was begun."""

    def started(self, request: Request) -> None:
        """Changes nothing."""

    def finished(self, request: Request) -> None:
        """Changes nothing."""

    def makes_way(self, waiting: Request, running: Request) -> bool:
        """Who runs, runs, as long as there are blocks."""
        return False


class FCFSPolicy(StaticPolicy):
    """First come, first served: by arrival at the server, so a request resubmitted after a crash keeps its place."""

    name = "fcfs"

    def rank(self, request: EngineRequest) -> float:
        return request.arrival_s


class PriorityPolicy(StaticPolicy):
    """The lower `priority` first, with ageing: a request gains one level for every `ageing_s` seconds it has waited.

    At time t a request's aged priority is `priority - (t - arrival) / ageing_s`. Comparing two of them, t cancels, so
    `priority * ageing_s + arrival` orders them alike at all times, and a request can only be overtaken by those that
    arrive within `ageing_s` times the difference in priority after it: nobody starves.
    """

    name = "priority"

    def __init__(self, ageing_s: float = 30.0) -> None:
        if not ageing_s > 0:
            raise ConfigError(f"ageing_s must be above 0 seconds, not {ageing_s}: without ageing, requests starve.")
        self.ageing_s = ageing_s

    def rank(self, request: EngineRequest) -> float:
        return request.priority * self.ageing_s + request.arrival_s


POLICIES: dict[str, Callable[[], Policy]] = {
    FCFSPolicy.name: FCFSPolicy,
    PriorityPolicy.name: PriorityPolicy,
    FairPolicy.name: FairPolicy,
}


def make_policy(name: str) -> Policy:
    """The policy of that name with its defaults. Raises ConfigError."""
    if name not in POLICIES:
        raise ConfigError(f"Unknown scheduling policy {name!r}. Choose one of: {', '.join(sorted(POLICIES))}.")
    return POLICIES[name]()
