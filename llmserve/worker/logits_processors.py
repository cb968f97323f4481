"""What a request may ask to be done to its logits before a token is drawn, one class each. Draws nothing.

Each works on one row, and only rows that ask are visited: a batch of plain requests pays nothing. Order and formulas
are those of vLLM's sampler: allowed ids, minimum length, bad words, logit bias, then penalties.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from llmserve.messages import SamplingParams

TokenArray = npt.NDArray[np.int32]
_NEVER = float("-inf")


class LogitsProcessor(Protocol):
    """Changes one row of logits in place."""

    def apply(self, logits: torch.Tensor, prompt: TokenArray, output: TokenArray) -> None:
        """logits float32 [vocab]; the row's prompt tokens, and those generated so far."""
        ...


class AllowedTokens:
    """Only these ids may be drawn."""

    def __init__(self, token_ids: list[int], vocab_size: int, device: torch.device) -> None:
        self._forbidden = torch.ones(vocab_size, dtype=torch.bool, device=device)
        self._forbidden[token_ids] = False

    def apply(self, logits: torch.Tensor, prompt: TokenArray, output: TokenArray) -> None:
        logits.masked_fill_(self._forbidden, _NEVER)


class MinTokens:
    """Nothing that ends the sequence may be drawn before `min_tokens`."""

    def __init__(self, min_tokens: int, stop_token_ids: list[int], device: torch.device) -> None:
        self._min_tokens = min_tokens
        self._stop_token_ids = torch.tensor(stop_token_ids, dtype=torch.int64, device=device)

    def apply(self, logits: torch.Tensor, prompt: TokenArray, output: TokenArray) -> None:
        if len(output) < self._min_tokens:
            logits[self._stop_token_ids] = _NEVER


class BadWords:
    """The last token of a bad sequence may not be drawn when the tokens before it have just been."""

    def __init__(self, sequences: list[list[int]]) -> None:
        self._sequences = [(np.asarray(s[:-1], dtype=np.int32), s[-1]) for s in sequences]

    def apply(self, logits: torch.Tensor, prompt: TokenArray, output: TokenArray) -> None:
        for beginning, last in self._sequences:
            size = len(beginning)
            if size <= len(output) and np.array_equal(output[len(output) - size :], beginning):
                logits[last] = _NEVER


class LogitBias:
    """OpenAI's `logit_bias`: added to the logits of the given ids."""

    def __init__(self, bias: dict[int, float], device: torch.device) -> None:
        self._token_ids = torch.tensor(list(bias), dtype=torch.int64, device=device)
        self._values = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)

    def apply(self, logits: torch.Tensor, prompt: TokenArray, output: TokenArray) -> None:
        logits[self._token_ids] += self._values


class Penalties:
    """Repetition (CTRL, arXiv 1909.05858: prompt and output), frequency and presence (OpenAI: output only).

    Counts are kept from step to step: a step costs what it generated, not the length of the context.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, device: torch.device) -> None:
        self._repetition = params.repetition_penalty
        self._frequency = params.frequency_penalty
        self._presence = params.presence_penalty
        self._counts = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._num_counted = -1  # -1: the prompt has not been read either

    def apply(self, logits: torch.Tensor, prompt: TokenArray, output: TokenArray) -> None:
        if self._num_counted < 0:
            self._seen[torch.from_numpy(prompt.astype(np.int64)).to(logits.device)] = True
            self._num_counted = 0
        for token_id in output[self._num_counted :].tolist():
            self._counts[token_id] += 1
            self._seen[token_id] = True
        self._num_counted = len(output)
        if self._repetition != 1.0:
            penalised = torch.where(logits > 0, logits / self._repetition, logits * self._repetition)
            torch.where(self._seen, penalised, logits, out=logits)
        if self._frequency != 0.0:
            logits.sub_(self._counts, alpha=self._frequency)
        if self._presence != 0.0:
            logits.sub_(self._counts.clamp(max=1), alpha=self._presence)


def build_processors(params: SamplingParams, vocab_size: int, device: torch.device) -> list[LogitsProcessor]:
    """The processors a request needs, in the order they apply; usually none."""
    processors: list[LogitsProcessor] = []
    if params.allowed_token_ids is not None:
        processors.append(AllowedTokens(params.allowed_token_ids, vocab_size, device))
    if params.min_tokens > 0 and params.stop_token_ids:
        processors.append(MinTokens(params.min_tokens, params.stop_token_ids, device))
    if params.bad_words:
        processors.append(BadWords(params.bad_words))
    if params.logit_bias:
        processors.append(LogitBias(params.logit_bias, device))
    if params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
        processors.append(Penalties(params, vocab_size, device))
    return processors
