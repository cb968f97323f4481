"""Fills the configuration from four places: flags over environment over TOML file over defaults.

A setting is defined once, as a field in `config.py`; its flag is `--max-model-len`, its variable
`LLMSERVE_MAX_MODEL_LEN`, its TOML key `max_model_len`. A TOML file may also hold `[[models]]` tables, each with a
`model` and any setting of an engine.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmserve.config import (
    GPU_SETTINGS,
    DoorConfig,
    EngineConfig,
    ModelConfigEntry,
    RepositoryConfig,
    ServeConfig,
    ServerConfig,
    parse_bytes,
    parse_memory,
    setting_names,
)
from llmserve.errors import ConfigError
from llmserve.suggestions import did_you_mean

ENV_PREFIX = "LLMSERVE_"
_OTHER_VARIABLES = ("API_KEY", "CACHE", "CONFIG", "MODELS")  # no settings, but read by us
# What Kubernetes tells every pod of a Service called llmserve or llmserve-grpc; its LLMSERVE_GRPC_PORT is a URL.
_SERVICE_LINK = re.compile(r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
_SECTIONS: dict[str, type] = {
    "server": ServerConfig,
    "door": DoorConfig,
    "engine": EngineConfig,
    "model repository": RepositoryConfig,
}


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for every setting, plus --config. Unset flags are absent from the namespace."""
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these settings and [[models]] tables.")
    for title, section in _SECTIONS.items():
        group = parser.add_argument_group(title)
        for field in dataclasses.fields(section):
            if "help" not in field.metadata:
                continue
            flag = "--" + field.name.replace("_", "-")
            shown = "" if field.default in (None, "", ()) else f" Default: {field.default}."
            options: dict[str, Any] = {"help": field.metadata["help"] + shown, "default": argparse.SUPPRESS}
            if field.type == "bool":
                group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
            elif field.metadata["kind"] == "list":
                group.add_argument(flag, action="append", metavar="TEXT", **options)
            else:
                group.add_argument(flag, metavar=_metavar(field), **options)


