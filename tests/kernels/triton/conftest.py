"""Run with `-m gpu`, the tests of the Triton kernels are tests of the device; else they run in the interpreter."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Not imported here: the interpreter must be chosen first, in pytest_configure.
collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("triton") is None else []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Before `-m` selects."""
    if config.getoption("markexpr") == "gpu":
        for item in items:
            if HERE in item.path.parents and item.path.stem not in ("test_interpreter", "test_compile"):
                item.add_marker(pytest.mark.gpu)
