"""How kernels are timed on this GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton.testing

from benchmarks.row import Row

DEVICE = torch.device("cuda")


def seconds(run: Callable[[], object]) -> float:
    """Median of a captured run, so that the host's launches do not count; the L2 cache is cold."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return float(triton.testing.do_bench(graph.replay, warmup=20, rep=100, return_mode="median")) / 1e3


def share(name: str, num_bytes: float, took: float, bandwidth: float, target: str, predicted: str) -> Row:
    """A kernel bound by memory."""
    result = f"{num_bytes / took / bandwidth:.0%} ({took * 1e6:.0f} us)"
    return Row(name, "of copy bandwidth", target, predicted, result)
