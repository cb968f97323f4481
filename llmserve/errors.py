"""The errors a user, a model file or a client can cause. Knows nothing of HTTP: only `api/` maps codes to statuses."""

from __future__ import annotations


class LLMServeError(Exception):
    """Root of the tree. `code` is stable and machine-readable; the message says what is wrong and what to do."""

    code = "internal_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequestError(LLMServeError):
    """The client asked for something that cannot be honoured. `param` names the offending field (dotted path)."""

    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class RequestTooLargeError(InvalidRequestError):
    """The body itself is over a limit."""

    code = "request_too_large"


class ModelNotFoundError(LLMServeError):
    """No model of that name is served."""

    code = "model_not_found"

    def __init__(self, model: str, known: list[str], advice: str = "") -> None:
        listed = ", ".join(repr(name) for name in known) or "none"
        super().__init__(f"The model {model!r} is not served here. Served models: {listed}. {advice}".rstrip())
        self.model = model


class QueueFullError(LLMServeError):
    """Admission refused: too much is waiting already. `retry_after_s` is when to come back."""

    code = "queue_full"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimitError(QueueFullError):
    """One tenant has asked for more than its key allows. Others are not concerned."""

    code = "rate_limit_exceeded"


class UnauthorizedError(LLMServeError):
    """The request carries no API key that is known here."""

    code = "invalid_api_key"


class ForbiddenError(LLMServeError):
    """Who asks is known, or need not be, but may not do this."""

    code = "permission_denied"


class StreamGoneError(LLMServeError):
    """There is no stream to continue: there never was, or there is no longer."""

    code = "stream_not_found"


class StreamConflictError(InvalidRequestError):
    """The same idempotency key came with another request."""

    code = "idempotency_key_reused"


class NotReadyError(LLMServeError):
    """The model is loading, draining, stalled or dead."""

    code = "not_ready"


class DeadlineExceededError(LLMServeError):
    """The request's time ran out."""

    code = "deadline_exceeded"


class EngineDeadError(LLMServeError):
    """The engine process ended while it held the request."""

    code = "engine_dead"


class ConfigError(LLMServeError):
    """A flag, environment variable or configuration file holds an unusable value."""

    code = "invalid_config"


class ModelLoadError(LLMServeError):
    """A model's files are missing, damaged or of an architecture that is not supported. Names the file or tensor."""

    code = "model_load_failed"


class InsufficientMemoryError(ModelLoadError):
    """The plan does not fit the device: says what is needed, what there is, and which flag to change."""

    code = "insufficient_memory"


class InferenceError(LLMServeError):
    """An inference, or a model's load, failed; `code` is one of Triton's error codes, which clients act on.

    A model may raise any of them (`TritonError(message, code)`); both v2 skins map them to their statuses.
    """

    INTERNAL = "internal"
    UNKNOWN = "unknown"
    NOT_FOUND = "not_found"
    INVALID_ARG = "invalid_arg"
    UNAVAILABLE = "unavailable"
    UNSUPPORTED = "unsupported"
    ALREADY_EXISTS = "already_exists"
    CANCELLED = "cancelled"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        super().__init__(message)
        self.code = code


class UnsupportedConfigError(ModelLoadError):
    """A model's configuration asks for something that is not served yet. `field` is its dotted path there."""

    code = "unsupported_config"

    def __init__(self, model: str, field: str) -> None:
        super().__init__(
            f"The configuration of model {model!r} sets '{field}', which is not supported yet. "
            "Remove it to serve the model."
        )
        self.field = field


class ModelExecutionError(LLMServeError):
    """A model failed at a request: it raised, ended, hung or answered nonsense. Other requests are not concerned."""

    code = "model_execution_failed"
