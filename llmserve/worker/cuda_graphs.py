"""Which shapes of a step have a graph, and the graphs. Knows no model: what is captured is handed in.

The graphs of a ladder hold n sequences of one token each, and any other batch of up to n tokens: a few prompts' last
tokens among decodes, or drafts. A coarse grid above it holds mixed batches of few sequences. Larger steps run op by op:
there the launches hide behind the work. All graphs share one pool of memory, the largest captured first, so that the
pool is as large as the largest needs.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from llmserve.scheduler.drafts import MAX_STEP_DRAFTS
from llmserve.worker.device import Device, Graph
from llmserve.worker.device_rows import StepShape

logger = logging.getLogger(__name__)

_SMALL_DECODES = (1, 2, 4)
_DECODE_STEP = 8
_WIDE_DECODE_STEP = 32  # above
_WIDE = 256
_MIXED_TOKENS = (128, 256, 512)
_MIXED_SEQS = (16, 64, 256)
Key = TypeVar("Key", bound=Hashable)


def decode_sizes(max_num_seqs: int, max_size: int) -> list[int]:
    """Numbers of sequences that have a graph, ascending; the last is the largest batch, if `max_size` allows."""
    most = min(max_num_seqs, max_size)
    ladder = (*_SMALL_DECODES, *range(_DECODE_STEP, _WIDE, _DECODE_STEP), *range(_WIDE, most, _WIDE_DECODE_STEP))
    return [size for size in ladder if size < most] + [most] if most else []


def step_shapes(max_num_seqs: int, max_num_tokens: int, max_size: int) -> list[StepShape]:
    """The shapes that get graphs, the smallest first, none above `max_size` tokens; no two of them the same."""
    decodes = [StepShape(size, size, size) for size in decode_sizes(max_num_seqs, max_size)]
    mixed = [
        StepShape(tokens, seqs, min(tokens, seqs + MAX_STEP_DRAFTS))
        for tokens in _MIXED_TOKENS
        for seqs in sorted({min(size, max_num_seqs) for size in _MIXED_SEQS})
        if seqs < tokens <= min(max_num_tokens, max_size)
    ]
    return sorted({*decodes, *mixed})


def smallest_fitting(shapes: Iterable[StepShape], wanted: StepShape) -> StepShape | None:
    """Of ascending shapes the one with the fewest tokens, then sequences, that holds the wanted one; None: too
    large."""
    return next((shape for shape in shapes if shape.holds(wanted)), None)


class CudaGraphs(Generic[Key]):
    """Graphs of one kind of work by what they were captured for."""

    def __init__(self, device: Device, work: Callable[[Key], None]) -> None:
        """`work(key)` is done once, and then captured."""
        self._device = device
        self._work = work
        self._graphs: dict[Key, Graph] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(self, key: Key) -> None:
        """Hand in the largest first."""
        work = functools.partial(self._work, key)
        self._device.submit(work)
        self._graphs[key] = self._device.capture(work)

    def run(self, key: Key) -> None:
        """Does the work once: by its graph, or, the first time, as the graph is captured. Drawn tokens are counted: a
        draw that was done twice would not be the same."""
        if key in self._graphs:
            self._graphs[key].replay()
            return
        started = time.monotonic()
        self.capture(key)
        logger.info("captured a graph for %s in %.2f s", key, time.monotonic() - started)