def load_serve_config(args: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> ServeConfig:
    """`args` are the parsed flags (`models`: list, `served_model_name`: list or None). Raises ConfigError."""
    variables = _own_variables(environ)
    path = args.get("config") or variables.get("CONFIG")
    file_values, file_models = _read_toml(Path(path)) if path else ({}, [])
    values = dict(file_values)
    for name in _all_names():
        if (variable := name.upper()) in variables:
            values[name] = _convert(name, variables[variable], f"environment variable {ENV_PREFIX}{variable}")
        if name in args:
            values[name] = _convert(name, args[name], "flag --" + name.replace("_", "-"))
    server = ServerConfig(**{name: values[name] for name in setting_names(ServerConfig) if name in values})
    door = DoorConfig(**{name: values[name] for name in setting_names(DoorConfig) if name in values})
    repository = RepositoryConfig(**{name: values[name] for name in setting_names(RepositoryConfig) if name in values})
    base = {name: values[name] for name in setting_names(EngineConfig) if name in values}
    flags = {name: base[name] for name in base if name in args}  # a flag also overrides a model's own table
    named = list(args.get("models") or variables.get("MODELS", "").split())
    tables = [{"model": name} for name in named] if named else file_models
    if not tables and not repository.model_repository:
        tables = [{"model": ""}]  # the embedded default
    entries = tuple(_entry(table, base, flags) for table in tables)
    served = _with_served_names(entries, args.get("served_model_name"))
    engine = _engine_config(base, flags)
    return ServeConfig(server=server, door=door, repository=repository, engine=engine, models=served)


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """What to say of each variable that looks like a setting and is none."""
    known = [*map(str.upper, _all_names()), *_OTHER_VARIABLES]
    told = []
    for name in sorted(_own_variables(environ).keys() - set(known)):
        hint = did_you_mean(name, known, lambda near: ENV_PREFIX + near)
        told.append(f"the environment variable {ENV_PREFIX}{name} is no setting, and is ignored.{hint}")
    return told


def _own_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """By their names without the prefix."""
    own = {key.removeprefix(ENV_PREFIX): value for key, value in environ.items() if key.startswith(ENV_PREFIX)}
    return {
        name: value
        for name, value in own.items()
        if not _SERVICE_LINK.fullmatch(name) and not (name.endswith("PORT") and "://" in value)
    }


def _with_served_names(entries: tuple[ModelConfigEntry, ...], served: list[str] | None) -> tuple[ModelConfigEntry, ...]:
    """--served-model-name: with one model all the names are its own (as in vLLM); with several, one name for each."""
    if not served:
        return entries
    if len(entries) == 1:
        return (dataclasses.replace(entries[0], served_names=tuple(served)),)
    if len(entries) != len(served):
        raise ConfigError(f"--served-model-name gives {len(served)} names for {len(entries)} models.")
    return tuple(dataclasses.replace(e, served_names=(name,)) for e, name in zip(entries, served, strict=True))


def _entry(table: dict[str, Any], base: dict[str, Any], flags: dict[str, Any]) -> ModelConfigEntry:
    own = {key: value for key, value in table.items() if key not in ("model", "served_model_name")}
    served = table.get("served_model_name", [])
    names = (served,) if isinstance(served, str) else tuple(served)
    engine = _engine_config({**base, **own, **flags}, {**own, **flags})
    return ModelConfigEntry(model=table["model"], served_names=names, engine=engine)


def _engine_config(values: dict[str, Any], said: dict[str, Any]) -> EngineConfig:
    """`said` are those of `values` that a flag or the model's own table gives: a GPU's settings among them are refused
    for a model on a CPU. Those that it inherits are meant for the others, and dropped: TOML has no word to unset one.
    """
    if values.get("device") == "cpu":
        values = {name: value for name, value in values.items() if name in said or name not in GPU_SETTINGS}
    return EngineConfig(**values)


def _read_toml(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The file's settings and its [[models]] tables, both checked and converted."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration file {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file {path} is not valid TOML: {error}.") from error
    tables = raw.pop("models", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{path}: write models as [[models]] tables, each with a key 'model'.")
    values = _checked(raw, _all_names(), str(path))
    models = []
    for index, table in enumerate(tables):
        where = f"{path}: models[{index}]"
        if not isinstance(table.get("model"), str):
            raise ConfigError(f"{where} needs a key 'model' that is a string: a folder, a .gguf file or a name.")
        own = {key: table[key] for key in ("model", "served_model_name") if key in table}
        rest = {key: value for key, value in table.items() if key not in own}
        models.append(own | _checked(rest, setting_names(EngineConfig), where))
    return values, models


def _checked(raw: dict[str, Any], known: list[str], where: str) -> dict[str, Any]:
    values = {}
    for key, value in raw.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ConfigError(f"{where}: unknown setting {key!r}.{did_you_mean(name, known)}")
        values[name] = _convert(name, value, f"{where}: {key}")
    return values


def _all_names() -> list[str]:
    return [name for section in _SECTIONS.values() for name in setting_names(section)]


def _field(name: str) -> dataclasses.Field[Any]:
    return next(f for section in _SECTIONS.values() for f in dataclasses.fields(section) if f.name == name)


def _scalar_type(field: dataclasses.Field[Any]) -> type:
    """int for `int | None`."""
    section = next(s for s in _SECTIONS.values() if field.name in setting_names(s))
    annotation = typing.get_type_hints(section)[field.name]
    if isinstance(annotation, types.UnionType):
        annotation = next(member for member in typing.get_args(annotation) if member is not types.NoneType)
    assert isinstance(annotation, type)
    return annotation


def _metavar(field: dataclasses.Field[Any]) -> str:
    if field.metadata["choices"]:
        return "{" + ",".join(field.metadata["choices"]) + "}"
    if field.metadata["kind"]:
        return {"bytes": "BYTES", "memory": "SHARE|BYTES"}[field.metadata["kind"]]
    return {int: "N", float: "X"}.get(_scalar_type(field), "TEXT")


def _convert(name: str, value: Any, where: str) -> Any:
    """A string or TOML value -> the setting's type. Raises ConfigError naming where the value came from."""
    field = _field(name)
    if field.metadata["kind"] == "list":
        return _convert_list(value, where)
    wanted = _scalar_type(field)
    try:
        if field.metadata["kind"] == "bytes" and isinstance(value, str):
            return parse_bytes(value)
        if field.metadata["kind"] == "memory" and not isinstance(value, bool):
            return parse_memory(str(value))
        if wanted is bool and isinstance(value, str):
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[value.lower()]
        if isinstance(value, bool) is not (wanted is bool):
            raise ValueError
        converted = wanted(value)
        if isinstance(value, float) and wanted is int and value != converted:
            raise ValueError
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{where}: {value!r} is not a valid {wanted.__name__}.") from error
    choices = field.metadata["choices"]
    if choices and converted not in choices:
        raise ConfigError(f"{where}: {value!r} is not one of {', '.join(choices)}.")
    return converted


def _convert_list(value: Any, where: str) -> tuple[str, ...]:
    """A list of strings, or one string of names with commas between."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ConfigError(f"{where}: {value!r} is not a list of strings.")
    return tuple(item.strip() for item in items)
