"""What sentence-transformers' modules.json puts behind a transformer: pooling, dense layers, normalising, a judgement.

Knows the modules' own files and nothing of the transformer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmserve.errors import ModelLoadError
from llmserve.json_fields import JsonFields, read_json, read_json_list

PoolingMode = Literal["cls", "mean", "mean_sqrt_len", "weighted_mean", "max", "last"]
DenseActivation = Literal["identity", "tanh", "relu", "gelu", "silu", "sigmoid"]

MODULES_FILE = "modules.json"
_POOLING_MODES: dict[str, PoolingMode] = {  # sentence-transformers' names, and the older ones by flags
    "cls": "cls",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "max": "max",
    "lasttoken": "last",
}
_POOLING_FLAGS: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
_ACTIVATIONS: dict[str, DenseActivation] = {  # by the last part of a dotted class name
    "Identity": "identity",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Sigmoid": "sigmoid",
}
_KNOWN_MODULES = ("Transformer", "Dropout", "Pooling", "Dense", "Normalize", "LogitScore")


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """A linear layer and its activation behind the pooling; `folder`, within the model's, holds its weights."""

    folder: str
    in_features: int
    out_features: int
    bias: bool
    activation: DenseActivation


class PoolingModules:
    """What modules.json lists behind the transformer; without it, what sentence-transformers would put there."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / MODULES_FILE
        self._folder = folder
        self._modules: list[tuple[str, str]] | None = None  # kind, folder
        if self.path.is_file():
            self._modules = [self._module(entry) for entry in read_json_list(self.path)]
            order = [kind for kind, _ in self._modules if kind in ("Pooling", "Dense", "Normalize")]
            if order != sorted(order, key=("Pooling", "Dense", "Normalize").index):
                raise ModelLoadError(f"{self.path}: modules in the order {order} are not supported.")

    def _module(self, entry: JsonFields) -> tuple[str, str]:
        kind, path = entry.string("type", "").rpartition(".")[2], entry.string("path", "")
        if kind not in _KNOWN_MODULES:
            raise entry.error("type", f"a module of the kinds {', '.join(_KNOWN_MODULES)}", entry.values.get("type"))
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise entry.error("path", "a folder within the model's", path)
        return kind, path

    def _configs(self, kind: str) -> list[tuple[str, JsonFields]]:
        found = [path for each, path in self._modules or () if each == kind]
        return [(path, read_json(self._folder / path / "config.json")) for path in found]

    def pooling(self, default: PoolingMode) -> tuple[tuple[PoolingMode, ...], bool]:
        """How, and whether the prompt takes part."""
        for _, fields in self._configs("Pooling"):
            return _pooling_modes(fields), fields.boolean("include_prompt", True)
        return (default,), True

    def dense(self, width: int) -> tuple[DenseConfig, ...]:
        """The dense layers, the first taking vectors of `width`."""
        layers = []
        for path, fields in self._configs("Dense"):
            layer = _dense(path, fields)
            if layer.in_features != width:
                raise fields.error("in_features", f"{width}, the size of what comes before", layer.in_features)
            width = layer.out_features
            layers.append(layer)
        return tuple(layers)

    def normalizes(self) -> bool:
        """Embeddings of a folder without modules.json are normalised too, as other servers do."""
        return self._modules is None or any(kind == "Normalize" for kind, _ in self._modules)

    def judging_token_ids(self) -> tuple[int, ...]:
        """Of sentence-transformers' LogitScore: the tokens of yes and, if it says so, of no."""
        for _, fields in self._configs("LogitScore"):
            yes = fields.integer("true_token_id", minimum=0)
            return (yes, fields.integer("false_token_id", minimum=0)) if fields.has("false_token_id") else (yes,)
        return ()


def _pooling_modes(fields: JsonFields) -> tuple[PoolingMode, ...]:
    named = fields.values.get("pooling_mode")
    if named is None:
        return tuple(mode for flag, mode in _POOLING_FLAGS.items() if fields.boolean(flag, False)) or ("mean",)
    names = named if isinstance(named, list) else [named]
    if not names or not all(isinstance(name, str) and name in _POOLING_MODES for name in names):
        raise fields.error("pooling_mode", f"of {', '.join(_POOLING_MODES)}", named)
    return tuple(_POOLING_MODES[name] for name in names)


def _dense(path: str, fields: JsonFields) -> DenseConfig:
    name = fields.string("activation_function", "torch.nn.Tanh").rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise fields.error("activation_function", f"of {', '.join(_ACTIVATIONS)}", name)
    if fields.boolean("use_residual", False):
        raise fields.error("use_residual", "false: residual dense modules are not supported", True)
    if (source := fields.string("module_input_name", "sentence_embedding")) != "sentence_embedding":
        raise fields.error("module_input_name", "'sentence_embedding'", source)
    return DenseConfig(
        folder=path,
        in_features=fields.integer("in_features"),
        out_features=fields.integer("out_features"),
        bias=fields.boolean("bias", True),
        activation=_ACTIVATIONS[name],
    )
