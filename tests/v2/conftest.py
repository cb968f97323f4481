"""A place to write model repositories, and a repository over fakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.v2.v2_fake_model import FakeModel

CONFIG = """
backend: "python"
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]
"""

WriteModel = Callable[..., Path]


def model_writer(repository: Path) -> WriteModel:
    """Writes models into `repository`; parameters become the configuration's."""

    def write(
        name: str, *, versions: tuple[int, ...] = (1,), config: str = CONFIG, more: str = "", **settings: str
    ) -> Path:
        folder = repository / name
        for version in versions:
            (folder / str(version)).mkdir(parents=True, exist_ok=True)
            (folder / str(version) / "model.py").write_text("# version\n")
        parameters = "".join(
            f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n' for key, value in settings.items()
        )
        (folder / "config.pbtxt").write_text(config + more + parameters)
        return folder

    return write


@pytest.fixture
def write_model(tmp_path: Path) -> WriteModel:
    """Writes a model into `tmp_path/models`."""
    (tmp_path / "models").mkdir()
    return model_writer(tmp_path / "models")


@pytest.fixture(autouse=True)
def no_old_fakes() -> None:
    FakeModel.opened.clear()
