"""How the API finds a model by the name in a request. Knows nothing of how models are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from llmserve.backends.generation import TextGenerator
from llmserve.backends.pooling_model import PoolingModel
from llmserve.errors import ModelNotFoundError
from llmserve.pooling_config import Kind
from llmserve.pooling_metrics import PoolingMetrics


class ModelDirectory(Protocol):
    """The LLMs served now."""

    @property
    def names(self) -> Sequence[str]:
        """All names, in the order they were configured."""
        ...

    @property
    def default(self) -> str | None:
        """The name meant by a request without `model`: set when exactly one LLM is served."""
        ...

    def get(self, name: str) -> TextGenerator:
        """Raises ModelNotFoundError."""
        ...


class PoolingDirectory(Protocol):
    """The embedding, reranker and classifier models served now."""

    @property
    def names(self) -> Sequence[str]:
        """All names."""
        ...

    @property
    def metrics(self) -> Sequence[PoolingMetrics]:
        """Of all models."""
        ...

    def kind(self, name: str) -> Kind:
        """What a model is for. Raises ModelNotFoundError."""
        ...

    def get(self, name: str) -> PoolingModel:
        """To look at, not to run. Raises ModelNotFoundError."""
        ...

    def use(self, name: str) -> AbstractContextManager[PoolingModel]:
        """For a request: the model stays until it is answered. Raises ModelNotFoundError, NotReadyError."""
        ...


class NoPoolingModels:
    """The directory of a server without any."""

    names: Sequence[str] = ()
    metrics: Sequence[PoolingMetrics] = ()

    def kind(self, name: str) -> Kind:
        """Raises ModelNotFoundError."""
        raise ModelNotFoundError(name, [])

    def get(self, name: str) -> PoolingModel:
        """Raises ModelNotFoundError."""
        raise ModelNotFoundError(name, [])

    def use(self, name: str) -> AbstractContextManager[PoolingModel]:
        """Raises ModelNotFoundError."""
        raise ModelNotFoundError(name, [])
