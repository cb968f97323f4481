"""The texts that one pooling model has in flight: queued, batched, computed, shared by requests. Knows no tokenizer.

Equal texts are computed once. An instance that dies gives its texts back, and each of them is computed alone then: one
that ends another instance alone fails, and takes nobody with it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmserve.backends.instance_pool import Instance, InstanceState
from llmserve.backends.model_messages import Results
from llmserve.backends.pooling_job import PoolingJob, PoolingTask, SharedText
from llmserve.backends.pooling_message import pooled_rows, pooling_batch
from llmserve.backends.pooling_tokenizer import EncodedText
from llmserve.errors import LLMServeError, ModelExecutionError, NotReadyError
from llmserve.general_metrics import ExecutionTimes, ModelStatistics
from llmserve.pooling_metrics import PoolingMetrics
from llmserve.scheduler.text_batcher import TextBatcher
from llmserve.scheduler.text_queue import QueuedText

_NUM_EXPLAINED = 64


@dataclass(slots=True)
class _Running:
    """A batch that an instance executes."""

    instance: Instance
    texts: list[SharedText]
    task: PoolingTask
    num_tokens: int
    dispatched_ns: int


@dataclass(slots=True)
class TextBatchRecord:
    """What one batch was made of."""

    time_s: float  # wall clock, since 1970
    instance: str
    texts: int
    tokens: int
    waited_ms: float  # the oldest of its texts, in the queue
    left_waiting: int  # texts


class TextsInFlight:
    """`submit` the texts of a job, `close` the job when it is over; the instances' events do the rest.

    `instances` is whoever may compute: filled in while the model starts.
    """

    def __init__(self, name: str, statistics: ModelStatistics, metrics: PoolingMetrics) -> None:
        self.instances: list[Instance] = []
        self.batcher = TextBatcher(1)  # until the model says its budget
        self.explained: deque[TextBatchRecord] = deque(maxlen=_NUM_EXPLAINED)
        self._name = name
        self._statistics = statistics
        self._metrics = metrics
        self._free: list[Instance] = []
        self._lost: set[Instance] = set()  # they have died, and are not back yet
        self._texts: dict[int, SharedText] = {}
        self._by_key: dict[Any, SharedText] = {}
        self._running: dict[int, _Running] = {}
        self._num_made = 0  # texts and batches: what has an id
        self._dispatching = False

    def begin(self) -> None:
        """The instances have loaded."""
        self._free = [instance for instance in self.instances if instance.state is InstanceState.READY]

    def is_busy(self, instance: Instance) -> bool:
        """Whether it executes a batch."""
        return any(batch.instance is instance for batch in self._running.values())

    def may_serve_soon(self) -> bool:
        """An instance runs, or is being started and not merely waiting to be."""
        return any(instance.state in (InstanceState.READY, InstanceState.STARTING) for instance in self.instances)

    def submit(self, job: PoolingJob, position: int, encoded: EncodedText, task: PoolingTask) -> None:
        """Queues a text, or joins an equal one that is in flight."""
        key = (task, *encoded.key)
        text = self._by_key.get(key)
        num_tokens = len(encoded.token_ids)
        self._metrics.observe_text(num_tokens, shared=text is not None)
        job.num_tokens.append(num_tokens)
        if text is None:
            text = self._by_key[key] = SharedText(self._new_id(), key, encoded, task)
            self._texts[text.id] = text
            self._queue(text, job)
        else:
            self.batcher.join(text.id, job.id, job.tenant.name, job.tenant.weight)
        text.waiters.append((job, position, time.monotonic_ns()))
        job.pending.add(text.id)

    def close(self, job: PoolingJob) -> None:
        """Its request is over: texts that nobody else wants leave the queue."""
        job.abandon()
        for text_id in job.pending:
            text = self._texts.get(text_id)
            if text is None:
                continue
            text.waiters = [waiter for waiter in text.waiters if waiter[0] is not job]
            if not text.waiters and not text.is_running:
                self.batcher.remove(text_id)
                self._forget(text)
        self._show_queue()

    def fail_all(self, error: LLMServeError) -> None:
        """No text will be computed any more."""
        self._fail(list(self._texts.values()), error)

    # What the instances tell.

    def on_results(self, instance: Instance, results: Results, payload: memoryview) -> None:
        """A batch has been computed: the next one goes out, then the answers."""
        now_ns = time.monotonic_ns()
        batch = self._running.pop(results.batch_id)
        self._free.append(instance)
        self._dispatch()
        if instance in self._free:
            instance.rest()
        times = ExecutionTimes(
            max(0, results.started_ns - batch.dispatched_ns),
            max(0, results.ended_ns - results.started_ns),
            max(0, now_ns - results.ended_ns),
        )
        self._statistics.record_execution(len(batch.texts), times)
        self._metrics.observe_batch(len(batch.texts), batch.num_tokens, times.compute_infer_ns * 1e-9)
        rows = pooled_rows(results, payload, [text.encoded for text in batch.texts], batch.task)
        if isinstance(rows, LLMServeError):
            self._fail(batch.texts, rows)
            return
        for text, row in zip(batch.texts, rows, strict=True):
            self._forget(text)
            for job, position, arrival_ns in text.waiters:
                job.answer(text.id, position, row, max(0, batch.dispatched_ns - arrival_ns), times)

    def on_ready(self, instance: Instance) -> None:
        """An instance has been restarted."""
        self._lost.discard(instance)
        self._free.append(instance)
        self._dispatch()

    def on_lost(self, instance: Instance, error: LLMServeError) -> None:
        """An instance has died, or could not be started again after it had. Texts wait for one that only died, be it
        the second in a row; for one that cannot be started nobody waits."""
        could_not_start = instance in self._lost
        self._lost.add(instance)
        if instance in self._free:
            self._free.remove(instance)
        for batch_id in [batch_id for batch_id, batch in self._running.items() if batch.instance is instance]:
            self._give_back(self._running.pop(batch_id).texts, error)
        if could_not_start and not self.may_serve_soon():
            self.fail_all(NotReadyError(f"Model {self._name!r} is not ready: {error.message}"))
        self._dispatch()

    # Inside.

    def _give_back(self, texts: Sequence[SharedText], error: LLMServeError) -> None:
        """Their instance has died of one of them, or of something else. Who was alone in it and has been in another
        death is not tried again."""
        for text in texts:
            text.num_losses += 1
            text.is_running = False
            if not text.waiters:
                self._forget(text)
            elif text.num_losses > 1 and len(texts) == 1:
                self._fail(texts, error)
            else:
                self._queue(text, text.waiters[0][0])

    def _new_id(self) -> int:
        self._num_made += 1
        return self._num_made

    def _queue(self, text: SharedText, job: PoolingJob) -> None:
        kind = (text.task, text.id) if text.num_losses else text.task  # after a loss alone
        tenant = job.tenant
        queued = QueuedText(text.id, job.id, len(text.encoded.token_ids), kind, tenant.name, tenant.weight)
        self.batcher.add(queued, time.monotonic())
        self._show_queue()
        if not self._dispatching:
            self._dispatching = True  # once for all that come in the same turn of the loop
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Gives batches to free instances."""
        self._dispatching = False
        while self._free and (queued := self.batcher.next_batch(time.monotonic())):
            self._execute(self._free.pop(), queued)
        self._show_queue()

    def _execute(self, instance: Instance, queued: list[QueuedText]) -> None:
        texts = [self._texts[entry.id] for entry in queued]
        for text in texts:
            text.is_running = True
        batch = _Running(instance, texts, texts[0].task, sum(q.num_tokens for q in queued), time.monotonic_ns())
        waited_ms = (time.monotonic() - min(entry.arrival_s for entry in queued)) * 1e3
        self.explained.append(
            TextBatchRecord(time.time(), instance.name, len(texts), batch.num_tokens, waited_ms, len(self.batcher))
        )
        batch_id = self._new_id()
        message, payload = pooling_batch(batch_id, [text.encoded for text in texts], batch.task)
        self._running[batch_id] = batch
        try:
            instance.execute(message, payload)
        except ModelExecutionError as error:
            del self._running[batch_id]
            self._free.append(instance)
            self._fail(texts, error)

    def _fail(self, texts: Sequence[SharedText], error: LLMServeError) -> None:
        for text in texts:
            self.batcher.remove(text.id)
            self._forget(text)
            for job, _, _ in text.waiters:
                job.fail(error)

    def _forget(self, text: SharedText) -> None:
        self._texts.pop(text.id, None)
        self._by_key.pop(text.key, None)

    def _show_queue(self) -> None:
        self._metrics.queued_texts, self._metrics.queued_tokens = len(self.batcher), self.batcher.num_tokens
