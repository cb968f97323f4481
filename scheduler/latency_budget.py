"""A token budget that keeps a prompt from freezing the streams beside it. Knows no request and no clock.

While nothing decodes, a step takes all it may. While requests decode, prompts get as many tokens as keep the step
within `slowdown` times a step of decodes alone, by a model of step time learnt from the steps themselves:

    seconds = decode_s + token_s * prompt tokens

Only the ratio of the two decides. Steps (nearly) without prompt tokens teach `decode_s`, mixed ones `token_s`. Under a
load so high that every step is mixed, one step in sixty-four leaves the prompts out, to see what decodes cost now.
"""

from __future__ import annotations

from llmserve.errors import ConfigError
from llmserve.scheduler.budget import FixedBudget, TokenBudget

_GAIN = 0.2  # share of a new observation: a change of load is followed within some ten steps
_MAX_JUMP = 3.0  # one slow step (another process had the core) counts for at most this factor
_PROBE_STEPS = 64  # mixed steps in a row after which one measures decodes alone
_FEW_TOKENS = 8  # prompt tokens that do not lengthen a step
_MIN_CHUNK = 16  # prompt tokens a step always has room for, or a prompt would never be computed
_TELLING_CHUNK = 32  # prompt tokens below which a step without decodes says more of its fixed cost than of a token's


class LatencyBudget:
    """Implements `TokenBudget`. `slowdown` is the price in inter-token latency that a prompt may ask of others."""

    def __init__(self, max_num_batched_tokens: int, slowdown: float) -> None:
        if not slowdown > 1:
            raise ConfigError(f"itl_slowdown must be above 1, not {slowdown}: a prompt could never be computed.")
        self.max_num_batched_tokens = max_num_batched_tokens
        self._slowdown = slowdown
        self._decode_s = 0.0  # 0: not known yet
        self._token_s = 0.0
        self._num_decoding = 0
        self._num_mixed = 0  # steps since one without prompts

    def next_step(self, num_running: int) -> int:
        if not self._num_decoding:
            return self.max_num_batched_tokens
        chunk = 0 if self._num_mixed >= _PROBE_STEPS else max(self._chunk(), _MIN_CHUNK)
        room = self._num_decoding + chunk
        return min(max(room, num_running), self.max_num_batched_tokens)

    def observe(self, num_tokens: int, num_prompt_tokens: int, num_decoding: int, duration_s: float) -> None:
        self._num_decoding = num_decoding
        if not num_tokens or duration_s <= 0:
            return
        num_decode_tokens = num_tokens - num_prompt_tokens
        if num_decode_tokens and num_prompt_tokens <= _FEW_TOKENS:
            self._decode_s = _follow(self._decode_s, duration_s)
            self._num_mixed = 0
        elif not num_decode_tokens or not self._decode_s:
            if num_prompt_tokens >= _TELLING_CHUNK:
                self._token_s = _follow(self._token_s, duration_s / num_prompt_tokens)
        else:
            self._num_mixed += 1
            least_s = 0.05 * duration_s / num_prompt_tokens  # for a step that came out faster than decodes alone
            self._token_s = _follow(self._token_s, max((duration_s - self._decode_s) / num_prompt_tokens, least_s))

    def _chunk(self) -> int:
        """Prompt tokens that fit beside the decodes; a fixed share of the budget until both times are known."""
        if not self._decode_s or not self._token_s:
            return self.max_num_batched_tokens // 8
        return int((self._slowdown - 1) * self._decode_s / self._token_s)


def _follow(estimate: float, observed: float) -> float:
    if not estimate:
        return observed
    bounded = min(max(observed, estimate / _MAX_JUMP), estimate * _MAX_JUMP)
    return estimate + _GAIN * (bounded - estimate)


def make_budget(max_num_batched_tokens: int, slowdown: float) -> TokenBudget:
    """A budget that follows the steps' times; with a slowdown of 0 a fixed one. Raises ConfigError."""
    if slowdown == 0:
        return FixedBudget(max_num_batched_tokens)
    return LatencyBudget(max_num_batched_tokens, slowdown)
