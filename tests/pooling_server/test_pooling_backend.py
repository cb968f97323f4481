"""The backend of pooling models, without its process: what it refuses to load."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from llmserve.backends.base import ModelContext
from llmserve.backends.model_config import launches
from llmserve.backends.pooling import PoolingBackend
from llmserve.errors import ModelLoadError
from llmserve.repository.model_folder import read_model_folder
from llmserve.worker.pooling_runner import PoolingRunner


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`load` sets this for its process: here it is taken back."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


def test_a_gpu_that_is_not_there_is_refused(embed_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = ModelContext("m", "1", embed_folder, embed_folder, {}, "m_0", kind="GPU")
    with pytest.raises(ModelLoadError, match=r"instance_group\.kind KIND_GPU"):
        PoolingBackend().load(model)


def test_the_configured_gpu_is_taken(embed_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class TakenError(Exception):
        """In place of the load, which needs the GPU."""

    def take(device: torch.device) -> None:
        raise TakenError(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", take)
    model = ModelContext("m", "1", embed_folder, embed_folder, {}, "m_0", kind="GPU", device_id=1)
    with pytest.raises(TakenError, match="cuda:1"):
        PoolingBackend().load(model)


@pytest.mark.parametrize(
    ("group", "device"),
    [("", "auto"), ("kind: KIND_AUTO", "auto"), ("gpus: 1", "auto"), ("kind: KIND_CPU", "cpu")],
)
def test_only_who_asks_for_the_cpu_is_kept_off_a_gpu(
    tmp_path: Path, embed_folder: Path, monkeypatch: pytest.MonkeyPatch, group: str, device: str
) -> None:
    class AskedError(Exception):
        """In place of the load, which needs the GPU."""

    def load(_folder: object, _config: object, _format: object, _threads: object, device: str = "auto") -> None:
        raise AskedError(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(PoolingRunner, "load", load)
    shutil.copytree(embed_folder, tmp_path / "m" / "1")
    (tmp_path / "m" / "config.pbtxt").write_text(f'backend: "pooling" instance_group {{ {group} }}')
    config = read_model_folder("m", tmp_path / "m", tmp_path).config
    (launch,) = launches(config, "1", str(embed_folder), str(tmp_path), "", "info")
    model = ModelContext("m", "1", embed_folder, embed_folder, {}, "m_0", launch.kind, launch.device_id)
    with pytest.raises(AskedError, match=f"^{device}$"):
        PoolingBackend().load(model)
