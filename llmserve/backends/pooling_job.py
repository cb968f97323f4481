"""One client's request to a pooling model while it is in flight, and the texts that requests share. Knows no queue."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from llmserve.backends.pooling_tokenizer import EncodedText
from llmserve.errors import LLMServeError
from llmserve.general_metrics import ExecutionTimes
from llmserve.pooling_metrics import PoolingTimes
from llmserve.request_context import EVERYONE, Tenant

FloatArray = npt.NDArray[np.float32]
PoolingTask = Literal["embed", "token_embed", "classify"]


@dataclass(frozen=True, slots=True)
class Pooled:
    """The answer to a request: for each text a row [width], or for `token_embed` [tokens, width], and its length."""

    rows: list[FloatArray]
    num_tokens: list[int]
    times: PoolingTimes
    device: str  # cpu or gpu


class PoolingJob:
    """The texts of one request, in the client's order, and what has been answered of them."""

    def __init__(self, id_: int, num_texts: int, tenant: Tenant = EVERYONE) -> None:
        self.id = id_
        self.tenant = tenant
        self.rows: list[FloatArray | None] = [None] * num_texts
        self.num_tokens: list[int] = []
        self.pending: set[int] = set()  # ids of its texts that are not answered
        self.tokenization_ns = 0
        self.queue_ns = 0  # summed over the texts
        self.times = ExecutionTimes(0, 0, 0)  # summed over the texts
        self._num_left = num_texts
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait(self) -> list[FloatArray]:
        """A row, or a row a token, for each text. Raises what went wrong with the first that failed."""
        await self._done
        return [row for row in self.rows if row is not None]

    @property
    def is_answered(self) -> bool:
        """Every text has been computed."""
        return not self._num_left

    def mean_times(self, total_ns: int) -> PoolingTimes:
        """Of an answered request."""
        texts = max(1, len(self.rows))
        return PoolingTimes(
            total_s=total_ns * 1e-9,
            tokenization_s=self.tokenization_ns * 1e-9,
            queue_s=self.queue_ns * 1e-9 / texts,
            inference_s=self.times.compute_infer_ns * 1e-9 / texts,
        )

    def answer(self, text_id: int, position: int, row: FloatArray, queue_ns: int, times: ExecutionTimes) -> None:
        """One text has been computed."""
        self.pending.discard(text_id)
        self.rows[position] = row
        self.queue_ns += queue_ns
        self.times.compute_input_ns += times.compute_input_ns
        self.times.compute_infer_ns += times.compute_infer_ns
        self.times.compute_output_ns += times.compute_output_ns
        self._num_left -= 1
        if not self._num_left and not self._done.done():
            self._done.set_result(None)

    def fail(self, error: LLMServeError) -> None:
        """One text cannot be computed, so the request cannot be answered."""
        if not self._done.done():
            self._done.set_exception(error)

    def abandon(self) -> None:
        """Nobody waits any more."""
        if not self._done.cancel() and not self._done.cancelled():
            self._done.exception()  # seen


@dataclass(slots=True)
class SharedText:
    """A text in flight, for all requests that want it."""

    id: int
    key: Hashable
    encoded: EncodedText
    task: PoolingTask
    waiters: list[tuple[PoolingJob, int, int]] = field(default_factory=list)  # job, position in it, arrival in ns
    is_running: bool = False  # an instance has it
    num_losses: int = 0  # times an instance died that had it
