"""One loaded version of a general model: its batcher, its instances, its requests in flight. Knows no HTTP.

The truth about every request is here, in the server process; the instances may die at any time.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

from llmserve.backends.batch_log import BatchLog
from llmserve.backends.batch_message import batch_message, read_response
from llmserve.backends.infer_stream import InferStream
from llmserve.backends.inline_instance import InlineInstance
from llmserve.backends.instance import InstanceSettings
from llmserve.backends.instance_loads import InstanceLoads
from llmserve.backends.instance_pool import Instance, InstanceState, ProcessInstance, pids_of, states_of
from llmserve.backends.model_config import batcher_config, complete, launches, length_buckets, to_dict
from llmserve.backends.model_messages import MetricSample, Results, Signature
from llmserve.backends.registry import find_backend
from llmserve.backends.requests_in_flight import RequestsInFlight
from llmserve.backends.transport import PayloadReader
from llmserve.backends.validation import OutputReshaper, RequestValidator
from llmserve.errors import (
    DeadlineExceededError,
    LLMServeError,
    ModelExecutionError,
    NotReadyError,
    QueueFullError,
)
from llmserve.general_metrics import ExecutionTimes, FailureReason, ModelStatistics
from llmserve.inference import InferRequest
from llmserve.scheduler.dynamic_batcher import Batch, DynamicBatcher
from llmserve.scheduler.priority_level import QueuedRequest

_MIN_TIMER_S = 0.001  # event loops count milliseconds: less would fire before its time, again and again


class GeneralModel:
    """Start it, send requests, stop it. All methods are for the event loop's thread."""

    def __init__(
        self,
        name: str,
        version: str,
        version_path: Path,
        model_path: Path,
        config: ModelConfig,
        settings: InstanceSettings | None = None,
        inline: bool = False,
    ) -> None:
        """`inline` runs the model in this process, on this thread, where `breakpoint()` works: not for production."""
        self.name = name
        self.version = version
        self.custom_metrics: dict[tuple[str, tuple[tuple[str, str], ...]], MetricSample] = {}
        self._config = ModelConfig()
        self._config.CopyFrom(config)
        self._config.name = name
        self._version_path = version_path
        self._model_path = model_path
        self._settings = settings or InstanceSettings()
        self._inline = inline
        self._statistics = ModelStatistics(name, version)
        self._explained = BatchLog()
        self._instances: list[Instance] = []
        self._loads = InstanceLoads()
        self._in_flight = RequestsInFlight(self._statistics)
        self._serving = False
        self._reason = "it is not loaded"
        self._num_requests = 0
        self._num_batches = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s = 0.0
        self._configure()

    def _configure(self) -> None:
        """What follows from the configuration; again once it is complete."""
        config = self._config
        buckets = length_buckets(config)
        self._pads = bool(buckets)
        self._validator = RequestValidator(config, buckets)
        self._reshape = OutputReshaper(config)
        batching = batcher_config(config)
        self._batcher = DynamicBatcher(batching)
        decoupled = config.model_transaction_policy.decoupled
        self._loads.hands_ahead = not (config.max_batch_size or config.HasField("dynamic_batching") or decoupled)
        self._in_flight.decoupled = decoupled
        self._in_flight.preserve_ordering = config.dynamic_batching.preserve_ordering

    @property
    def config(self) -> ModelConfig:
        """Complete once `start` has returned."""
        return self._config

    @property
    def reason(self) -> str:
        """Why it is not ready; empty when it is."""
        if self.is_ready():
            return ""
        return self._reason or states_of(self._instances)

    @property
    def pids(self) -> list[int]:
        """The processes of its instances."""
        return pids_of(self._instances)

    def is_ready(self) -> bool:
        """Whether a request would be run now."""
        return self._serving and any(instance.is_ready() for instance in self._instances)

    async def start(self) -> None:
        """Completes the configuration by what the model says of itself and loads every instance.

        Raises ModelLoadError with the backend's reason; nothing is left running then.
        """
        backend = find_backend(self._config.backend, self._config.platform, self.name)
        paths = (self.version, str(self._version_path), str(self._model_path), backend, self._settings.log_level)
        kind = InlineInstance if self._inline else ProcessInstance
        try:
            first = kind(launches(self._config, *paths)[0], self._settings, self)
            self._instances = [first]
            await first.start(self._complete)
            others = [kind(launch, self._settings, self) for launch in launches(self._config, *paths)[1:]]
            self._instances = [first, *others]
            loaded = await asyncio.gather(*(instance.start(None) for instance in others), return_exceptions=True)
            for failure in filter(None, loaded):
                raise failure
        except BaseException as error:
            await asyncio.gather(*(instance.stop() for instance in self._instances))
            self._reason = str(error)
            raise
        for instance in self._instances:
            if instance.state is InstanceState.READY:
                self._loads.add(instance)
        self._serving, self._reason = True, ""

    def infer(self, request: InferRequest) -> InferStream:
        """Exactly one response, or any number from a decoupled model. Nothing happens before the first is asked for.

        Iterating raises InvalidRequestError, QueueFullError, DeadlineExceededError, NotReadyError,
        ModelExecutionError, or the InferenceError that the model itself answered with.
        """
        return InferStream(request, self)

    async def stop(self) -> None:
        """Takes no more requests; those it has fail."""
        self._serving, self._reason = False, "it is being unloaded"
        self._in_flight.fail_all(NotReadyError(f"Model {self.name!r} has been unloaded."))
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*(instance.stop() for instance in self._instances))
        self._reason = "it is unloaded"

    def statistics(self) -> ModelStatistics:
        """What happened to its requests since it was made."""
        self._statistics.queued_by_priority = self._batcher.num_queued_by_level
        return self._statistics

    def explain(self) -> dict[str, Any]:
        """Why the last batches had the size they had, and how things stand; plain JSON values."""
        batching = self._config.dynamic_batching if self._config.HasField("dynamic_batching") else None
        return {
            "model_name": self.name,
            "model_version": self.version,
            "max_batch_size": self._config.max_batch_size,
            "dynamic_batching": to_dict(batching) if batching is not None else None,
            "queued_by_priority": self._batcher.num_queued_by_level,
            "in_flight": len(self._in_flight),
            "instances": [
                {"name": i.name, "state": i.state.value, "reason": i.reason, "executing": not self._loads.is_idle(i)}
                for i in self._instances
            ],
            "batches": self._explained.entries(),
        }

    # What an InferStream asks of its model.

    def submit(self, stream: InferStream) -> None:
        """Takes a request, and runs it at once if an instance is free."""
        request = stream.request
        now_ns = stream.arrival_ns = stream.last_ns = time.monotonic_ns()
        try:
            self._check_serving()
            checked = stream.checked = self._validator.check(request)
            self._num_requests += 1
            stream.id = self._num_requests
            queued = QueuedRequest(
                stream.id,
                checked.rows,
                checked.shape_key,
                checked.padded_length,
                request.priority,
                request.timeout_us * 1e-6,
            )
            self._batcher.add(queued, now_ns * 1e-9, self._loads.has_idle)
        except LLMServeError as error:
            refused = isinstance(error, QueueFullError)
            self._statistics.record_failure(FailureReason.REJECTED if refused else FailureReason.OTHER, 0)
            stream.done = True
            if refused:  # which request, as Triton says it: the queue knows only numbers
                raise QueueFullError(f"[request id: {request.id or '<id_unknown>'}] {error.message}") from error
            raise
        self._in_flight.add(stream)
        self._dispatch()

    def cancel(self, stream: InferStream) -> None:
        """Its client has gone: it leaves the queue, or the model is told."""
        self._batcher.remove(stream.id)
        if stream.instance is not None:
            stream.instance.cancel(stream.id)
        self._in_flight.cancel(stream)

    def acknowledge(self, stream: InferStream, taken: int) -> None:
        """Its client has read on: the model may send more."""
        if stream.instance is not None:
            stream.instance.acknowledge(stream.id, taken)

    # What the instances tell.

    def on_results(self, instance: Instance, results: Results, payload: memoryview) -> None:
        """Answers requests; a batch that has been executed frees its instance."""
        now_ns = time.monotonic_ns()
        times = ExecutionTimes(0, 0, 0)
        if results.batch_id and (ended := self._loads.end(instance, results, now_ns)) is not None:
            running, times = ended
            self._statistics.record_execution(running.batch.rows, times)
            self._in_flight.begun(running.batch, running.begun_ns)
            if self._batcher:
                self._dispatch()  # before the answers go out: the instance has work meanwhile
        reader = PayloadReader(payload)
        for entry in results.responses:
            stream = self._in_flight.get(entry.id)
            request_id = stream.request.id if stream is not None else ""
            response = read_response(entry, reader, self.name, self.version, self._reshape, request_id)
            if stream is not None and stream.instance is instance:
                self._in_flight.answer(stream, response, entry.final, times, now_ns)
        for sample in results.metrics or ():
            self.custom_metrics[sample.name, tuple(sorted(sample.labels.items()))] = sample
        if not instance.open_requests and self._loads.is_idle(instance):
            instance.rest()

    def on_ready(self, instance: Instance) -> None:
        """An instance has been restarted."""
        instance.open_requests = 0
        self._loads.add(instance)
        self._dispatch()

    def on_lost(self, instance: Instance, error: LLMServeError) -> None:
        """An instance has died: its requests fail, but for those it never began; and those that wait too if nobody is
        about to take them."""
        unbegun = self._loads.remove(instance)
        for batch in reversed(unbegun):
            self._batcher.put_back([queued for queued in batch.requests if self._in_flight.take_back(queued.id)])
        self._in_flight.fail_all(error, instance)
        if not self._may_serve_soon():
            self._batcher.drain()
            self._in_flight.fail_all(NotReadyError(f"Model {self.name!r} is not ready: {error.message}"), None)
        elif unbegun:
            self._dispatch()  # others may be idle

    def _complete(self, signature: Signature) -> dict[str, Any]:
        self._config = complete(self._config, signature)
        self._configure()
        return to_dict(self._config)

    def _check_serving(self) -> None:
        if not self._serving or not self._may_serve_soon():
            raise NotReadyError(f"Model {self.name!r} is not ready: {self.reason or 'it is restarting'}")

    def _may_serve_soon(self) -> bool:
        """An instance runs, or is being started and not merely waiting to be."""
        return any(instance.state in (InstanceState.READY, InstanceState.STARTING) for instance in self._instances)

    def _dispatch(self) -> None:
        """Gives batches to free instances; then sees to it that what must happen later does."""
        now_s = time.monotonic()
        for request in self._batcher.expire(now_s):
            error = DeadlineExceededError("Request timeout expired")
            self._in_flight.fail(self._in_flight[request.id], error, FailureReason.REJECTED)
        while self._batcher and (instance := self._loads.next()) is not None:
            if (batch := self._batcher.next_batch(now_s)) is None:
                break
            self._execute(instance, batch)
        if not self._batcher:
            return
        due_s = self._batcher.next_event_s(self._loads.has_idle)
        if due_s is not None and (self._timer is None or due_s < self._timer_due_s):
            if self._timer is not None:
                self._timer.cancel()
            self._timer_due_s = due_s
            delay_s = max(_MIN_TIMER_S, due_s - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        """A time-out is due, or a batch has waited long enough for company."""
        self._timer = None
        self._dispatch()

    def _execute(self, instance: Instance, batch: Batch) -> None:
        now_ns = time.monotonic_ns()
        streams = [self._in_flight[request.id] for request in batch.requests]
        self._num_batches += 1
        self._loads.begin(instance, self._num_batches, batch, now_ns)
        oldest_ns = now_ns
        for stream in streams:
            stream.dispatched_ns = now_ns
            oldest_ns = min(oldest_ns, stream.arrival_ns)
            self._in_flight.begin(stream, instance)
        self._explained.add(batch, instance.name, now_ns - oldest_ns)
        if self._pads:
            useful = sum(stream.checked.rows * stream.checked.length for stream in streams)
            self._statistics.record_padding(useful, batch.rows * streams[0].checked.padded_length)
        message, payload = batch_message(self._num_batches, streams, bool(self._config.max_batch_size))
        try:
            instance.execute(message, payload)
        except ModelExecutionError as error:
            self._loads.give_up(instance, self._num_batches)
            for stream in streams:
                self._in_flight.fail(stream, error, FailureReason.BACKEND)
