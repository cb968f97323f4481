"""How a model repository is run: the settings behind Triton's flags of the same names. Knows no flag parser."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class ModelControlMode(enum.StrEnum):
    """Who decides which models are loaded."""

    NONE = "none"  # everything, once, at the start
    POLL = "poll"  # everything, and what changes on disk
    EXPLICIT = "explicit"  # what `load_model` names, then the load and unload requests


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositorySettings:
    """`--model-repository`, `--model-control-mode`, `--load-model`, ... as Triton Inference Server names them."""

    model_repository: tuple[str, ...] = ()  # folders or fsspec URLs
    model_control_mode: ModelControlMode = ModelControlMode.NONE
    load_model: tuple[str, ...] = ()  # at the start in mode explicit; "*" alone means all
    model_config_name: str = ""  # use configs/<name>.pbtxt of a model where there is one
    repository_poll_secs: float = 15.0
    strict_readiness: bool = True
    exit_on_error: bool = False  # Triton's default is true; here a broken model costs only itself
    model_load_thread_count: int = 4  # models that load at the same time
    exit_timeout_secs: float = 30.0  # how long a retired version may finish its requests
