"""How many tokens a step may compute. Knows no request."""

from __future__ import annotations

from typing import Protocol

from llmserve.errors import ConfigError


class TokenBudget(Protocol):
    """Asked once before a step, and told after it how long the step took."""

    max_num_batched_tokens: int  # no step is ever given more

    def next_step(self, num_running: int) -> int:
        """Tokens for the step about to be scheduled: at least one for each running request."""
        ...

    def observe(self, num_tokens: int, num_prompt_tokens: int, num_decoding: int, duration_s: float) -> None:
        """A step computed `num_tokens`, of them `num_prompt_tokens` in chunks (those beyond one a sequence),
        and left `num_decoding` requests that want a token next time. Called by whoever holds the clock."""
        ...


class FixedBudget:
    """The same number of tokens for every step."""

    def __init__(self, max_num_batched_tokens: int) -> None:
        if max_num_batched_tokens < 1:
            raise ConfigError(f"max_num_batched_tokens must be at least 1, not {max_num_batched_tokens}.")
        self.max_num_batched_tokens = max_num_batched_tokens

    def next_step(self, num_running: int) -> int:
        assert num_running <= self.max_num_batched_tokens  # the scheduler refuses max_num_seqs above it
        return self.max_num_batched_tokens

    def observe(self, num_tokens: int, num_prompt_tokens: int, num_decoding: int, duration_s: float) -> None:
        """A fixed budget learns nothing."""


def check_limits(max_num_seqs: int, max_num_batched_tokens: int, watermark: float) -> None:
    """Raises ConfigError for limits of a scheduler that could not work."""
    if max_num_seqs < 1:
        raise ConfigError(f"max_num_seqs must be at least 1, not {max_num_seqs}.")
    if max_num_batched_tokens < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least max_num_seqs ({max_num_seqs}), or a "
            "step could not give every running request one token."
        )
    if not 0 <= watermark < 1:
        raise ConfigError(f"watermark must be a share of the blocks from 0 to below 1, not {watermark}.")
