"""`--log-level` reaches the processes of models."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from llmserve.api.entrance import Entrance
from llmserve.api.settings import ApiSettings
from llmserve.config import RepositoryConfig, ServerConfig
from llmserve.general_models import GeneralModels
from llmserve.repository.cache import no_progress
from llmserve.repository.language_models import LanguageModels
from llmserve.repository.served_models import ServedModels

MODEL = """
import logging

class Model:
    inputs = {"x": "FP32[-1]"}
    outputs = {"y": "FP32[-1]"}

    def load(self):
        logging.getLogger("mine").debug("for those who look closely")

    def predict(self, x):
        return {"y": x}
"""


def never_open(*_: object) -> Any:
    raise AssertionError("there are no language models")


@pytest.mark.parametrize(("level", "is_said"), [("debug", True), ("info", False)])
def test_a_models_process_logs_as_much_as_the_server(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], level: str, is_said: bool
) -> None:
    version = tmp_path / "m" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(MODEL)

    async def run() -> None:
        served = ServedModels()
        models = GeneralModels(
            RepositoryConfig(model_repository=(str(tmp_path),)),
            ServerConfig(log_level=level, grpc=False),
            served,
            LanguageModels(served, never_open, 0.0),
            ApiSettings(),
            Entrance(),
            {},
        )
        await models.start(0, lambda name: no_progress)
        assert models.names == ["m"]
        await models.stop(0.0)

    asyncio.run(run())
    assert ("for those who look closely" in capfd.readouterr().err) is is_said
