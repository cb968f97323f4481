"""The requests a model has taken and not answered to the end: what is put into each, counted. Knows no batcher."""

from __future__ import annotations

import time

from llmserve.backends.infer_stream import InferStream
from llmserve.backends.instance_pool import Instance
from llmserve.errors import LLMServeError
from llmserve.general_metrics import ExecutionTimes, FailureReason, ModelStatistics
from llmserve.inference import InferResponse
from llmserve.scheduler.dynamic_batcher import Batch
from llmserve.scheduler.response_order import ResponseOrder

_ANY = object()


class RequestsInFlight:
    """By id, from `add` to the final answer. A cancelled one stays until its instance is done with it."""

    def __init__(self, statistics: ModelStatistics) -> None:
        self.decoupled = False
        self.preserve_ordering = False
        self._statistics = statistics
        self._streams: dict[int, InferStream] = {}
        self._order = ResponseOrder()
        self._held: dict[int, tuple[InferStream, InferResponse | LLMServeError]] = {}  # finished before an older one

    def __len__(self) -> int:
        return len(self._streams)

    def __getitem__(self, request_id: int) -> InferStream:
        return self._streams[request_id]

    def get(self, request_id: int) -> InferStream | None:
        """None if it has been answered."""
        return self._streams.get(request_id)

    def add(self, stream: InferStream) -> None:
        """A request has been taken."""
        self._streams[stream.id] = stream
        self._statistics.pending += 1

    def begin(self, stream: InferStream, instance: Instance) -> None:
        """An instance gets the request."""
        stream.instance = instance
        instance.open_requests += 1
        if self.preserve_ordering:
            self._order.begin(stream.id)

    def begun(self, batch: Batch, begun_ns: int) -> None:
        """When the instance that has answered a batch began with it: until then its requests were in a queue."""
        for queued in batch.requests:
            if (stream := self._streams.get(queued.id)) is not None:
                stream.dispatched_ns = begun_ns

    def take_back(self, request_id: int) -> bool:
        """The instance that had it never began it: it waits again. False if nobody waits for it any more."""
        stream = self._streams.get(request_id)
        if stream is None or stream.done:
            return False
        stream.instance = None
        return True

    def answer(
        self,
        stream: InferStream,
        response: InferResponse | LLMServeError,
        final: bool,
        times: ExecutionTimes,
        now_ns: int,
    ) -> None:
        """One response of a model to one request; `times` are those of the execution it came out of."""
        if final:
            self._forget(stream)
        if stream.done:
            return  # its client has gone, or has had an error already
        if isinstance(response, LLMServeError):
            self._end(stream, response, FailureReason.BACKEND)
        elif self.decoupled:
            self._stream(stream, response, now_ns)
        elif not final:
            stream.only_response = response  # the final one may bring nothing but its flag
        else:
            response = response if response.outputs else stream.only_response or response
            response.final = True
            self._count_success(stream, times, now_ns)
            self._put(stream, response)

    def fail(self, stream: InferStream, error: LLMServeError, reason: FailureReason) -> None:
        """No answer will come any more."""
        self._forget(stream)
        if not stream.done:
            self._end(stream, error, reason)

    def fail_all(self, error: LLMServeError, instance: Instance | object | None = _ANY) -> None:
        """The requests of one instance (None: those that none has), or all of them, are lost."""
        for stream in list(self._streams.values()):
            if instance is _ANY or stream.instance is instance:
                self.fail(stream, error, FailureReason.OTHER if stream.instance is None else FailureReason.BACKEND)

    def cancel(self, stream: InferStream) -> None:
        """Its client has gone. What an instance has stays here, so that it is known when it is done."""
        if self._held.pop(stream.id, None) is not None:
            return  # it had been answered, and counted
        self._statistics.record_failure(FailureReason.CANCELED, time.monotonic_ns() - stream.arrival_ns)
        self._statistics.pending -= 1
        if stream.instance is None:
            self._forget(stream)
        elif self.preserve_ordering:
            self._release(stream.id)

    def _forget(self, stream: InferStream) -> None:
        if self._streams.pop(stream.id, None) is not None and stream.instance is not None:
            stream.instance.open_requests -= 1

    def _stream(self, stream: InferStream, response: InferResponse, now_ns: int) -> None:
        """One of the responses of a decoupled model, which need not wait for each other."""
        statistics = self._statistics.response(stream.num_responses)
        took_ns = now_ns - stream.last_ns
        if response.outputs:
            statistics.compute_infer.add(took_ns)
            statistics.success.add(took_ns)
        else:
            statistics.empty_response.add(took_ns)
        stream.num_responses += 1
        stream.last_ns = now_ns
        if response.final:
            self._count_success(stream, ExecutionTimes(0, now_ns - stream.dispatched_ns, 0), now_ns)
        stream.put(response, response.final)

    def _count_success(self, stream: InferStream, times: ExecutionTimes, now_ns: int) -> None:
        request_ns, queue_ns = now_ns - stream.arrival_ns, stream.dispatched_ns - stream.arrival_ns
        self._statistics.record_success(stream.checked.rows, request_ns, queue_ns, times)
        self._statistics.pending -= 1

    def _end(self, stream: InferStream, error: LLMServeError, reason: FailureReason) -> None:
        """The request gets an error, and nothing after it."""
        now_ns = time.monotonic_ns()
        if self.decoupled:
            self._statistics.response(stream.num_responses).fail.add(now_ns - stream.last_ns)
        self._statistics.record_failure(reason, now_ns - stream.arrival_ns)
        self._statistics.pending -= 1
        self._put(stream, error)

    def _put(self, stream: InferStream, item: InferResponse | LLMServeError) -> None:
        """The only, or last, item of a stream; held back while an older request must be answered first."""
        if not self.preserve_ordering or stream.instance is None:
            stream.put(item, final=True)
            return
        self._held[stream.id] = (stream, item)
        self._release(stream.id)

    def _release(self, request_id: int) -> None:
        for released in self._order.finish(request_id):
            if released in self._held:
                stream, item = self._held.pop(released)
                if not stream.done:
                    stream.put(item, final=True)
