"""The LLMs served now, by the names clients use, and how one is opened from its files. Fetches nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmserve.backends.generation import SamplingDefaults
from llmserve.backends.llm import LLM
from llmserve.config import ModelConfigEntry, ServerConfig
from llmserve.engine.processes import EngineProcesses
from llmserve.errors import ConfigError, ModelLoadError, ModelNotFoundError
from llmserve.metrics import Metrics
from llmserve.models.config import read_model_config
from llmserve.repository.sources import ModelSource
from llmserve.tokenizer import Tokenizer

_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


class ServedModels:
    """Finds a model by name. The first of an LLM's names is the one it calls itself."""

    def __init__(self) -> None:
        self.llms: list[LLM] = []
        self._by_name: dict[str, LLM] = {}
        self._watchers: list[Callable[[], None]] = []

    def watch(self, on_change: Callable[[], None]) -> None:
        """Whoever keeps something for each LLM hears here when to let go of it: no LLM that is not served any more
        may be held on to, with its tokenizer and every version that came after it."""
        self._watchers.append(on_change)

    def add(self, llm: LLM, names: Sequence[str]) -> None:
        """Raises ConfigError if a name is taken."""
        for name in names:
            if name in self._by_name:
                raise ConfigError(f"Two models are named {name!r}. Give each its own with --served-model-name.")
            self._by_name[name] = llm
        self.llms.append(llm)
        self._changed()

    def find(self, name: str) -> LLM | None:
        """None if it is not served now."""
        return self._by_name.get(name)

    def replace(self, old: LLM, new: LLM) -> None:
        """From here on requests find `new`, in the same place and under the same names."""
        self.llms[self.llms.index(old)] = new
        self._by_name = {name: new if llm is old else llm for name, llm in self._by_name.items()}
        self._changed()

    def remove(self, llm: LLM) -> None:
        """No request finds it any more."""
        self.llms.remove(llm)
        self._by_name = {name: other for name, other in self._by_name.items() if other is not llm}
        self._changed()

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    @property
    def default(self) -> str | None:
        """What a request without `model` means: the only LLM there is."""
        return self.llms[0].name if len(self.llms) == 1 else None

    def get(self, name: str) -> LLM:
        """Raises ModelNotFoundError."""
        if name not in self._by_name:
            raise ModelNotFoundError(name, self.names)
        return self._by_name[name]

    def _changed(self) -> None:
        for on_change in self._watchers:
            on_change()


def open_llm(
    source: ModelSource,
    entry: ModelConfigEntry,
    server: ServerConfig,
    metrics: Metrics,
    processes: EngineProcesses,
    version: int = 1,
) -> LLM:
    """Reads what the server process must know of a model: tokenizer and sampling defaults. Loads no weights. Raises
    ModelLoadError, and ConfigError, for what its engine would refuse too: but later, behind the loading of others."""
    read_model_config(source.path).context_length(entry.engine.max_model_len)
    return LLM(
        name=entry.served_names[0] if entry.served_names else source.name,
        root=source.root,
        config=dataclasses.replace(entry.engine, model=str(source.path)),
        tokenizer=Tokenizer.from_path(source.path),
        sampling_defaults=read_sampling_defaults(source.path),
        metrics=metrics,
        server=server,
        processes=processes,
        version=version,
    )


def read_sampling_defaults(path: Path) -> SamplingDefaults:
    """What `generation_config.json` of a folder says about sampling; nothing for a .gguf file."""
    file = path / "generation_config.json"
    if path.is_file() or not file.exists():
        return SamplingDefaults()
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelLoadError(f"{file} must hold a JSON object.")
    for key in _SAMPLING_DEFAULTS:
        value = values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise ModelLoadError(f"{file}: {key!r} must be a number of at least 0, not {value!r}.")
    if values.get("do_sample") is False:
        values["temperature"] = 0.0  # transformers' way of saying greedy
    return SamplingDefaults({key: values[key] for key in _SAMPLING_DEFAULTS if values.get(key) is not None})
