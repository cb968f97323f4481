"""A line of the table that `make gpu` writes, and how what is in it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton.testing

DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Row:
    """A line of the table: what was expected before the run, and what came out."""

    name: str
    unit: str
    target: str
    predicted: str
    result: str


def seconds(run: Callable[[], object]) -> float:
    """Median of a captured run, so that the host's launches do not count; the L2 cache is cold."""
    run()
    torch.cuda.synchronize()
    return float(triton.testing.do_bench(run, warmup=20, rep=100, return_mode="median")) / 1e3


def share(name: str, num_bytes: float, took: float, bandwidth: float, target: str, predicted: str) -> Row:
    """A kernel bound by memory."""
    result = f"{num_bytes / took / bandwidth:.0%} ({took * 1e6:.0f} us)"
    return Row(name, "of copy bandwidth", target, predicted, result)
