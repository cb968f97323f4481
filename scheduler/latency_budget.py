"""A token budget that keeps a prompt from freezing the streams beside it. Knows no request and no clock.

While nothing decodes, a step takes all it may. While requests decode, prompts get as many tokens as keep the step
within `slowdown` times a step of decodes alone, by a model of step time learnt from the steps themselves:

    seconds = decode_s + token_s * prompt tokens

Only the ratio of the two decides. Steps without prompt tokens teach `decode_s`, mixed ones `token_s`. Under a load so
high that every step is mixed, one step in sixty-four leaves the prompts out, to see what decodes cost now.

What users feel is the slow steps, not the mean. So the budget also follows how far the slowest of the steps of decodes
alone lie above their mean, and cuts its chunks smaller while more mixed steps than that exceed `slowdown` times it.
"""

from __future__ import annotations

from llmserve.errors import ConfigError
from llmserve.scheduler.budget import FixedBudget, TokenBudget

_GAIN = 0.2  # share of a new observation: a change of load is followed within some ten steps
_MAX_JUMP = 3.0  # one slow step (another process had the core) counts for at most this factor
_PROBE_STEPS = 64  # mixed steps in a row after which one measures decodes alone
_SLOW = 0.03  # share of steps that are called slow: it is the p99 between tokens that must hold
_TAIL_GAIN = 0.05  # of a step's mean: how fast the bound of slow steps is followed
_LEAST_TAIL = 1.25  # of a machine without noise: a step of two decodes where one was the rule is not called slow
_LEAST_AIM = 0.25  # a machine that stutters for reasons of its own does not starve prompts
_MIN_CHUNK = 4  # prompt tokens a step always has room for, or a prompt would never be computed
_TELLING_CHUNK = 32  # prompt tokens below which a step without decodes says more of its fixed cost than of a token's
_NOISY_CHUNK = 8  # prompt tokens whose time is as large as the noise of a step: one observation of them counts half


class LatencyBudget:
    """Implements `TokenBudget`. `slowdown` is the price in inter-token latency that a prompt may ask of others."""

    def __init__(self, max_num_batched_tokens: int, slowdown: float) -> None:
        if not slowdown > 1:
            raise ConfigError(f"itl_slowdown must be above 1, not {slowdown}: a prompt could never be computed.")
        self.max_num_batched_tokens = max_num_batched_tokens
        self._slowdown = slowdown
        self._decode_s = 0.0  # 0: not known yet
        self._token_s = 0.0
        self._tail = 1.5  # the bound of slow steps of decodes alone, in `decode_s`
        self._aim = 1.0  # share of the tokens that would make the mean step as long as allowed
        self._num_decoding = 0
        self._num_mixed = 0  # steps since one without prompts

    def next_step(self, num_running: int) -> int:
        if not self._num_decoding:
            return self.max_num_batched_tokens
        chunk = 0 if self._num_mixed >= _PROBE_STEPS else max(self._chunk(), _MIN_CHUNK)
        room = self._num_decoding + chunk
        return min(max(room, num_running), self.max_num_batched_tokens)

    def observe(self, num_tokens: int, num_prompt_tokens: int, num_decoding: int, duration_s: float) -> None:
        was_bounded = self._num_decoding > 0  # a step with nobody to wait for it may be as long as it likes
        self._num_decoding = num_decoding
        if not num_tokens or duration_s <= 0:
            return
        num_decode_tokens = num_tokens - num_prompt_tokens
        if num_decode_tokens and num_prompt_tokens <= 1:  # one: of a prompt that is left out for once
            self._observe_decodes(duration_s)
        elif num_decode_tokens and self._decode_s:
            self._observe_prompts(num_prompt_tokens, duration_s)
            if was_bounded:
                self._num_mixed += 1
                too_slow = duration_s > self._slowdown * self._tail * self._decode_s
                self._aim = min(max(self._aim * (1 - 0.1 * (too_slow - _SLOW)), _LEAST_AIM), 1.0)
        elif num_prompt_tokens >= _TELLING_CHUNK:
            self._token_s = _follow(self._token_s, duration_s / num_prompt_tokens, _GAIN)

    def _observe_decodes(self, duration_s: float) -> None:
        self._decode_s = _follow(self._decode_s, duration_s, _GAIN)
        slow = duration_s > self._tail * self._decode_s
        # stochastic approximation of a quantile (Robbins and Monro, 1951)
        self._tail = max(self._tail + _TAIL_GAIN * (slow - _SLOW), _LEAST_TAIL)
        self._num_mixed = 0

    def _observe_prompts(self, num_prompt_tokens: int, duration_s: float) -> None:
        least_s = 0.05 * duration_s / num_prompt_tokens  # for a step that came out faster than decodes alone
        token_s = max((duration_s - self._decode_s) / num_prompt_tokens, least_s)
        weight = num_prompt_tokens**2 / (num_prompt_tokens**2 + _NOISY_CHUNK**2)
        self._token_s = _follow(self._token_s, token_s, _GAIN * weight)

    def _chunk(self) -> int:
        """Prompt tokens that fit beside the decodes; a fixed share of the budget until both times are known."""
        if not self._decode_s or not self._token_s:
            return self.max_num_batched_tokens // 8
        return int(self._aim * (self._slowdown - 1) * self._decode_s / self._token_s)


def _follow(estimate: float, observed: float, gain: float) -> float:
    if not estimate:
        return observed
    bounded = min(max(observed, estimate / _MAX_JUMP), estimate * _MAX_JUMP)
    return estimate + gain * (bounded - estimate)


def make_budget(max_num_batched_tokens: int, slowdown: float) -> TokenBudget:
    """A budget that follows the steps' times; with a slowdown of 0 a fixed one. Raises ConfigError."""
    if slowdown == 0:
        return FixedBudget(max_num_batched_tokens)
    return LatencyBudget(max_num_batched_tokens, slowdown)
