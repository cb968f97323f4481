"""The kinds of draws that every implementation of sampling is held to. Knows none of them."""

from __future__ import annotations

import torch

from llmserve.kernels.ops import SamplingTensors

DRAWS: list[dict[str, float]] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
]


def sampling_tensors(
    rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> SamplingTensors:
    """The same for every row, but for seeds and positions."""
    return SamplingTensors(
        temperature=torch.full((rows,), temperature),
        top_k=torch.full((rows,), top_k),
        top_p=torch.full((rows,), top_p),
        min_p=torch.full((rows,), min_p),
        seeds=torch.arange(rows) * 0x1_2345_6789 - 40,
        positions=torch.arange(rows) * 3,
        all_greedy=temperature == 0,
        any_top_k=top_k > 0,
        any_top_p=top_p < 1,
        any_min_p=min_p > 0,
    )
