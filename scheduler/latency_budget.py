"""A token budget that keeps a prompt from freezing the streams beside it. Knows no request and no clock.

While nothing decodes, a step takes all it may. While requests decode, prompts get as many tokens as keep the step
within `slowdown` times a step of decodes alone, by a model of step time learnt from the steps themselves:

    seconds = decode_s + token_s * prompt tokens

Only the ratio of the two decides. Steps without prompt tokens teach `decode_s`, mixed ones `token_s`. Where prompts
never pause, a step leaves them out to see what decodes cost now: one in sixty-four, and one at once when many more or
many fewer requests decode than when they were last seen alone. Until then nothing is learnt from mixed steps.

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
_LEAST_AIM = 0.5  # a machine that stutters for reasons of its own does not starve prompts
_MIN_CHUNK = 4  # prompt tokens a step always has room for, or a prompt would never be computed
_MIN_ROOM = 16  # tokens beside the decodes where no prompt is in progress: a sequence's drafts, or a prompt's beginning
_FEW_SEQS = 32  # decodes are seen alone if so many of them have no more than one prompt token beside them
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
        self._num_measured = 0  # requests that decoded when `decode_s` was last taken
        self._num_mixed = 0  # steps since prompts were last left out

    def next_step(self, num_running: int) -> int:
        if not self._num_decoding:
            return self.max_num_batched_tokens
        if self._num_mixed >= (_PROBE_STEPS if self._is_measured(self._num_decoding) else 1):
            self._num_mixed = 0  # even if something comes between, prompts are not left out again at once
            chunk = 0
        else:
            chunk = max(self._chunk(), _MIN_CHUNK if num_running > self._num_decoding else _MIN_ROOM)
        return min(max(self._num_decoding + chunk, num_running), self.max_num_batched_tokens)

    def observe(self, num_tokens: int, num_prompt_tokens: int, num_decoding: int, duration_s: float) -> None:
        num_before, self._num_decoding = self._num_decoding, num_decoding
        if not num_tokens or duration_s <= 0:
            return
        num_decode_tokens = num_tokens - num_prompt_tokens
        # a few: of a prompt that is left out for once, or where places were left over
        if num_decode_tokens and num_prompt_tokens <= max(1, num_decode_tokens // _FEW_SEQS):
            self._observe_decodes(num_before or num_decoding, duration_s)
        elif not num_before:  # nobody waits for such a step: it may be as long as it likes
            if num_prompt_tokens >= _TELLING_CHUNK:
                self._observe_prompts(num_prompt_tokens, duration_s)
        else:
            self._num_mixed += 1
            if self._is_measured(num_before):
                self._observe_prompts(num_prompt_tokens, duration_s)
                too_slow = duration_s > self._slowdown * self._tail * self._decode_s
                self._aim = min(max(self._aim * (1 - 0.1 * (too_slow - _SLOW)), _LEAST_AIM), 1.0)

    def _is_measured(self, num_decoding: int) -> bool:
        """Whether `decode_s` is of about so many requests."""
        return (self._num_measured - 1) / 1.5 <= num_decoding <= 1.5 * self._num_measured + 1

    def _observe_decodes(self, num_decoding: int, duration_s: float) -> None:
        self._num_mixed = 0
        if not self._is_measured(num_decoding) or not self._decode_s:
            self._num_measured, self._decode_s = num_decoding, duration_s
            return
        self._num_measured = num_decoding
        self._decode_s = _follow(self._decode_s, duration_s, _GAIN)
        slow = duration_s > self._tail * self._decode_s
        # stochastic approximation of a quantile (Robbins and Monro, 1951)
        self._tail = max(self._tail + _TAIL_GAIN * (slow - _SLOW), _LEAST_TAIL)

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
