"""A step's inputs from the rows a GPU keeps and what the host staged, as `step_ops.StepOps` says. Knows no requests.

For t tokens of s sequences: 4 integers of staging read a sequence, one a token, and some 30 bytes written a token; a
binary search over the sequences' starts finds whose a token is. One launch takes the place of some twenty.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from llmserve.kernels.step_ops import HEADER, LAST_TOKEN, ReferenceStepOps, StagedStep, StepTensors

_LANES = 128


@triton.jit
def find_sequences(query_start_ptr, token, num_seqs, STEPS: tl.constexpr):
    """The last sequence that begins at or before each token: of several that begin there all but the last are empty."""
    low = tl.zeros_like(token)
    high = low + num_seqs
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        starts_before = tl.load(query_start_ptr + middle) <= token
        is_open = high - low > 1
        low = tl.where(is_open & starts_before, middle, low)
        high = tl.where(is_open & (~starts_before), middle, high)
    return low


@triton.jit(do_not_specialize=["num_tokens", "num_seqs", "num_draws"])
def expand_kernel(
    rows_ptr, null_row_ptr, seq_rows_ptr, num_computed_ptr, query_start_ptr, draw_tokens_ptr, given_ptr, token_ids_ptr,
    positions_ptr, slots_ptr, seq_lens_ptr, draw_positions_ptr, num_tokens, num_seqs, num_draws, WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, FIRST_BLOCK: tl.constexpr, LAST: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Grid: as many lanes as there are tokens, sequences or draws. FIRST_BLOCK and LAST are columns of a row."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    end = tl.load(query_start_ptr + num_seqs)
    null_block = tl.load(null_row_ptr + FIRST_BLOCK)

    is_token = lane < num_tokens
    is_real = lane < end
    seq = find_sequences(query_start_ptr, lane, num_seqs, STEPS)
    position = tl.load(num_computed_ptr + seq) + lane - tl.load(query_start_ptr + seq)
    position = tl.where(is_real, position, 0)
    row_ptr = rows_ptr + tl.load(seq_rows_ptr + seq).to(tl.int64) * WIDTH
    block = tl.load(row_ptr + FIRST_BLOCK + position // BLOCK_SIZE, mask=is_real & is_token, other=0)
    block = tl.where(is_real, block, null_block).to(tl.int64)
    given = tl.load(given_ptr + lane, mask=is_token, other=0)
    token_id = tl.where(given < 0, tl.load(row_ptr + LAST), given)
    tl.store(token_ids_ptr + lane, token_id.to(tl.int64), mask=is_token)
    tl.store(positions_ptr + lane, position.to(tl.int64), mask=is_token)
    tl.store(slots_ptr + lane, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=is_token)

    is_seq = lane < num_seqs
    length = tl.load(query_start_ptr + lane + 1, mask=is_seq, other=0) - tl.load(
        query_start_ptr + lane, mask=is_seq, other=0
    )
    computed = tl.load(num_computed_ptr + lane, mask=is_seq, other=0)
    tl.store(seq_lens_ptr + lane, computed + length, mask=is_seq)

    is_draw = lane < num_draws
    token = tl.load(draw_tokens_ptr + lane, mask=is_draw, other=0)
    draw_seq = find_sequences(query_start_ptr, token, num_seqs, STEPS)
    drawn_at = tl.load(num_computed_ptr + draw_seq) + token - tl.load(query_start_ptr + draw_seq)
    drawn_at = tl.where(token < end, drawn_at, 0) + 1
    tl.store(draw_positions_ptr + lane, drawn_at.to(tl.int64), mask=is_draw)


class TritonStepOps(ReferenceStepOps):
    """Implements `StepOps`; what is written to the rows is little, and torch's to write."""

    def expand(self, rows: torch.Tensor, staged: StagedStep, block_size: int) -> StepTensors:
        num_tokens, num_seqs = staged.token_ids.shape[0], staged.rows.shape[0]
        num_draws, width = staged.draw_tokens.shape[0], rows.shape[1]
        wide = partial(torch.empty, dtype=torch.int64, device=rows.device)
        step = StepTensors(
            token_ids=wide(num_tokens),
            positions=wide(num_tokens),
            slot_mapping=wide(num_tokens),
            seq_lens=torch.empty(num_seqs, dtype=torch.int32, device=rows.device),
            block_table=rows.index_select(0, staged.rows)[:, HEADER:],
            draw_positions=wide(num_draws),
        )
        expand_kernel[(triton.cdiv(max(num_tokens, num_seqs, num_draws), _LANES),)](
            rows, rows[-1], staged.rows, staged.num_computed, staged.query_start, staged.draw_tokens, staged.token_ids,
            step.token_ids, step.positions, step.slot_mapping, step.seq_lens, step.draw_positions, num_tokens, num_seqs,
            num_draws, WIDTH=width, BLOCK_SIZE=block_size, FIRST_BLOCK=HEADER, LAST=LAST_TOKEN,
            STEPS=rows.shape[0].bit_length(), LANES=_LANES, num_warps=4,
        )  # fmt: skip
        return step
