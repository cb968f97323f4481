"""How the API finds a model by the name in a request. Knows nothing of how models are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from llmserve.backends.generation import TextGenerator


class ModelDirectory(Protocol):
    """The LLMs served now."""

    @property
    def names(self) -> Sequence[str]:
        """All names, in the order they were configured."""
        ...

    @property
    def default(self) -> str | None:
        """The name meant by a request without `model`: set when exactly one LLM is served."""
        ...

    def get(self, name: str) -> TextGenerator:
        """Raises ModelNotFoundError."""
        ...
