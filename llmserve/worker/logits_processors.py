"""What a request may ask to be done to its logits before a token is drawn, as rows of tables on the device. Draws
nothing.

A sequence's row is its row of the input batch. It is written when the sequence enters the batch; from then on a step
costs the host nothing, and the device counts what it draws. A batch of plain requests pays nothing at all. Order and
formulas are those of vLLM's sampler: allowed ids, minimum length, bad words, logit bias, then penalties.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from llmserve.kernels.memory import cache_zeros
from llmserve.kernels.ops import MAX_COUNT, MAX_ENTRIES, LogitAdjustments
from llmserve.messages import SamplingParams

TokenArray = npt.NDArray[np.int32]
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

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        """Allocates `table_bytes`; on a CPU memory is taken only as rows are written."""
        self._vocab_size = vocab_size
        self._device = device
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
        entries = _entries(params, len(prompt))
        is_used = bool(entries) or is_penalised(params) or params.allowed_token_ids is not None
        tables = self._tables
        if is_used or self._is_used[row]:
            tables.is_used[row] = is_used
        self._is_used[row] = is_used
        if not is_used:
            return
        self._write_bitmask(row, params.allowed_token_ids)
        self._write_entries(row, entries)
        tables.repetition[row] = params.repetition_penalty
        tables.frequency[row] = params.frequency_penalty
        tables.presence[row] = params.presence_penalty
        if is_penalised(params):
            counts = np.bincount(output, minlength=self._vocab_size).clip(max=MAX_COUNT) * 2
            counts[prompt] |= 1
            tables.token_counts[row] = torch.from_numpy(counts.astype(np.int16)).to(self._device)

    def are_used(self, rows: npt.NDArray[np.int64]) -> bool:
        """Whether anything is to be done to the logits of sequences in these rows of the batch."""
        return bool(self._is_used[rows].any())

    def of(self, slots: torch.Tensor) -> LogitAdjustments:
        """The adjustments of logits whose sequences stand in these rows of the batch, int64 [r] on the device."""
        return replace(self._tables, slots=slots)

    def _write_bitmask(self, row: int, allowed: list[int] | None) -> None:
        self._tables.is_masked[row] = allowed is not None
        if allowed is not None:
            words = np.zeros(self._tables.bitmask.shape[1], dtype=np.uint32)
            ids = np.asarray(allowed, dtype=np.int64)
            np.bitwise_or.at(words, ids // 32, np.uint32(1) << (ids % 32).astype(np.uint32))
            self._tables.bitmask[row] = torch.from_numpy(words.view(np.int32)).to(self._device)

    def _write_entries(self, row: int, entries: list[tuple[int, float, int]]) -> None:
        assert len(entries) <= MAX_ENTRIES  # the API bounds biases, bad words and stop tokens
        self._tables.num_entries[row] = len(entries)
        if entries:
            ids, values, until = zip(*sorted(entries), strict=True)
            tables = self._tables
            tables.entry_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32, device=self._device)
            tables.entry_values[row, : len(ids)] = torch.tensor(values, dtype=torch.float32, device=self._device)
            tables.entry_until[row, : len(ids)] = torch.tensor(until, dtype=torch.int64, device=self._device)


def table_bytes(max_num_seqs: int, vocab_size: int) -> int:
    """What `AdjustmentTables` allocates."""
    return (max_num_seqs + 1) * (2 * vocab_size + -(-vocab_size // 32) * 4 + MAX_ENTRIES * 16 + 24)


def is_penalised(params: SamplingParams) -> bool:
    """Whether tokens seen before are made less, or more, likely."""
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


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
