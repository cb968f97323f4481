"""The backend of pooling models, without its process: what it refuses to load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmserve.backends.base import ModelContext
from llmserve.backends.pooling import PoolingBackend
from llmserve.errors import ModelLoadError


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
