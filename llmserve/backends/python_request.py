"""`pb_utils.InferenceRequest` and what answers it. Knows the backend's requests, no process.

Names, arguments and error texts are Triton's. A request that a model makes to another model is answered with an error
that says it is not served yet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmserve.backends.base import Request, Response
from llmserve.backends.python_tensor import Tensor, TritonModelException
from llmserve.errors import InferenceError

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
TRITONSERVER_REQUEST_FLAG_SEQUENCE_START = 1
TRITONSERVER_REQUEST_FLAG_SEQUENCE_END = 2
TRITONSERVER_REQUEST_RELEASE_ALL = 1
TRITONSERVER_REQUEST_RELEASE_RESCHEDULE = 2
TRITONSERVER_MEMORY_CPU = 0
TRITONSERVER_MEMORY_GPU = 1


class TritonError:
    """An error in place of a response."""

    UNKNOWN = 0
    INTERNAL = 1
    NOT_FOUND = 2
    INVALID_ARG = 3
    UNAVAILABLE = 4
    UNSUPPORTED = 5
    ALREADY_EXISTS = 6
    CANCELLED = 7

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message = message
        self._code = code

    def message(self) -> str:
        """The text."""
        return self._message

    def code(self) -> int:
        """One of the class's constants."""
        return self._code


_ERROR_CODES = {
    TritonError.UNKNOWN: InferenceError.UNKNOWN,
    TritonError.INTERNAL: InferenceError.INTERNAL,
    TritonError.NOT_FOUND: InferenceError.NOT_FOUND,
    TritonError.INVALID_ARG: InferenceError.INVALID_ARG,
    TritonError.UNAVAILABLE: InferenceError.UNAVAILABLE,
    TritonError.UNSUPPORTED: InferenceError.UNSUPPORTED,
    TritonError.ALREADY_EXISTS: InferenceError.ALREADY_EXISTS,
    TritonError.CANCELLED: InferenceError.CANCELLED,
}


class PreferredMemory:
    """Where a model would like tensors to be; all are in the host's memory."""

    def __init__(self, preferred_memory_type: int, preferred_device_id: int = 0) -> None:
        self.memory_type = preferred_memory_type
        self.device_id = preferred_device_id


class InferenceResponse:
    """The answer to one request."""

    __slots__ = ("_error", "_parameters", "_tensors")

    def __init__(
        self,
        output_tensors: Sequence[Tensor] = (),
        error: TritonError | None = None,
        parameters: Mapping[str, Any] | str | None = None,
    ) -> None:
        self._tensors = output_tensors
        self._error = error if error is None or isinstance(error, TritonError) else TritonError(str(error))
        self._parameters: Mapping[str, Any] = {}
        if parameters:
            self._parameters = json.loads(parameters) if isinstance(parameters, str) else parameters

    def output_tensors(self) -> list[Tensor]:
        """What was computed."""
        return list(self._tensors)

    def has_error(self) -> bool:
        """Whether there is an error in place of tensors."""
        return self._error is not None

    def error(self) -> TritonError | None:
        """The error, if there is one."""
        return self._error

    def parameters(self) -> str:
        """The response's parameters, as JSON."""
        return json.dumps(self._parameters)

    def to_response(self) -> Response:
        """As the backend wants it."""
        if self._error is not None:
            code = _ERROR_CODES.get(self._error.code(), InferenceError.UNKNOWN)
            return Response(error=InferenceError(self._error.message(), code))
        return Response({tensor._name: tensor._array for tensor in self._tensors}, dict(self._parameters))


