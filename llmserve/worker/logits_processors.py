"""What a request may ask to be done to its logits before a token is drawn, as rows of tables on the device. Draws
nothing.

A sequence's row is its row of the input batch. It is written when the sequence enters the batch; from then on a step
costs the host nothing, and the device counts what it draws. A batch of plain requests pays nothing at all. Order and
formulas are those of vLLM's sampler: allowed ids, minimum length, bad words, logit bias, then penalties.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from llmserve.kernels.memory import cache_zeros
from llmserve.kernels.ops import MAX_COUNT, MAX_ENTRIES, LogitAdjustments
from llmserve.messages import SamplingParams
from llmserve.scheduler.request import is_penalised

TokenArray = npt.NDArray[np.int32]
Submit = Callable[[Callable[[], None]], None]
_NEVER = float("-inf")
_FOREVER = 2**62


class BadWords:
    """The last token of a bad sequence may not be drawn when the tokens before it have just been.

    The host alone has what was generated: a step of a request that has these waits for the tokens of the one before.
    """

    def __init__(self, sequences: list[list[int]]) -> None:
        """Sequences of two tokens or more; a single token is a ban, and stands in the tables."""
        self._sequences = [(np.asarray(s[:-1], dtype=np.int32), s[-1]) for s in sequences]

    def apply(self, logits: torch.Tensor, output: TokenArray) -> None:
        """logits float32 [vocab], in place; the tokens generated so far."""
        for beginning, last in self._sequences:
            size = len(beginning)
            if size <= len(output) and np.array_equal(output[len(output) - size :], beginning):
                logits[last] = _NEVER


class AdjustmentTables:
    """The tables of `LogitAdjustments`, a row for each sequence that may run at once and one for padding."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device, submit: Submit | None = None) -> None:
        """Allocates `table_bytes`; on a CPU memory is taken only as rows are written: by `submit`, behind all that the
        device was asked for before, if it computes while the host goes on."""
        self._vocab_size = vocab_size
        self._device = device
        self._submit = submit or _at_once
        num_slots = max_num_seqs + 1
        self._is_used = np.zeros(num_slots, dtype=np.bool_)
        rows, entries = (num_slots,), (num_slots, MAX_ENTRIES)
        self._tables = LogitAdjustments(
            slots=torch.empty(0, dtype=torch.int64, device=device),
            is_used=torch.zeros(rows, dtype=torch.int32, device=device),
            bitmask=cache_zeros((num_slots, -(-vocab_size // 32)), torch.int32, device),
            is_masked=torch.zeros(rows, dtype=torch.int32, device=device),
            entry_ids=cache_zeros(entries, torch.int32, device),
            entry_values=cache_zeros(entries, torch.float32, device),
            entry_until=cache_zeros(entries, torch.int64, device),
            num_entries=torch.zeros(rows, dtype=torch.int32, device=device),
            repetition=torch.ones(rows, dtype=torch.float32, device=device),
            frequency=torch.zeros(rows, dtype=torch.float32, device=device),
            presence=torch.zeros(rows, dtype=torch.float32, device=device),
            token_counts=cache_zeros((num_slots, vocab_size), torch.int16, device),
        )

    def enter(self, row: int, params: SamplingParams, prompt: TokenArray, output: TokenArray) -> None:
        """A sequence takes a row of the batch, with what it has generated before."""
        entries = sorted(_entries(params, len(prompt)))
        assert len(entries) <= MAX_ENTRIES  # the API bounds biases, bad words and stop tokens
        was_used = self._is_used[row]
        is_used = bool(entries) or is_penalised(params) or params.allowed_token_ids is not None
        self._is_used[row] = is_used
        if is_used:
            words = None if params.allowed_token_ids is None else self._words(params.allowed_token_ids)
            counts = self._counts(prompt, output) if is_penalised(params) else None
            self._submit(partial(self._write, row, params, words, entries, counts))
        elif was_used:
            self._submit(partial(self._release, row))

    def are_used(self, rows: npt.NDArray[np.int64]) -> bool:
        """Whether anything is to be done to the logits of sequences in these rows of the batch."""
        return bool(self._is_used[rows].any())

    def of(self, slots: torch.Tensor) -> LogitAdjustments:
        """The adjustments of logits whose sequences stand in these rows of the batch, int64 [r] on the device."""
        return replace(self._tables, slots=slots)

    def _release(self, row: int) -> None:
        self._tables.is_used[row] = 0

    def _write(
        self,
        row: int,
        params: SamplingParams,
        words: torch.Tensor | None,
        entries: list[tuple[int, float, int]],
        counts: torch.Tensor | None,
    ) -> None:
        tables, device = self._tables, self._device
        tables.is_used[row] = 1
        tables.is_masked[row] = words is not None
        if words is not None:
            tables.bitmask[row] = words.to(device)
        tables.num_entries[row] = len(entries)
        if entries:
            ids, values, until = zip(*entries, strict=True)
            tables.entry_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32, device=device)
            tables.entry_values[row, : len(ids)] = torch.tensor(values, dtype=torch.float32, device=device)
            tables.entry_until[row, : len(ids)] = torch.tensor(until, dtype=torch.int64, device=device)
        tables.repetition[row] = params.repetition_penalty
        tables.frequency[row] = params.frequency_penalty
        tables.presence[row] = params.presence_penalty
        if counts is not None:
            tables.token_counts[row] = counts.to(device)

    def _words(self, allowed: list[int]) -> torch.Tensor:
        """A row of the bitmask."""
        words = np.zeros(-(-self._vocab_size // 32), dtype=np.uint32)
        ids = np.asarray(allowed, dtype=np.int64)
        np.bitwise_or.at(words, ids // 32, np.uint32(1) << (ids % 32).astype(np.uint32))
        return torch.from_numpy(words.view(np.int32))

    def _counts(self, prompt: TokenArray, output: TokenArray) -> torch.Tensor:
        """A row of `token_counts`."""
        counts = np.bincount(output, minlength=self._vocab_size).clip(max=MAX_COUNT) * 2
        counts[prompt] |= 1
        return torch.from_numpy(counts.astype(np.int16))


def _at_once(work: Callable[[], None]) -> None:
    work()


def table_bytes(max_num_seqs: int, vocab_size: int) -> int:
    """What `AdjustmentTables` allocates."""
    return (max_num_seqs + 1) * (2 * vocab_size + -(-vocab_size // 32) * 4 + MAX_ENTRIES * 16 + 24)


def bad_sequences(params: SamplingParams) -> BadWords | None:
    """Those of the bad words that take more than one token."""
    sequences = [sequence for sequence in params.bad_words or [] if len(sequence) > 1]
    return BadWords(sequences) if sequences else None


def _entries(params: SamplingParams, num_prompt_tokens: int) -> list[tuple[int, float, int]]:
    """(token id, what is added to its logit, the position from which on it no longer is)."""
    entries = [(token_id, value, _FOREVER) for token_id, value in (params.logit_bias or {}).items()]
    entries += [(word[0], _NEVER, _FOREVER) for word in params.bad_words or [] if len(word) == 1]
    if params.min_tokens > 0:
        entries += [(token_id, _NEVER, num_prompt_tokens + params.min_tokens) for token_id in params.stop_token_ids]
    return entries
