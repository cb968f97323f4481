"""The device's view of every request it holds: one row each, kept from step to step. Schedules nothing.

A step's inputs are gathered from the rows by a handful of vectorised reads: no loop over requests or tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmserve.messages import SamplingParams
from llmserve.scheduler.output import SchedulerOutput
from llmserve.scheduler.request import PENDING

IntArray = npt.NDArray[np.int64]


@dataclass(slots=True)
class StepInputs:
    """Host arrays of one ragged batch: s sequences, t tokens. Sequence i owns rows query_start[i]:query_start[i+1]."""

    request_ids: list[str]
    rows: IntArray  # [s]: row of each sequence in the batch
    query_start: IntArray  # [s + 1]
    seq_lens: IntArray  # [s]: context with this step's tokens
    token_ids: IntArray  # [t]
    positions: IntArray  # [t]
    slot_mapping: IntArray  # [t]
    num_samples: IntArray  # [s]: rows of the sequence that draw a token: 0 in mid-prompt, 1, or more to verify drafts
    sample_rows: IntArray  # [r]: which of the t tokens these are, sequence by sequence
    sample_sequences: IntArray  # [r]: which of the s sequences they belong to


@dataclass(slots=True)
class Draws:
    """The r tokens of a step in flight: whose they are, and where they will stand."""

    request_ids: list[str]
    rows: IntArray  # [r]
    positions: IntArray  # [r]
    stays: IntArray  # [r]: of the rows, when the step began


@dataclass(slots=True)
class _Parked:
    """What is kept of a preempted request."""

    token_ids: npt.NDArray[np.int32]
    num_prompt_tokens: int
    stay: int


class InputBatch:
    """Rows of `max_num_seqs` running requests; preempted ones keep their tokens outside until they resume."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self.block_size = block_size
        max_blocks = -(-max_model_len // block_size)
        # calloc'ed: pages of rows and contexts never used cost no memory
        self.token_ids = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int32)
        self.block_table = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self.num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_computed = np.zeros(max_num_seqs, dtype=np.int64)
        self.temperature = np.zeros(max_num_seqs, dtype=np.float32)
        self.top_k = np.zeros(max_num_seqs, dtype=np.int64)
        self.top_p = np.ones(max_num_seqs, dtype=np.float32)
        self.min_p = np.zeros(max_num_seqs, dtype=np.float32)
        self.seeds = np.zeros(max_num_seqs, dtype=np.int64)
        self.stays = np.zeros(max_num_seqs, dtype=np.int64)  # which entry into the batch a row holds; 0: none
        self.row_of: dict[str, int] = {}
        self.params: dict[str, SamplingParams] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._parked: dict[str, _Parked] = {}
        self._num_stays = 0

    def apply(self, output: SchedulerOutput) -> None:
        """Brings the rows up to what the scheduler decided."""
        for request_id in output.finished_ids:
            self._forget(request_id)
        for request_id in output.preempted_ids:
            self._park(request_id)
        for new in output.new_requests:
            self.params[new.request_id] = new.params
            tokens = np.asarray(new.prompt_token_ids + new.output_token_ids, dtype=np.int32)
            num_prompt = len(new.prompt_token_ids)
            self._enter(new.request_id, tokens, num_prompt, new.block_ids, new.num_computed_tokens)
        for request_id, resumed in output.resumed_requests.items():
            parked = self._parked.pop(request_id)
            self._enter(
                request_id, parked.token_ids, parked.num_prompt_tokens, resumed.block_ids, resumed.num_computed_tokens
            )
        for request_id, block_ids in output.new_block_ids.items():
            row = self.row_of[request_id]
            held = self.num_blocks[row]
            self.block_table[row, held : held + len(block_ids)] = block_ids
            self.num_blocks[row] = held + len(block_ids)

    def gather(self, output: SchedulerOutput) -> StepInputs:
        """The inputs of the step, in the scheduler's batch order."""
        request_ids = list(output.num_scheduled_tokens)
        counts = np.fromiter(output.num_scheduled_tokens.values(), dtype=np.int64, count=len(request_ids))
        rows = np.fromiter(map(self.row_of.__getitem__, request_ids), dtype=np.int64, count=len(request_ids))
        query_start = np.zeros(len(request_ids) + 1, dtype=np.int64)
        np.cumsum(counts, out=query_start[1:])
        for request_id, drafts in output.draft_token_ids.items():
            row = self.row_of[request_id]
            self.token_ids[row, self.num_tokens[row] : self.num_tokens[row] + len(drafts)] = drafts
        computed = self.num_computed[rows]
        seq_lens = computed + counts
        num_samples = np.maximum(seq_lens - self.num_tokens[rows] + 1, 0)
        sample_sequences = np.repeat(np.arange(len(rows)), num_samples)
        token_rows = np.repeat(rows, counts)
        positions = np.arange(query_start[-1]) + np.repeat(computed - query_start[:-1], counts)
        blocks = self.block_table[token_rows, positions // self.block_size].astype(np.int64)
        return StepInputs(
            request_ids=request_ids,
            rows=rows,
            query_start=query_start,
            seq_lens=seq_lens,
            token_ids=self.token_ids[token_rows, positions].astype(np.int64),
            positions=positions,
            slot_mapping=blocks * self.block_size + positions % self.block_size,
            num_samples=num_samples,
            # the last num_samples rows of each sequence: counted back from where its samples and its rows end
            sample_rows=np.arange(len(sample_sequences)) + (query_start[1:] - num_samples.cumsum())[sample_sequences],
            sample_sequences=sample_sequences,
        )

    def advance(self, inputs: StepInputs, sampled: IntArray) -> IntArray:
        """Records the step: what was computed, and the tokens drawn [r]; returns how many each sequence keeps [s].

        A sequence keeps its draws up to the first that is not the draft behind it. Those before it are in the table.
        """
        self.num_computed[inputs.rows] = inputs.seq_lens
        num_kept = inputs.num_samples.copy()
        sequences = np.flatnonzero(num_kept)
        rows = inputs.rows[sequences]
        ends = num_kept.cumsum()[sequences]  # of each sequence's draws
        if len(sampled) > len(sequences):
            starts = ends - num_kept[sequences]
            drafts = self.token_ids[inputs.rows[inputs.sample_sequences], inputs.positions[inputs.sample_rows] + 1]
            index = np.arange(len(sampled))
            differs = np.where(sampled == drafts, len(sampled), index)
            differs[ends - 1] = ends - 1  # no draft stands behind the last
            num_kept[sequences] = np.minimum.reduceat(differs, starts) - starts + 1
            ends = starts + num_kept[sequences]
            self.num_computed[rows] = self.num_tokens[rows] + num_kept[sequences] - 1
        self.num_tokens[rows] += num_kept[sequences]
        self.token_ids[rows, self.num_tokens[rows] - 1] = sampled[ends - 1]
        return num_kept

    def promise(self, inputs: StepInputs) -> Draws:
        """Records a step without drafts whose tokens are not known yet: PENDING ones stand for them until `fulfil`."""
        self.num_computed[inputs.rows] = inputs.seq_lens
        sequences = inputs.sample_sequences
        rows, positions = inputs.rows[sequences], inputs.seq_lens[sequences]
        self.token_ids[rows, positions] = PENDING
        self.num_tokens[rows] = positions + 1
        return Draws([inputs.request_ids[i] for i in sequences.tolist()], rows, positions, self.stays[rows])

    def fulfil(self, draws: Draws, sampled: IntArray) -> None:
        """The tokens of a promise, [r]. Who has been preempted since gets its own where it is kept; who is gone,
        none."""
        held = self.stays[draws.rows] == draws.stays
        self.token_ids[draws.rows[held], draws.positions[held]] = sampled[held]
        for index in np.flatnonzero(~held).tolist():
            parked = self._parked.get(draws.request_ids[index])
            if parked is not None and parked.stay == draws.stays[index]:
                parked.token_ids[draws.positions[index]] = sampled[index]

    def output_token_ids(self, row: int) -> npt.NDArray[np.int32]:
        """The tokens generated so far in a row."""
        return self.token_ids[row, self.num_prompt_tokens[row] : self.num_tokens[row]]

    def prompt_token_ids(self, row: int) -> npt.NDArray[np.int32]:
        """The prompt of a row."""
        return self.token_ids[row, : self.num_prompt_tokens[row]]

    def _enter(
        self, request_id: str, tokens: npt.NDArray[np.int32], num_prompt: int, block_ids: list[int], num_computed: int
    ) -> None:
        assert tokens[-1] != PENDING, "a row begins with tokens that the host knows"
        row = self._free_rows.pop()
        self.row_of[request_id] = row
        self._num_stays += 1
        self.stays[row] = self._num_stays
        self.token_ids[row, : len(tokens)] = tokens
        self.num_tokens[row] = len(tokens)
        self.num_prompt_tokens[row] = num_prompt
        self.num_computed[row] = num_computed
        self.block_table[row, : len(block_ids)] = block_ids
        self.num_blocks[row] = len(block_ids)
        params = self.params[request_id]
        self.temperature[row] = params.temperature
        self.top_k[row] = params.top_k
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.seeds[row] = params.seed

    def _park(self, request_id: str) -> None:
        row = self.row_of[request_id]
        self._parked[request_id] = _Parked(
            self.token_ids[row, : self.num_tokens[row]].copy(), int(self.num_prompt_tokens[row]), int(self.stays[row])
        )
        self._leave(request_id)

    def _forget(self, request_id: str) -> None:
        if self.params.pop(request_id, None) is None:
            return  # it left the queue before it ever ran
        if self._parked.pop(request_id, None) is None:
            self._leave(request_id)

    def _leave(self, request_id: str) -> None:
        row = self.row_of.pop(request_id)
        self.stays[row] = 0
        self._free_rows.append(row)
