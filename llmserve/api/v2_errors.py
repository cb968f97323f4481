"""What kind of error each is in Triton's terms, the one vocabulary both v2 skins answer in. Knows neither protocol."""

from __future__ import annotations

from llmserve.errors import (
    DeadlineExceededError,
    EngineDeadError,
    InferenceError,
    InvalidRequestError,
    LLMServeError,
    ModelLoadError,
    ModelNotFoundError,
    NotReadyError,
    QueueFullError,
)

# What both wires refuse alike.
REPOSITORY_NAME = "'repository_name' specification is not supported"
SHARED_MEMORY = "shared memory is not served yet: send tensors in the requests themselves"
TENSOR_IN_SHARED_MEMORY = (
    "shared memory is not served yet: send the tensor in the request ('shared_memory_region' of '{}')"
)

# The first class of an error's method resolution order that stands here decides.
_KINDS: dict[type[BaseException], str] = {
    InvalidRequestError: InferenceError.INVALID_ARG,
    ModelLoadError: InferenceError.INVALID_ARG,
    ModelNotFoundError: InferenceError.NOT_FOUND,
    QueueFullError: InferenceError.UNAVAILABLE,
    NotReadyError: InferenceError.UNAVAILABLE,
    EngineDeadError: InferenceError.UNAVAILABLE,
    DeadlineExceededError: InferenceError.UNAVAILABLE,  # Triton's code for a request that waited too long
    LLMServeError: InferenceError.INTERNAL,
}


class MalformedRequestError(InvalidRequestError):
    """The body is not what the protocol's schema says. Triton answers these with its code for internal errors."""

    code = "malformed_request"


def error_kind(error: BaseException) -> str:
    """One of InferenceError's codes; internal for an error that is not ours."""
    if isinstance(error, InferenceError):
        return error.code
    return next((_KINDS[base] for base in type(error).__mro__ if base in _KINDS), InferenceError.INTERNAL)


def error_text(error: BaseException) -> str:
    """What an error that is not ours says stays in the log: it may not be the client's to know."""
    if isinstance(error, LLMServeError):
        return error.message.encode(errors="backslashreplace").decode()  # it may quote what the client sent
    return "The server failed on this request. The log of the server says why."
