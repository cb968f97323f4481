"""The words between an engine's supervisor and those it works for. Does nothing."""

from __future__ import annotations

import dataclasses
import enum
from typing import Protocol

from llmserve.errors import LLMServeError
from llmserve.messages import EngineStats, StepOutputs


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SupervisionSettings:
    """How patient a supervisor is; seconds."""

    stall_timeout_s: float = 10.0
    restart_timeout_s: float = 120.0  # requests in flight wait so long for another engine
    min_backoff_s: float = 0.5  # before the second start in a row; the first is immediate
    max_backoff_s: float = 30.0


class EngineEvents(Protocol):
    """Who the answers are for."""

    def on_step(self, step: StepOutputs) -> None:
        """The tokens of one step, each exactly once whatever engines they come from."""
        ...

    def on_idle(self, stats: EngineStats) -> None:
        """The gauges, where no step brings them."""
        ...

    def on_failed(self, request_ids: list[str], error: LLMServeError) -> None:
        """These get no further token."""
        ...


class Phase(enum.StrEnum):
    """The life of a supervised engine, over all its processes."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "being restarted"
    FAILED = "failed"  # could not be restarted; still tried, but nobody waits for it
    STOPPED = "stopped"


class Nobody:
    """Whom they are for once a supervisor has been shut down."""

    def on_step(self, step: StepOutputs) -> None:
        """There is none."""

    def on_idle(self, stats: EngineStats) -> None:
        """There is none."""

    def on_failed(self, request_ids: list[str], error: LLMServeError) -> None:
        """There is none."""
