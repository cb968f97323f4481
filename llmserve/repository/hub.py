"""Fetches models from the Hugging Face hub into its own cache, for users who are online. Imports the hub's library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

from llmserve.errors import ModelLoadError
from llmserve.repository.cache import Progress

_WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*"]
_UNWANTED_FILES = ["consolidated*", "original/*", "onnx/*", "*/*.json", "*/*.safetensors"]  # the weights once more


def download_model(repository: str, progress: Progress) -> Path:
    """The folder of `owner/model`: what serving needs of it, weights as safetensors. Raises ModelLoadError."""
    try:
        return Path(
            snapshot_download(
                repository,
                allow_patterns=_WANTED_FILES,
                ignore_patterns=_UNWANTED_FILES,
                tqdm_class=_reporting_bar(progress),
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _not_had(repository, error) from error


def download_file(repository: str, file: str, progress: Progress) -> Path:
    """One file of `owner/model`. Raises ModelLoadError."""
    try:
        return Path(hf_hub_download(repository, file, tqdm_class=_reporting_bar(progress)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _not_had(f"{repository}/{file}", error) from error


def _not_had(name: str, error: Exception) -> ModelLoadError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    offline = " HF_HUB_OFFLINE is set, so only the hub's cache was searched." if constants.HF_HUB_OFFLINE else ""
    return ModelLoadError(
        f"{name!r} is no file, folder or embedded model here, and the Hugging Face hub ({constants.ENDPOINT}) did not "
        f"give it: {reason}.{offline} Check the name and the network, log in with `hf auth login` if the model is "
        "gated, or give a folder or a .gguf file."
    )


def _reporting_bar(progress: Progress) -> type[Any]:
    """A tqdm class, the only way the hub's library tells how far it is: draws nothing, reports the bytes that came."""

    class ReportingBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts_bytes = options.get("unit") == "B"
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self._counts_bytes and self.total:
                progress("downloading", int(self.n), int(self.total))

    return ReportingBar
