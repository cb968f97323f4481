"""The one method of uvicorn's protocol that is overridden and is none of asyncio's must be there.

An override of nothing is never called, and who is answered over a pipeline would not learn that the client has gone."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_none_without_it_is_installed() -> None:
    assert hasattr(HttpToolsProtocol, "_start_asgi_task")
    needs = [Requirement(text) for text in tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]]
    (uvicorn,) = [need for need in needs if need.name == "uvicorn"]
    assert "0.45.0" in uvicorn.specifier  # the first with the hook
    assert "0.44.0" not in uvicorn.specifier
