"""What a model's configuration means for running it: instances, batching, what the model says of itself.

Knows no process and no file; reading and checking the configuration is the repository's.
"""

from __future__ import annotations

import os
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from tritonclient.grpc.model_config_pb2 import (
    DataType,
    ModelConfig,
    ModelInput,
    ModelInstanceGroup,
    ModelOutput,
    ModelQueuePolicy,
)

from llmserve.backends.model_messages import ModelLaunch, Signature, TensorSpec
from llmserve.errors import ModelLoadError, UnsupportedConfigError
from llmserve.scheduler.queue_policy import BatcherConfig, QueuePolicy

_US = 1e-6


def batcher_config(config: ModelConfig) -> BatcherConfig:
    """How requests wait and are put together. Without `dynamic_batching` each runs alone and nothing limits them."""
    if not config.HasField("dynamic_batching"):
        return BatcherConfig()
    batching = config.dynamic_batching
    if batching.preserve_ordering and config.model_transaction_policy.decoupled:
        raise UnsupportedConfigError(config.name, "dynamic_batching.preserve_ordering (of a decoupled model)")
    return BatcherConfig(
        max_batch_size=config.max_batch_size,
        max_batch_tokens=next(iter(_numbers(config, "max_batch_tokens")), 0),
        preferred_batch_sizes=frozenset(batching.preferred_batch_size),
        max_queue_delay_s=batching.max_queue_delay_microseconds * _US,
        preserve_ordering=batching.preserve_ordering,
        priority_levels=batching.priority_levels,
        default_priority_level=batching.default_priority_level,
        default_policy=_queue_policy(batching.default_queue_policy),
        priority_policies={level: _queue_policy(policy) for level, policy in batching.priority_queue_policy.items()},
    )


def length_buckets(config: ModelConfig) -> tuple[int, ...]:
    """The lengths that inputs of varying length are padded to (`parameters.length_buckets`: "32,64,128"); none: exact.

    Raises ModelLoadError.
    """
    buckets = _numbers(config, "length_buckets")
    if buckets and not config.max_batch_size:
        raise ModelLoadError(f"Model {config.name!r}: parameters.length_buckets needs a max_batch_size.")
    return tuple(sorted(buckets))


def _numbers(config: ModelConfig, name: str) -> list[int]:
    """The positive numbers, between commas, of one of the `parameters`. Raises ModelLoadError."""
    if name not in config.parameters:
        return []
    text = config.parameters[name].string_value
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(numbers) < 1:
        raise ModelLoadError(f"Model {config.name!r}: parameters.{name} is {text!r}; it must be positive numbers.")
    return numbers


def _queue_policy(policy: ModelQueuePolicy) -> QueuePolicy:
    return QueuePolicy(
        max_queue_size=policy.max_queue_size,
        default_timeout_s=policy.default_timeout_microseconds * _US,
        delay_expired=policy.timeout_action == ModelQueuePolicy.DELAY,
        allow_timeout_override=policy.allow_timeout_override,
    )


def launches(
    config: ModelConfig, version: str, version_path: str, model_path: str, backend: str, log_level: str
) -> list[ModelLaunch]:
    """One for each instance the configuration asks for; at least one. Their shares of the cores are equal."""
    places: list[tuple[str, str, int]] = []
    for position, group in enumerate(config.instance_group or [ModelInstanceGroup()]):
        kind = ModelInstanceGroup.Kind.Name(group.kind).removeprefix("KIND_")
        name = group.name or f"{config.name}_{position}"
        devices = list(group.gpus) or [0]
        for number in range(max(group.count, 1) * len(devices)):
            places.append((f"{name}_{number}", kind, devices[number % len(devices)]))
    values = to_dict(config)
    return [
        ModelLaunch(
            name=config.name,
            version=version,
            version_path=version_path,
            model_path=model_path,
            backend=backend,
            config=values,
            auto_complete=False,
            instance_name=name,
            kind=kind,
            device_id=device_id,
            num_threads=max(1, (os.cpu_count() or 1) // len(places)),
            log_level=log_level,
        )
        for name, kind, device_id in places
    ]


def complete(config: ModelConfig, signature: Signature) -> ModelConfig:
    """A copy with what the model says of itself; what the configuration says already stays as it is.

    Raises ModelLoadError if afterwards there is no input or no output.
    """
    done = ModelConfig()
    done.CopyFrom(config)
    for tensors, specs in ((done.input, signature.inputs), (done.output, signature.outputs)):
        named = {tensor.name for tensor in tensors}
        for spec in specs or ():
            if spec.name not in named:
                _add(tensors.add(), spec)
    if signature.max_batch_size is not None:
        done.max_batch_size = signature.max_batch_size
    if signature.decoupled is not None:
        done.model_transaction_policy.decoupled = signature.decoupled
    if signature.dynamic_batching is not None and not done.HasField("dynamic_batching"):
        done.dynamic_batching.SetInParent()
        try:
            json_format.ParseDict(signature.dynamic_batching, done.dynamic_batching)
        except json_format.ParseError as error:
            raise ModelLoadError(
                f"Model {config.name!r} sets a dynamic_batching that cannot be read: {error}"
            ) from error
    for kind, count in (("input", len(done.input)), ("output", len(done.output))):
        if not count:
            raise ModelLoadError(
                f"Model {config.name!r} has no {kind}: neither its configuration nor the model says one. "
                f"Add an '{kind}' to its config.pbtxt."
            )
    return done


def _add(tensor: ModelInput | ModelOutput, spec: TensorSpec) -> None:
    tensor.name = spec.name
    tensor.data_type = DataType.Value("TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}")
    tensor.dims.extend(spec.shape)
    if spec.optional:
        tensor.optional = True


def to_dict(message: Message) -> dict[str, Any]:
    """A message as Triton writes it in JSON: every scalar, set messages only, 64-bit integers as numbers."""
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            of_message = entry.fields_by_name["value"].message_type is not None
            values[field.name] = {str(key): to_dict(value[key]) if of_message else value[key] for key in value}
        elif field.is_repeated:
            values[field.name] = [_plain(field, item) for item in value]
        elif not field.has_presence or message.HasField(field.name):
            values[field.name] = _plain(field, value)
    return values


def _plain(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None:
        return to_dict(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return value
