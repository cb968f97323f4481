"""What one request of a load went through: its answer's timing, what was aimed at, its error. Knows no server."""

from __future__ import annotations

from dataclasses import dataclass

from llmserve.tools.answer_timing import AnswerTiming


@dataclass(slots=True, kw_only=True)
class RequestRecord(AnswerTiming):
    """One request. It is complete once `finish_reason` or `error_kind` is set."""

    prompt_len: int  # tokens aimed at
    output_len: int  # tokens asked for at most
    scheduled_s: float  # when an open loop wanted it sent; in a closed loop, when its user was free to
    error_kind: str | None = None
    error_message: str = ""

    def fail(self, kind: str, message: str) -> None:
        """Notes that the request did not end well; `kind` is what the report counts by."""
        self.error_kind = kind
        self.error_message = message

    @property
    def succeeded(self) -> bool:
        """Whether the whole answer came."""
        return self.error_kind is None
