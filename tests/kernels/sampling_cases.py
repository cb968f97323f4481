"""The kinds of draws that every implementation of sampling is held to. Knows none of them."""

from __future__ import annotations

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
