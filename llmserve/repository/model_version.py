"""What the repository asks of one loaded version of a model, whatever runs it. GeneralModel of `backends/` is one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Protocol

from tritonclient.grpc.model_config_pb2 import ModelConfig

from llmserve.backends.model_messages import MetricSample
from llmserve.general_metrics import ModelStatistics
from llmserve.inference import InferRequest, InferResponse


class ResponseStream(Protocol):
    """The responses to one request, as they come."""

    def __aiter__(self) -> AsyncIterator[InferResponse]:
        """Itself."""
        ...

    def __anext__(self) -> Awaitable[InferResponse]:
        """The next response."""
        ...

    def aclose(self) -> Coroutine[Any, Any, None]:
        """Cancels the request if it is not finished."""
        ...


class ModelVersion(Protocol):
    """One version of a model, from before it is started until after it is stopped."""

    name: str
    version: str

    @property
    def config(self) -> ModelConfig:
        """Complete once `start` has returned: a model may say its own inputs and outputs."""
        ...

    @property
    def reason(self) -> str:
        """Why it is not ready; empty when it is."""
        ...

    async def start(self) -> None:
        """Returns when it takes requests. Raises LLMServeError when it never will."""
        ...

    def infer(self, request: InferRequest) -> ResponseStream:
        """Exactly one response, any number from a decoupled model. Closing the iterator cancels the request."""
        ...

    async def stop(self) -> None:
        """Requests in flight fail: who wants them answered waits for that first."""
        ...

    def is_ready(self) -> bool:
        """Whether a request would be run now."""
        ...

    def statistics(self) -> ModelStatistics:
        """What happened to its requests since it was made."""
        ...

    @property
    def custom_metrics(self) -> Mapping[Any, MetricSample]:
        """The series that the model keeps itself."""
        ...

    def explain(self) -> dict[str, Any]:
        """Why its last batches had the size they had; plain JSON values."""
        ...


class Servable(Protocol):
    """A version that requests are sent to, of a general model or of an LLM."""

    @property
    def version(self) -> int:
        """Its number."""
        ...

    @property
    def config(self) -> ModelConfig:
        """Complete."""
        ...

    @property
    def labels(self) -> Mapping[str, list[str]]:
        """output -> its classes, in order."""
        ...

    @property
    def ready(self) -> bool:
        """Whether a request would be run now."""
        ...

    @property
    def reason(self) -> str:
        """Why not; empty when it would."""
        ...

    def infer(self, request: InferRequest) -> ResponseStream:
        """The responses to a request."""
        ...

    def statistics(self) -> ModelStatistics:
        """What happened to its requests."""
        ...

    def explain(self) -> dict[str, Any]:
        """Why its last batches had the size they had; plain JSON values."""
        ...


class LanguageModelEntry(Servable, Protocol):
    """An LLM that another backend serves, under one of its names."""

    @property
    def name(self) -> str:
        """As clients ask for it."""
        ...


# (name, version, folder of the version, folder of the model, configuration) -> the version, not yet started
OpenVersion = Callable[[str, str, Path, Path, ModelConfig], ModelVersion]
