"""The tables of rotary position embedding. Knows `RopeConfig`, not the model around it."""

from __future__ import annotations

import math

import torch

from llmserve.models.config import RopeConfig


def build_cos_sin(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> torch.Tensor:
    """float32 [num_positions, head_dim]: cosines, then sines, of head_dim / 2 frequencies; the form `Ops` takes."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(rope, head_dim))
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return (table * rope.attention_factor).to(device)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """float32 [head_dim / 2]: radians a position, fastest first. The kinds are explained in `RopeConfig`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / rope.theta**exponents
    if rope.kind == "none":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "factors":
        return plain / torch.tensor(rope.freq_factors, dtype=torch.float32)
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    return _yarn(rope, plain, head_dim)


def _llama3(rope: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: short waves stay, long ones are divided by `factor`, those between are blended."""
    turns = rope.original_max_position_embeddings * plain / (2 * math.pi)  # full turns within the original context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * plain + (1.0 - keep) * plain / rope.factor


def _yarn(rope: RopeConfig, plain: torch.Tensor, head_dim: int) -> torch.Tensor:
    """YaRN's "NTK by parts": the same blend, along a ramp over the dimensions."""
    low, high = _dimension_of(rope.beta_fast, rope, head_dim), _dimension_of(rope.beta_slow, rope, head_dim)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step, not a division by zero
    divide = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - divide) * plain + divide * plain / rope.factor


def _dimension_of(num_turns: float, rope: RopeConfig, head_dim: int) -> float:
    """The (fractional) frequency that makes `num_turns` full turns within the original context."""
    wavelength = rope.original_max_position_embeddings / (num_turns * 2 * math.pi)
    return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))
