"""The `parameters` of a request: which have a meaning, on both wires; how HTTP's are checked. Knows no routes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmserve.api.v2_errors import MalformedRequestError
from llmserve.errors import InvalidRequestError
from llmserve.inference import InferRequest, Parameter

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


class Wording(Protocol):
    """How a wire checks a value, and says in its own words what is wrong with it."""

    def unsigned(self, value: Any, key: str) -> int:
        """An integer of 0 to 2**64 - 1."""
        ...

    def boolean(self, value: Any, key: str) -> bool:
        """True or false, nothing else."""
        ...


# parameter -> the field of a request (or of `CommonFields`) that it fills in, and what it must be; for both wires
_MEANINGS: dict[str, tuple[str, str]] = {
    "priority": ("priority", "unsigned"),
    "timeout": ("timeout_us", "unsigned"),
    "sequence_id": ("sequence_id", "unsigned or text"),
    "sequence_start": ("sequence_start", "boolean"),
    "sequence_end": ("sequence_end", "boolean"),
}


def read_common(target: CommonFields | InferRequest, key: str, value: Any, wording: Wording) -> bool:
    """Fills in the field of `target` that a parameter is for; False if it has no meaning of its own.

    Raises what `wording` raises for a value of the wrong type.
    """
    meaning = _MEANINGS.get(key)
    if meaning is None:
        return False
    name, kind = meaning
    if kind == "boolean":
        setattr(target, name, wording.boolean(value, key))
    else:
        setattr(target, name, value if "text" in kind and isinstance(value, str) else wording.unsigned(value, key))
    return True


def read_parameters(parameters: Mapping[str, Any] | None) -> CommonFields:
    """Raises InvalidRequestError for a reserved or structured one, MalformedRequestError for one of the wrong type."""
    fields = CommonFields()
    for key, value in (parameters or {}).items():
        if read_common(fields, key, value, _JSON):
            continue
        if key == "binary_data_output":
            fields.binary_data_output = boolean(value, key)
        else:
            fields.parameters[key] = _plain(key, value)
    return fields


def unsigned(value: Any, key: str, verb: str = "parse") -> int:
    """An integer of 0 to 2**64 - 1. Raises MalformedRequestError, which says that one cannot `verb` it."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64:
        return value
    raise MalformedRequestError(
        f"Unable to {verb} '{key}': attempt to access JSON non-unsigned-integer as unsigned-integer", key
    )


def boolean(value: Any, key: str) -> bool:
    """Raises MalformedRequestError."""
    if isinstance(value, bool):
        return value
    raise MalformedRequestError(f"Unable to parse '{key}': attempt to access JSON non-boolean as boolean", key)


class _JsonWording:
    unsigned = staticmethod(unsigned)
    boolean = staticmethod(boolean)


_JSON = _JsonWording()


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
