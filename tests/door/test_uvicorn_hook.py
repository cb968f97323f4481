"""The one method of uvicorn's protocol that is overridden and is none of asyncio's: a uvicorn without it is refused."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llmserve.api import http_protocol
from llmserve.errors import ConfigError

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_a_uvicorn_without_the_hook_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would serve, and every client that goes would leave its generation behind."""
    monkeypatch.delattr(HttpToolsProtocol, "_start_asgi_task")
    spec = importlib.util.spec_from_file_location("http_protocol_of_old", http_protocol.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ConfigError, match=r"uvicorn is too old: 0\.45"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_none_without_it_is_installed() -> None:
    needs = [Requirement(text) for text in tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]]
    (uvicorn,) = [need for need in needs if need.name == "uvicorn"]
    assert "0.45.0" in uvicorn.specifier  # the first with the hook
    assert "0.44.0" not in uvicorn.specifier
