"""The pooling models of the repository by name, as the embedding and rerank routes look for them. Loads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from llmserve.backends.pooling_model import PoolingModel
from llmserve.errors import InferenceError, ModelNotFoundError, NotReadyError
from llmserve.pooling_config import Kind
from llmserve.pooling_metrics import PoolingMetrics
from llmserve.repository.model_folder import POOLING
from llmserve.repository.model_repository import ModelRepository
from llmserve.repository.served_version import ServedVersion


class PoolingModels:
    """Looks into the repository at every question: models come and go."""

    def __init__(self, repository: ModelRepository) -> None:
        self._repository = repository

    @property
    def names(self) -> list[str]:
        """Of the models that serve."""
        return [served.name for served in self._serving()]

    @property
    def metrics(self) -> Sequence[PoolingMetrics]:
        """Of the models that serve."""
        return [_model_of(served).metrics for served in self._serving()]

    def kind(self, name: str) -> Kind:
        """What a model of `names` is for."""
        return _model_of(self._find(name)).pooling.kind

    def get(self, name: str) -> PoolingModel:
        """To look at: a card, its limits. Raises ModelNotFoundError."""
        return _model_of(self._find(name))

    @contextmanager
    def use(self, name: str) -> Iterator[PoolingModel]:
        """For a request: a reload waits until it is answered. Raises ModelNotFoundError, NotReadyError."""
        served = self._find(name)
        if not served.serving:
            raise NotReadyError(f"The model {name!r} takes no requests now. GET /ready says when it does.")
        with served.in_use():
            yield _model_of(served)

    def _find(self, name: str) -> ServedVersion:
        try:
            served = self._repository.find(name).find(None)
        except InferenceError:
            raise ModelNotFoundError(name, self.names) from None
        if not isinstance(served.model, PoolingModel):
            raise ModelNotFoundError(name, self.names)
        return served

    def _serving(self) -> Iterator[ServedVersion]:
        for model in self._repository.models:
            if (serving := model.serving) and serving[-1].config.backend == POOLING:
                yield serving[-1]


def _model_of(served: ServedVersion) -> PoolingModel:
    model = served.model
    assert isinstance(model, PoolingModel)
    return model
