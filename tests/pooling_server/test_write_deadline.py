"""A request's time covers the writing of its vectors, which takes longer than computing them where there are many."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from llmserve.api import vector_format
from llmserve.api.app import create_app
from llmserve.api.directory import NoPoolingModels
from llmserve.api.settings import ApiSettings
from llmserve.backends.pooling_job import Pooled
from llmserve.metrics import Metrics
from llmserve.pooling_config import Kind, PoolingConfig
from llmserve.pooling_metrics import PoolingTimes
from tests.api.conftest import Directory

_LIMIT_S = 0.05
TEXTS = ["a"] * 200


class InstantModel:
    """All that the routes ask of a `PoolingModel`."""

    name = "m"
    pooling = PoolingConfig(
        kind="embed",
        architecture="BertModel",
        hidden_size=8,
        dimension=8,
        max_model_len=32,
        num_token_types=0,
        do_lower_case=False,
        pooling=("mean",),
        include_prompt=True,
        normalize=False,
    )

    async def pool(self, inputs: list[Any], *_: Any, **__: Any) -> Pooled:
        rows = [np.ones(8, np.float32) for _ in inputs]
        times = PoolingTimes(total_s=0, tokenization_s=0, queue_s=0, inference_s=0)
        return Pooled(rows, [1] * len(inputs), times, "cpu")


class OneModel(NoPoolingModels):
    names = ("m",)

    def kind(self, name: str) -> Kind:
        return "embed"

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Any]:
        yield InstantModel()


@pytest.mark.parametrize("timeout_s", [_LIMIT_S, 60.0])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": TEXTS}),
        ("/pooling", {"input": TEXTS}),
        ("/v2/embed", {"texts": TEXTS, "model": "m", "input_type": "search_query"}),
        ("/embed", {"inputs": TEXTS}),
    ],
)
def test_a_deadline_ends_the_writing_of_vectors(
    monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], timeout_s: float
) -> None:
    num_written = 0

    def write(vector: Any) -> list[float]:
        nonlocal num_written
        num_written += 1
        if num_written == 1:
            time.sleep(_LIMIT_S)  # the first takes all the time there is
        return [1.0]

    monkeypatch.setitem(vector_format.FORMATS, "float", write)
    app = create_app(Directory([]), ApiSettings(), Metrics(), pooling=OneModel())

    async def ask() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return (await client.post(path, json=body, headers={"X-Request-Timeout": str(timeout_s)})).status_code

    assert asyncio.run(ask()) == (504 if timeout_s == _LIMIT_S else 200)
    assert (num_written < len(TEXTS)) == (timeout_s == _LIMIT_S)
