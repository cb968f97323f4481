"""A model's configuration: read from `config.pbtxt`, `model.toml` or JSON, checked, completed.

Triton's ModelConfig message is the one form it has here, compiled as `tritonclient` ships it. Knows no process and no
HTTP, and reads no model file.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from typing import Any

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc.model_config_pb2 import ModelConfig

from llmserve.backends.registry import PLATFORM_BACKENDS
from llmserve.errors import ModelLoadError, UnsupportedConfigError
from llmserve.repository.packaged_files import PACKAGE_KEY

# The file a version holds, by backend; the first that exists is taken.
MODEL_FILENAMES: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("model.onnx",),
    "pytorch": ("model.pt", "model.pt2"),
    "python": ("model.py",),
}

# These take a GPU where there is one, unless the configuration says KIND_CPU: KIND_AUTO stays as it is until they load.
_CHOOSING_BACKENDS = frozenset({"pooling"})

# What asks for something that is not served yet. Whoever adds the feature takes its line out.
_UNSUPPORTED: dict[str, Callable[[ModelConfig], bool]] = {
    "sequence_batching": lambda c: c.HasField("sequence_batching"),
    "ensemble_scheduling": lambda c: c.HasField("ensemble_scheduling") or c.platform == "ensemble",
    "response_cache.enable": lambda c: c.response_cache.enable,
    "model_repository_agents": lambda c: bool(c.model_repository_agents.agents),
    "model_operations.op_library_filename": lambda c: bool(c.model_operations.op_library_filename),
    "model_metrics": lambda c: bool(c.model_metrics.metric_control),
    "cc_model_filenames": lambda c: bool(c.cc_model_filenames),
    "runtime": lambda c: bool(c.runtime),
    "input.is_shape_tensor": lambda c: any(tensor.is_shape_tensor for tensor in c.input),
    "output.is_shape_tensor": lambda c: any(tensor.is_shape_tensor for tensor in c.output),
    "input.is_non_linear_format_io": lambda c: any(tensor.is_non_linear_format_io for tensor in c.input),
    "output.is_non_linear_format_io": lambda c: any(tensor.is_non_linear_format_io for tensor in c.output),
    "optimization.execution_accelerators": lambda c: c.optimization.HasField("execution_accelerators"),
    "optimization.cuda.graphs": lambda c: c.optimization.cuda.graphs,
    "instance_group.rate_limiter": lambda c: any(group.HasField("rate_limiter") for group in c.instance_group),
    "instance_group.passive": lambda c: any(group.passive for group in c.instance_group),
    "instance_group.profile": lambda c: any(group.profile for group in c.instance_group),
    "instance_group.host_policy": lambda c: any(group.host_policy for group in c.instance_group),
    "instance_group.secondary_devices": lambda c: any(group.secondary_devices for group in c.instance_group),
}


def parse_pbtxt(text: str, where: str) -> ModelConfig:
    """A `config.pbtxt`. Raises ModelLoadError with the line that is wrong; `where` names the file."""
    try:
        return text_format.Parse(text, ModelConfig())
    except text_format.ParseError as error:
        raise ModelLoadError(f"{where}:{error}") from error


def parse_toml(text: str, where: str) -> ModelConfig:
    """A `model.toml`: the fields of config.pbtxt, with `data_type = "FP32"`, `kind = "CPU"` and plain `parameters`.

    Its `[[package]]` tables are not the configuration's: see `packaged_files.py`.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ModelLoadError(f"{where}: {error}") from error
    values.pop(PACKAGE_KEY, None)
    for tensor in (*_tables(values, "input", where), *_tables(values, "output", where)):
        data_type = str(tensor.get("data_type", ""))
        if data_type and not data_type.startswith("TYPE_"):
            tensor["data_type"] = "TYPE_STRING" if data_type == "BYTES" else f"TYPE_{data_type}"
    for group in _tables(values, "instance_group", where):
        kind = str(group.get("kind", "KIND_AUTO")).upper()
        group["kind"] = kind if kind.startswith("KIND_") else f"KIND_{kind}"
    parameters = values.get("parameters", {})
    if isinstance(parameters, dict):
        values["parameters"] = {
            key: value if isinstance(value, dict) else {"string_value": _parameter_text(value)}
            for key, value in parameters.items()
        }
    return _from_dict(values, where)


