"""A model's side of the conversation with the server: messages in, a backend's answers out. Knows no socket.

The same object runs in a model's process and, for `inline`, in the server's.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from llmserve.backends.base import Backend, Batch, ModelContext, Request, Response
from llmserve.backends.metric_values import take_changed
from llmserve.backends.model_messages import (
    ExecuteBatch,
    FromModel,
    LoadFailed,
    LoadModel,
    ModelLaunch,
    ModelLoaded,
    OutputTensor,
    ResponseEntry,
    Results,
    Signature,
)
from llmserve.backends.response_window import STALL_S, WINDOW_UNITS, units
from llmserve.backends.shared_memory import Buffer
from llmserve.backends.tensors import Array, to_array, to_wire
from llmserve.backends.transport import Payload, PayloadReader
from llmserve.errors import InferenceError, InvalidRequestError, LLMServeError, ModelExecutionError

logger = logging.getLogger(__name__)

Send = Callable[[FromModel, Payload | None], None]


class Inbox(Protocol):
    """What the server has said and nobody has read yet. Cancellations and acknowledgements take effect once read."""

    def poll(self) -> None:
        """Reads what is there."""
        ...

    def wait_until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Reads until `done`; False if that takes longer than the timeout or the server has gone."""
        ...


class BackendRunner:
    """One instance of a model."""

    def __init__(self, launch: ModelLaunch, send: Send, inbox: Inbox) -> None:
        self._launch = launch
        self._send = send
        self._inbox = inbox
        self._backend: Backend | None = None
        self._open: dict[int, Request] = {}  # requests without their final response
        self._begun_id = 0  # the highest of a request that was begun with
        self._given_up: set[int] = set()  # requests that nobody waits for, handed over ahead and not begun yet
        self._lock = threading.Lock()  # models answer from threads of their own
        self._output_names: frozenset[str] = frozenset()
        self._context = _context(launch)

    def launch(self) -> bool:
        """Says the signature, or loads at once if the configuration is complete. False if that failed."""
        try:
            self._backend = make_backend(self._launch.backend)
            if self._launch.auto_complete:
                self._send(self._backend.auto_complete(self._context) or Signature(), None)
                return True
        except Exception as error:  # noqa: BLE001 (a model's code may raise anything; it is told to the server)
            return self._refuse(error)
        return self.load(LoadModel(self._launch.config))

    def load(self, message: LoadModel) -> bool:
        """Loads the model. False if that failed: why has been sent."""
        assert self._backend is not None
        self._launch.config = message.config
        self._context = _context(self._launch)
        self._output_names = frozenset(output["name"] for output in message.config.get("output", []))
        started = time.monotonic()
        try:
            self._backend.load(self._context)
        except Exception as error:  # noqa: BLE001 (a model's code may raise anything; it is told to the server)
            return self._refuse(error)
        self._send(ModelLoaded(time.monotonic() - started, self._backend.device), None)
        return True

    def execute(self, message: ExecuteBatch, payload: memoryview) -> None:
        """Runs a batch and sends what it returned."""
        assert self._backend is not None
        started_ns = time.monotonic_ns()
        try:
            batch = self._open_batch(message, payload)
            started_ns = time.monotonic_ns()
            if all(request.cancelled for request in batch.requests):
                raise InferenceError("The request was cancelled before it began.", InferenceError.CANCELLED)
            responses = self._backend.execute(batch)
            if responses is not None and len(responses) != len(batch.requests):
                raise InferenceError(
                    "Number of InferenceResponse objects do not match the number of InferenceRequest objects. "
                    f"InferenceRequest(s) size is:{len(batch.requests)}, "
                    f"and InferenceResponse(s) size is:{len(responses)}\n"
                )
        except Exception as error:  # noqa: BLE001 (a model's code may raise anything; it is told to the server)
            responses = [Response(error=self._failure(error))] * len(message.requests)
        self._close_batch(message, responses, started_ns)

    def cancel(self, ids: list[int]) -> None:
        """Marks requests nobody waits for."""
        for request_id in ids:
            if (request := self._open.get(request_id)) is not None:
                request.cancelled = True
            elif request_id > self._begun_id:
                self._given_up.add(request_id)

    def acknowledge(self, request_id: int, units: int) -> None:
        """The client has taken responses: there is room for more."""
        with self._lock:
            if (request := self._open.get(request_id)) is not None:
                request.unread -= units

    def fail(self, request: Request, error: Exception) -> None:
        """`Request.fail`."""
        with contextlib.suppress(InferenceError):
            self.respond(request, Response(error=self._failure(error)), final=True)

    def poll(self) -> None:
        """Lets cancellations in that wait to be read."""
        self._inbox.poll()

    def unload(self) -> None:
        """The model's own farewell; its errors are only logged."""
        if self._backend is not None:
            try:
                self._backend.unload()
            except Exception:
                logger.exception("%s: unload failed", self._launch.instance_name)

    def _open_batch(self, message: ExecuteBatch, payload: memoryview) -> Batch:
        reader = PayloadReader(payload)
        arrays = {
            tensor.name: to_array(tensor.datatype, tensor.shape, reader.take(tensor.num_bytes))
            for tensor in message.inputs
        }
        batch = Batch(message.requests, message.inputs, arrays, self._launch.config, self)
        with self._lock:
            for request in batch.requests:
                request_id = request.header.id
                self._open[request_id] = request
                self._begun_id = max(self._begun_id, request_id)
                if request_id in self._given_up:
                    self._given_up.discard(request_id)
                    request.cancelled = True
        return batch

    def _close_batch(self, message: ExecuteBatch, responses: Sequence[Response | None] | None, started_ns: int) -> None:
        """One message: the responses that `execute` returned or failed with, and that the instance is free."""
        ended_ns = time.monotonic_ns()
        payload = Payload()
        entries: list[ResponseEntry] = []
        with self._lock:
            for header, response in zip(message.requests, responses or (), strict=False):
                if response is None:
                    continue  # its sender has it
                # one that is open no more had its final response before `execute` failed; the server ignores a second
                self._open.pop(header.id, None)
                entries.append(self._entry(header.id, header.outputs, response, True, payload))
            self._send(
                Results(entries, message.batch_id, started_ns, ended_ns, metrics=take_changed() or None), payload
            )

    def respond(self, request: Request, response: Response | None, final: bool) -> None:
        """`Request.send`. Raises InferenceError after the final response."""
        if request.unread >= WINDOW_UNITS and not request.cancelled:
            self._wait_for_client(request)
        header = request.header
        payload = Payload()
        with self._lock:
            if header.id not in self._open:
                if request.cancelled:
                    return
                raise InferenceError("The final response of this request has been sent already.")
            if final:
                del self._open[header.id]
            entry = self._entry(header.id, header.outputs, response or Response(), final, payload)
            request.unread += units(payload.num_bytes)
            self._send(Results([entry], metrics=take_changed() or None), payload)

    def _wait_for_client(self, request: Request) -> None:
        """Until it has taken some of what it was sent. One that takes nothing loses its request."""

        def has_room() -> bool:
            return request.unread < WINDOW_UNITS or request.cancelled

        if not self._inbox.wait_until(has_room, STALL_S):
            request.cancelled = True
            with self._lock:
                if self._open.pop(request.header.id, None) is not None:
                    text = f"the client has not taken a response for {STALL_S:g} s: the request is given up"
                    entry = ResponseEntry(request.header.id, [], True, error=(InferenceError.CANCELLED, text))
                    self._send(Results([entry]), None)

    def _entry(
        self, request_id: int, wanted: list[str], response: Response, final: bool, payload: Payload
    ) -> ResponseEntry:
        if response.error is not None:
            return ResponseEntry(request_id, [], final, error=_error_of(response.error))
        outputs: list[OutputTensor] = []
        allowed = wanted or self._output_names
        try:
            for name, array in response.outputs.items():
                if name in allowed:
                    datatype, data = _to_wire(name, array)
                    payload.align()
                    payload.add(data)
                    outputs.append(OutputTensor(name, datatype, list(array.shape), len(data)))
            if response.parameters:
                _check_parameters(response.parameters)
        except ValueError as error:
            return ResponseEntry(request_id, [], final, error=("", f"the response cannot be sent: {error}"))
        return ResponseEntry(request_id, outputs, final, response.parameters)

    def _failure(self, error: Exception) -> LLMServeError:
        """What `execute` raised: a request's fault as it stands, a model's in Triton's words."""
        if isinstance(error, InvalidRequestError):
            return InferenceError(error.message, InferenceError.INVALID_ARG)
        if isinstance(error, InferenceError) and error.code != InferenceError.INTERNAL:
            return error
        text = error.message if isinstance(error, InferenceError) else describe(error)
        name = self._launch.instance_name
        return ModelExecutionError(f"Failed to process the request(s) for model '{name}', message: {text}")

    def _refuse(self, error: Exception) -> bool:
        self._send(LoadFailed(error.message if isinstance(error, LLMServeError) else describe(error)), None)
        return False


