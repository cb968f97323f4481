"""Drawing tokens from logits in plain torch: filters, counter-based noise, log-probabilities. Knows no requests.

The noise of row r and token v is a Gumbel variate made from 32-bit integers alone, so that every implementation can
reproduce its bits. All arithmetic is modulo 2^32, shifts are logical, and `mix` is the finaliser of MurmurHash3
(Appleby, public domain):

    mix(h): h ^= h >> 16; h *= 0x85EBCA6B; h ^= h >> 13; h *= 0xC2B2AE35; h ^= h >> 16

    lo, hi = low and high 32 bits of the seed;  p = low 32 bits of the position
    key0 = mix(p ^ mix(lo ^ mix(hi ^ 0x9E3779B9)))
    key1 = mix(p + mix(hi ^ mix(lo ^ 0x7F4A7C15)))
    x    = mix(mix(v ^ key0) ^ key1)
    u    = ((x >> 9) + 0.5) * 2^-23        exact in float32, and never 0 or 1
    g    = -log(-log(u))                   float32

23 bits and not 24: (2^24 - 1) + 0.5 has no float32, it would round u to 1 and g to infinity.
The largest (logit / temperature + g) is a draw from the softmax (the Gumbel-max trick).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmserve.kernels.ops import SamplingTensors, TokenLogprobTensors
from llmserve.kernels.reference_adjustments import draw_adjusted

# MurmurHash3's multipliers and two odd constants of the golden ratio, as signed 32-bit integers.
_MUL0 = 0x85EBCA6B - (1 << 32)
_MUL1 = 0xC2B2AE35 - (1 << 32)
_SALT0 = 0x9E3779B9 - (1 << 32)
_SALT1 = 0x7F4A7C15
_TOP_P_FIRST_WIDTH = 1024  # candidates sorted at first; nearly always they hold the mass that top_p wants


def sample(logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
    """logits float32 [r, vocab] -> token ids int64 [r]; see `Ops.sample`."""
    return draw_adjusted(logits, sampling, _draw)


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> TokenLogprobTensors:
    """logits float32 [r, vocab], token_ids int64 [r]; see `Ops.token_logprobs`."""
    rows = torch.log_softmax(logits, dim=-1)
    chosen = rows.gather(1, token_ids[:, None])
    top = rows.topk(num_top, dim=-1)
    return TokenLogprobTensors(chosen[:, 0], (rows > chosen).sum(dim=-1) + 1, top.indices, top.values)


def _draw(logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
    greedy_ids = logits.argmax(dim=-1)  # the first of equals
    if sampling.all_greedy:
        return greedy_ids
    rows = torch.nonzero(sampling.temperature > 0).flatten()
    if not len(rows):
        return greedy_ids
    scaled = logits[rows] / sampling.temperature[rows, None]
    if sampling.any_min_p:
        scaled = apply_min_p(scaled, sampling.min_p[rows])
    if sampling.any_top_k:
        scaled = apply_top_k(scaled, sampling.top_k[rows])
    if sampling.any_top_p:
        scaled = apply_top_p(scaled, sampling.top_p[rows])
    noise = gumbel_noise(sampling.seeds[rows], sampling.positions[rows], logits.shape[1])
    return greedy_ids.index_copy(0, rows, (scaled + noise).argmax(dim=-1))


def apply_min_p(logits: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Keeps tokens at least `min_p` times as likely as the likeliest. logits [r, vocab], min_p [r]; 0 is off."""
    threshold = logits.amax(dim=-1) + min_p.log()  # log 0 = -inf keeps all
    return logits.masked_fill(logits < threshold[:, None], -torch.inf)


def apply_top_k(logits: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Keeps the `top_k` largest and whatever equals the last of them. logits [r, vocab], top_k int64 [r]; 0 is off."""
    vocab_size = logits.shape[1]
    limited = (top_k > 0) & (top_k < vocab_size)
    widest = int(torch.where(limited, top_k, 1).max())
    largest = logits.topk(widest, dim=-1).values  # sorted, largest first
    kth = largest.gather(1, (top_k.clamp(1, widest) - 1)[:, None])
    return logits.masked_fill((logits < kth) & limited[:, None], -torch.inf)


def apply_top_p(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keeps the smallest set of likeliest tokens whose probabilities reach `top_p`, at least one, and whatever equals
    the last of them. logits [r, vocab], top_p [r]; 1 is off."""
    probs = logits.softmax(dim=-1)
    for width in (min(_TOP_P_FIRST_WIDTH, logits.shape[1]), logits.shape[1]):
        largest = probs.topk(width, dim=-1).values
        mass_before = F.pad(largest.cumsum(dim=-1)[:, :-1], (1, 0))
        kept = mass_before < top_p[:, None]
        if bool((~kept[:, -1] | (top_p >= 1.0)).all()):
            break  # every row's set ends within `width`
    num_kept = kept.sum(dim=-1).clamp(min=1)
    threshold = largest.gather(1, (num_kept - 1)[:, None])
    return logits.masked_fill((probs < threshold) & (top_p < 1.0)[:, None], -torch.inf)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """seeds, positions int64 [r] -> float32 [r, vocab]."""
    x = noise_bits(seeds, positions, vocab_size)
    u = (_logical_shift(x, 9).float() + 0.5) * 2.0**-23
    return -(-u.log()).log()


def noise_bits(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The x of this module's docstring: int32 [r, vocab], to be read as unsigned."""
    low, high, position = _low_word(seeds), _low_word(seeds >> 32), _low_word(positions)
    key0 = _mix(position ^ _mix(low ^ _mix(high ^ _SALT0)))
    key1 = _mix(position + _mix(high ^ _mix(low ^ _SALT1)))
    token_ids = torch.arange(vocab_size, dtype=torch.int32, device=seeds.device)
    return _mix(_mix(token_ids[None, :] ^ key0[:, None]) ^ key1[:, None])


def _mix(h: torch.Tensor) -> torch.Tensor:
    h = (h ^ _logical_shift(h, 16)) * _MUL0
    h = (h ^ _logical_shift(h, 13)) * _MUL1
    return h ^ _logical_shift(h, 16)


def _logical_shift(h: torch.Tensor, bits: int) -> torch.Tensor:
    """h >> bits for int32 read as unsigned: torch's own shift carries the sign in."""
    return (h >> bits) & ((1 << (32 - bits)) - 1)


def _low_word(value: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of int64, as int32."""
    word = value & 0xFFFFFFFF
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)
