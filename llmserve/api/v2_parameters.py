"""The `parameters` of a request over HTTP: those with a meaning taken out, the others checked. Knows no routes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmserve.api.v2_errors import MalformedRequestError
from llmserve.errors import InvalidRequestError
from llmserve.inference import Parameter

RESERVED_PREFIX = "triton_"


@dataclass(slots=True)
class CommonFields:
    """What a request's parameters say."""

    parameters: dict[str, Parameter] = field(default_factory=dict)
    priority: int = 0
    timeout_us: int = 0
    sequence_id: int | str = 0
    sequence_start: bool = False
    sequence_end: bool = False
    binary_data_output: bool = False


def read_parameters(parameters: Mapping[str, Any] | None) -> CommonFields:
    """Raises InvalidRequestError for a reserved or structured one, MalformedRequestError for one of the wrong type."""
    fields = CommonFields()
    if not parameters:
        return fields
    for key, value in parameters.items():
        match key:
            case "priority":
                fields.priority = unsigned(value, key)
            case "timeout":
                fields.timeout_us = unsigned(value, key)
            case "sequence_id":
                fields.sequence_id = value if isinstance(value, str) else unsigned(value, key)
            case "sequence_start":
                fields.sequence_start = boolean(value, key)
            case "sequence_end":
                fields.sequence_end = boolean(value, key)
            case "binary_data_output":
                fields.binary_data_output = boolean(value, key)
            case _:
                fields.parameters[key] = _plain(key, value)
    return fields


def unsigned(value: Any, key: str) -> int:
    """An integer of 0 to 2**64 - 1. Raises MalformedRequestError."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64:
        return value
    raise MalformedRequestError(
        f"Unable to parse '{key}': attempt to access JSON non-unsigned-integer as unsigned-integer", key
    )


def boolean(value: Any, key: str) -> bool:
    """Raises MalformedRequestError."""
    if isinstance(value, bool):
        return value
    raise MalformedRequestError(f"Unable to parse '{key}': attempt to access JSON non-boolean as boolean", key)


def _plain(key: str, value: Any) -> Parameter:
    if key.startswith(RESERVED_PREFIX):
        raise InvalidRequestError(
            "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified.", key
        )
    if isinstance(value, int | float | str):
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise InvalidRequestError(f"parameter '{key}' is out of the range of 64-bit integers", key)
        return value
    raise InvalidRequestError(
        f"parameter '{key}' has invalid type. It should be either 'int', 'bool', or 'string'.", key
    )