class InferenceResponseSender:
    """Answers one request whenever the model likes, from any thread."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        """The next response; `TRITONSERVER_RESPONSE_COMPLETE_FINAL` says it was the last."""
        if flags not in (0, TRITONSERVER_RESPONSE_COMPLETE_FINAL):
            raise TritonModelException("Unable to send response. Unsupported flag value.")
        if response is None and not flags:
            raise TritonModelException(
                "Inference Response object must be provided when the response flags is set to zero."
            )
        try:
            self._request.send(response.to_response() if response is not None else None, bool(flags))
        except InferenceError as error:
            raise TritonModelException("Unable to send response. Response sender has been closed.") from error

    def is_cancelled(self) -> bool:
        """True once nobody waits for an answer."""
        return self._request.is_cancelled()


class InferenceRequest:
    """A request to this model; or, made by a model, one to another model, which is not served yet."""

    def __init__(
        self,
        model_name: str = "",
        requested_output_names: Sequence[str] = (),
        inputs: Sequence[Tensor] = (),
        request_id: str = "",
        correlation_id: int | str = 0,
        model_version: int = -1,
        flags: int = 0,
        timeout: int = 0,
        preferred_memory: PreferredMemory | None = None,
        trace: object = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        self._model_name = model_name
        self._outputs = list(requested_output_names)
        self._inputs = list(inputs)
        self._request_id = request_id
        self._correlation_id = correlation_id
        self._flags = flags
        self._timeout = timeout
        self._parameters = dict(parameters or {})
        self._request: Request | None = None
        self.has_sender = False

    @classmethod
    def of(cls, request: Request, model_name: str, output_names: list[str]) -> InferenceRequest:
        """The request of a client, for a model to read. `output_names`: all outputs the model has."""
        made = cls.__new__(cls)
        header = request.header
        made._model_name = model_name
        made._outputs = header.outputs or output_names
        made._inputs = [Tensor(name, array) for name, array in request.inputs.items()]
        made._request_id = header.request_id
        made._correlation_id = header.correlation_id
        made._flags = header.flags
        made._timeout = header.timeout_us
        made._parameters = header.parameters
        made._request = request
        made.has_sender = False
        return made

    def inputs(self) -> list[Tensor]:
        """The tensors the client has sent."""
        return self._inputs

    def model_name(self) -> str:
        """The model it is for."""
        return self._model_name

    def request_id(self) -> str:
        """The client's name for it, or empty."""
        return self._request_id

    def correlation_id(self) -> int | str:
        """The sequence it belongs to, or 0."""
        return self._correlation_id

    def flags(self) -> int:
        """Sequence start 1, sequence end 2."""
        return self._flags

    def set_flags(self, flags: int) -> None:
        """Of a request this model makes."""
        self._flags = flags

    def timeout(self) -> int:
        """Microseconds, or 0."""
        return self._timeout

    def parameters(self) -> str:
        """The client's parameters, as JSON."""
        return json.dumps(self._parameters) if self._parameters else "{}"

    def requested_output_names(self) -> list[str]:
        """What the client wants back: all outputs unless it has said which."""
        return self._outputs

    def preferred_memory(self) -> PreferredMemory:
        """Where outputs should be."""
        return PreferredMemory(TRITONSERVER_MEMORY_CPU, 0)

    def trace(self) -> None:
        """No trace is taken inside a model."""
        return

    def get_response_sender(self) -> InferenceResponseSender:
        """Answers the request in place of what `execute` returns."""
        if self._request is None:
            raise TritonModelException("A request that a model makes has no response sender.")
        self.has_sender = True
        return InferenceResponseSender(self._request)

    def is_cancelled(self) -> bool:
        """True once nobody waits for an answer."""
        return self._request is not None and self._request.is_cancelled()

    def set_release_flags(self, flags: int) -> None:
        """Only the default, RELEASE_ALL: rescheduling belongs to iterative sequences."""
        if flags != TRITONSERVER_REQUEST_RELEASE_ALL:
            raise TritonModelException("TRITONSERVER_REQUEST_RELEASE_RESCHEDULE is not served yet.")

    def exec(self, decoupled: bool = False) -> InferenceResponse | Iterator[InferenceResponse]:
        """Not served yet: an error response that says so."""
        error = TritonError(
            f"The model called model {self._model_name!r}: requests from a model to another one (business logic "
            "scripting) are not served yet.",
            TritonError.UNSUPPORTED,
        )
        response = InferenceResponse(error=error)
        return iter([response]) if decoupled else response

    async def async_exec(self, decoupled: bool = False) -> InferenceResponse | Iterator[InferenceResponse]:
        """Not served yet: an error response that says so."""
        return self.exec(decoupled)
