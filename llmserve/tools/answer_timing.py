"""When the pieces of a streamed answer came, and the latencies that follow. Times are seconds of the client's clock.

The words, as the field uses them and as every figure of `llmserve bench` and `llmserve chat` means them:

* TTFT, time to first token: from sending to the arrival of the first chunk that brings text. A role chunk brings none.
* e2e: from sending to the arrival of the last chunk that brings text or the finish reason.
* TPOT, time per output token: (e2e - TTFT) / (tokens - 1), tokens as the server counts them in `usage`.
* ITL, inter-token latency, per chunk: the gap between two chunks that bring text. A server that puts several tokens in
  a chunk has fewer and longer gaps; chunks that arrived in one piece are 0 apart. TPOT does not depend on either.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from llmserve.tools.openai_client import TimedChunk


@dataclass(slots=True)
class AnswerTiming:
    """One streamed answer, as far as it has come."""

    start_s: float  # when the request was sent
    token_times_s: list[float] = field(default_factory=list)  # arrival of each chunk that brings text
    end_s: float | None = None  # arrival of the last chunk that brings text or a finish reason
    num_chunks: int = 0
    prompt_tokens: int | None = None  # None: the server did not say
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None

    def take(self, batch: list[TimedChunk]) -> None:
        """Notes chunks, in the order they arrived."""
        self.num_chunks += len(batch)
        for time_s, chunk in batch:
            if chunk.brings_tokens:
                self.token_times_s.append(time_s)
                self.end_s = time_s
            if chunk.finish_reason is not None:
                self.finish_reason = chunk.finish_reason
                self.end_s = time_s
            if chunk.usage is not None:
                self.prompt_tokens = chunk.usage.prompt_tokens
                self.completion_tokens = chunk.usage.completion_tokens
                self.cached_tokens = chunk.usage.cached_tokens

    @property
    def num_output_tokens(self) -> int:
        """By the server's usage; where it gives none, the chunks that brought text stand in for tokens."""
        return len(self.token_times_s) if self.completion_tokens is None else self.completion_tokens

    @property
    def ttft_s(self) -> float | None:
        """None if no text came. An answer whose tokens are all invisible has none."""
        return self.token_times_s[0] - self.start_s if self.token_times_s else None

    @property
    def e2e_s(self) -> float | None:
        """None if neither text nor a finish reason came."""
        return None if self.end_s is None else self.end_s - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """None for an answer of fewer than two tokens."""
        ttft_s, e2e_s, num_tokens = self.ttft_s, self.e2e_s, self.num_output_tokens
        if ttft_s is None or e2e_s is None or num_tokens < 2:
            return None
        return (e2e_s - ttft_s) / (num_tokens - 1)

    @property
    def itls_s(self) -> list[float]:
        """The gaps between chunks that brought text."""
        return [later - earlier for earlier, later in itertools.pairwise(self.token_times_s)]
