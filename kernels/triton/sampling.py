"""Draws a token from each row of logits: greedy, or the largest of logit / temperature + noise among what may be drawn.

logits float32 [r, vocab] -> ids int64 [r]. Without filters one pass over the logits (4 bytes and about 45 operations a
token; greedy rows 2), in chunks that many programs share, and a pass over the chunks' winners. With top-k, top-p or
min-p, `thresholds` makes two passes more. A row's draw depends on its logits, seed and position alone: chunks are
fixed, and the largest of a row is the same in any order, the smallest id among equals.
"""

import torch
import triton
import triton.language as tl

from llmserve.kernels.ops import SamplingTensors
from llmserve.kernels.triton.noise import gumbel, noise_keys
from llmserve.kernels.triton.thresholds import MAX_CANDIDATES, SPAN, threshold_kernel

_CHUNK = 4096


@triton.jit
def draw_kernel(
    logits_ptr, temperature_ptr, seeds_ptr, positions_ptr, threshold_ptr, value_ptr, id_ptr, VOCAB: tl.constexpr,
    CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, HAS_THRESHOLD: tl.constexpr, ALL_GREEDY: tl.constexpr,
):  # fmt: skip
    """Grid: rows, chunks. The winner of a chunk: value float32 and id int32, [r, NUM_CHUNKS]."""
    row = tl.program_id(0).to(tl.int64)
    token_id = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(logits_ptr + row * VOCAB + token_id, mask=token_id < VOCAB, other=float("-inf"))
    if not ALL_GREEDY:
        temperature = tl.load(temperature_ptr + row)
        if temperature > 0:
            value = tl.div_rn(value, temperature)
            if HAS_THRESHOLD:
                value = tl.where(value >= tl.load(threshold_ptr + row), value, float("-inf"))
            if tl.max(value, axis=0) > float("-inf"):  # noise is most of the work, and most chunks are filtered out
                key0, key1 = noise_keys(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
                value += gumbel(token_id, key0, key1)
    best, index = tl.max(value, axis=0, return_indices=True)
    at = row * NUM_CHUNKS + tl.program_id(1)
    tl.store(value_ptr + at, best)
    tl.store(id_ptr + at, tl.program_id(1) * CHUNK + index)


@triton.jit
def pick_kernel(value_ptr, id_ptr, out_ptr, NUM_CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr):
    """Grid: rows. The winner of the winners; the first chunk's among equals, which has the smallest ids."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS_PADDED)
    inside = chunk < NUM_CHUNKS
    value = tl.load(value_ptr + row * NUM_CHUNKS + chunk, mask=inside, other=float("-inf"))
    _, winner = tl.max(value, axis=0, return_indices=True)
    tl.store(out_ptr + row, tl.load(id_ptr + row * NUM_CHUNKS + winner).to(tl.int64))


def sample(logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
    """As `Ops.sample`: logits float32 [r, vocab] -> token ids int64 [r]."""
    assert logits.is_contiguous()
    assert logits.dtype is torch.float32
    (rows, vocab), device = logits.shape, logits.device
    out = torch.empty(rows, dtype=torch.int64, device=device)
    if not rows:
        return out
    num_chunks = triton.cdiv(vocab, _CHUNK)
    values = torch.empty((rows, num_chunks), dtype=torch.float32, device=device)
    ids = torch.empty((rows, num_chunks), dtype=torch.int32, device=device)
    has_threshold = not sampling.all_greedy and (sampling.any_top_k or sampling.any_top_p or sampling.any_min_p)
    threshold = _thresholds(logits, sampling) if has_threshold else values
    draw_kernel[(rows, num_chunks)](
        logits, sampling.temperature, sampling.seeds, sampling.positions, threshold, values, ids, VOCAB=vocab,
        CHUNK=_CHUNK, NUM_CHUNKS=num_chunks, HAS_THRESHOLD=has_threshold, ALL_GREEDY=sampling.all_greedy, num_warps=8,
    )  # fmt: skip
    padded = triton.next_power_of_2(num_chunks)
    pick_kernel[(rows,)](values, ids, out, NUM_CHUNKS=num_chunks, CHUNKS_PADDED=padded, num_warps=1)
    return out


def _thresholds(logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
    rows, vocab = logits.shape
    threshold = torch.empty(rows, dtype=torch.float32, device=logits.device)
    scratch = torch.empty((rows, MAX_CANDIDATES), dtype=torch.float32, device=logits.device)
    threshold_kernel[(rows,)](
        logits,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        scratch,
        threshold,
        VOCAB=vocab,
        BLOCK=4096,
        SEARCH_BLOCK=1024,
        SPAN=SPAN,
        MAX_CANDIDATES=MAX_CANDIDATES,
        num_warps=8,
    )
    return threshold