def _to_wire(name: str, array: Array) -> tuple[str, Buffer]:
    try:
        return to_wire(array)
    except ValueError as error:
        raise ValueError(f"output {name!r}: {error}") from error


def _check_parameters(parameters: Mapping[str, object]) -> None:
    for name, value in parameters.items():
        if not isinstance(value, (bool, int, float, str)):
            raise ValueError(
                f"response parameter {name!r} is a {type(value).__name__}; it must be a bool, number or str"
            )
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
            raise ValueError(f"response parameter {name!r} is {value}, which does not fit into 64 bits")


def make_backend(target: str) -> Backend:
    """An object of the class that `module:Class` names."""
    module, _, name = target.partition(":")
    backend: Backend = getattr(importlib.import_module(module), name)()
    return backend


def describe(error: BaseException) -> str:
    """What was raised, and where in the model: innermost frame first, as Triton writes it."""
    here = str(Path(__file__).parent)
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith((here, "<frozen"))
    ]
    where = "".join(f"  {frame.filename}({frame.lineno}): {frame.name}\n" for frame in reversed(frames))
    text = f"{type(error).__name__}: {error}"
    return f"{text}\n\nAt:\n{where}" if where else text


def _error_of(error: LLMServeError) -> tuple[str, str]:
    return (error.code if isinstance(error, InferenceError) else "", error.message)


def _context(launch: ModelLaunch) -> ModelContext:
    return ModelContext(
        launch.name,
        launch.version,
        Path(launch.version_path),
        Path(launch.model_path),
        launch.config,
        launch.instance_name,
        launch.kind,
        launch.device_id,
        launch.num_threads,
    )