def parse_json(text: str | bytes, where: str) -> ModelConfig:
    """The JSON form that load requests carry. Raises ModelLoadError."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelLoadError(f"{where}: a model's configuration is a JSON object.")
    return _from_dict(values, where)


def check_config(config: ModelConfig, model: str) -> None:
    """Raises UnsupportedConfigError or ModelLoadError for what cannot be served as it stands."""
    if config.name and config.name != model:
        raise ModelLoadError(
            f"The configuration of model {model!r} says name: {config.name!r}. The folder's name is the model's; "
            "make them equal or leave the field out."
        )
    for field, asked in _UNSUPPORTED.items():
        if asked(config):
            raise UnsupportedConfigError(model, field)
    if config.max_batch_size < 0:
        raise ModelLoadError(f"Model {model!r}: max_batch_size must not be negative, got {config.max_batch_size}.")
    _check_tensors(config, model)
    _check_batching(config, model)
    for group in config.instance_group:
        if group.count < 0:
            raise ModelLoadError(f"Model {model!r}: instance_group.count must not be negative, got {group.count}.")


def complete_config(config: ModelConfig, model: str, filenames: set[str]) -> ModelConfig:
    """A copy with the defaults Triton fills in before a model is loaded. `filenames`: what its versions hold.

    Raises ModelLoadError if neither the configuration nor the files say which backend it is for.
    """
    config = _copy(config)
    config.name = model
    if not config.backend and config.platform in PLATFORM_BACKENDS:
        config.backend = PLATFORM_BACKENDS[config.platform]
    if not config.backend:
        config.backend = _backend_of(config.default_model_filename, filenames)
    if not config.backend:
        raise ModelLoadError(
            f"Model {model!r}: its configuration names no backend and its versions hold none of "
            f"{', '.join(name for names in MODEL_FILENAMES.values() for name in names)}. Set 'backend'."
        )
    if not config.default_model_filename:
        wanted = MODEL_FILENAMES.get(config.backend, ())
        config.default_model_filename = next(
            (name for name in wanted if name in filenames), wanted[0] if wanted else ""
        )
    if config.version_policy.WhichOneof("policy_choice") is None:
        config.version_policy.latest.num_versions = 1
    for pinned in (config.optimization.input_pinned_memory, config.optimization.output_pinned_memory):
        if not pinned.ListFields():
            pinned.enable = True
    return _with_instance_groups(config, model)


def complete_batching(config: ModelConfig) -> ModelConfig:
    """A copy of a loaded model's configuration with what depends on a batch size that it may itself have said."""
    config = _copy(config)
    if (
        config.HasField("dynamic_batching")
        and config.max_batch_size
        and not config.dynamic_batching.preferred_batch_size
    ):
        config.dynamic_batching.preferred_batch_size.append(config.max_batch_size)
    return config


def _copy(config: ModelConfig) -> ModelConfig:
    copy = ModelConfig()
    copy.CopyFrom(config)
    return copy


def _from_dict(values: dict[str, Any], where: str) -> ModelConfig:
    try:
        return json_format.ParseDict(values, ModelConfig())
    except (json_format.ParseError, TypeError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{where}: {error}") from error


def _tables(values: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    tables = values.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ModelLoadError(f"{where}: '{key}' must be written as [[{key}]] tables.")
    return tables


def _parameter_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _backend_of(default_filename: str, filenames: set[str]) -> str:
    for backend, wanted in MODEL_FILENAMES.items():
        suffixes = {name.rpartition(".")[2] for name in wanted}
        if default_filename and default_filename.rpartition(".")[2] in suffixes:
            return backend
        if not default_filename and filenames.intersection(wanted):
            return backend
    return ""


def _with_instance_groups(config: ModelConfig, model: str) -> ModelConfig:
    if not config.instance_group:
        config.instance_group.add()
    groups = model_config_pb2.ModelInstanceGroup
    for position, group in enumerate(config.instance_group):
        group.name = group.name or f"{model}_{position}"
        group.count = group.count or 1
        if group.kind == groups.KIND_AUTO and (group.gpus or config.backend not in _CHOOSING_BACKENDS):
            group.kind = groups.KIND_GPU if group.gpus else groups.KIND_CPU
    return config


def _check_tensors(config: ModelConfig, model: str) -> None:
    for kind, tensors in (("input", config.input), ("output", config.output)):
        names: set[str] = set()
        for tensor in tensors:
            if not tensor.name:
                raise ModelLoadError(f"Model {model!r}: an {kind} has no 'name'.")
            if tensor.name in names:
                raise ModelLoadError(f"Model {model!r}: two {kind}s are named {tensor.name!r}.")
            names.add(tensor.name)
            if tensor.data_type == model_config_pb2.TYPE_INVALID:
                raise ModelLoadError(f"Model {model!r}: {kind} {tensor.name!r} has no 'data_type'.")
            shape = tensor.reshape.shape if tensor.HasField("reshape") else ()
            if bad := [dim for dim in (*tensor.dims, *shape) if dim < -1 or dim == 0]:
                raise ModelLoadError(f"Model {model!r}: {kind} {tensor.name!r} has a dimension of {bad[0]}.")


def _check_batching(config: ModelConfig, model: str) -> None:
    batching = config.dynamic_batching
    limit = config.max_batch_size
    if limit and (bad := [size for size in batching.preferred_batch_size if not 0 < size <= limit]):
        raise ModelLoadError(
            f"Model {model!r}: dynamic_batching.preferred_batch_size {bad[0]} is not within max_batch_size {limit}."
        )
    levels = batching.priority_levels
    if levels and not 0 < batching.default_priority_level <= levels:
        raise ModelLoadError(
            f"Model {model!r}: dynamic_batching.default_priority_level must be 1 to {levels}, the priority_levels."
        )
    if bad_levels := [level for level in batching.priority_queue_policy if not 0 < level <= levels]:
        raise ModelLoadError(
            f"Model {model!r}: dynamic_batching.priority_queue_policy names level {bad_levels[0]} of {levels}."
        )
