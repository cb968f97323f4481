"""From a JSON object to a request model, with an error that names the field and says what to do. Knows no route."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llmserve.errors import InvalidRequestError
from llmserve.suggestions import did_you_mean

RequestModel = TypeVar("RequestModel", bound=BaseModel)
IsNeutral = Callable[[Any], bool]

_SUBJECT = re.compile(r"^\w+ should")  # pydantic begins with "Input", "String", "List": here the field is the subject

_COUNTED = re.compile(r" after validation, not \d+$")  # what there is is shown anyway


def _one_of(*values: Any) -> IsNeutral:
    return lambda value: any(type(value) is type(neutral) and value == neutral for neutral in values)


def _any(*types: type) -> IsNeutral:
    return lambda value: type(value) in types


_never = _one_of()

# Parameters of OpenAI and vLLM that this server does not honour, each with the values that change nothing: those are
# accepted, for clients that always send them. null is neutral for all.
UNSUPPORTED: Mapping[str, IsNeutral] = {
    # OpenAI
    "audio": _never,
    "best_of": _one_of(1),
    "function_call": _one_of("none"),
    "functions": _one_of([]),
    "metadata": _any(dict),  # labels for OpenAI's storage
    "modalities": _one_of(["text"]),
    "moderation": _never,
    "parallel_tool_calls": _any(bool),  # no tools, nothing parallel
    "prediction": _never,
    "prompt_cache_key": _any(str),  # a routing hint; the prefix cache needs none
    "prompt_cache_options": _never,
    "prompt_cache_retention": _one_of("in_memory", "in-memory"),
    "reasoning_effort": _one_of("none"),
    "response_format": _one_of({"type": "text"}),
    "safety_identifier": _any(str),  # says who the user is
    "service_tier": _one_of("auto", "default"),
    "store": _one_of(False),
    "suffix": _one_of(""),
    "tool_choice": _one_of("none"),
    "tools": _one_of([]),
    "user": _any(str),
    "verbosity": _one_of("medium"),
    "web_search_options": _never,
    # vLLM
    "chat_template": _never,  # a template is code; the model's own is used
    "documents": _one_of([]),
    "ec_transfer_params": _never,
    "include_reasoning": _one_of(True),
    "kv_transfer_params": _never,
    "length_penalty": _one_of(1.0, 1),
    "logprob_token_ids": _never,
    "media_io_kwargs": _one_of({}),
    "mm_payload": _never,
    "mm_processor_kwargs": _one_of({}),
    "prompt_embeds": _never,
    "repetition_detection": _never,
    "request_id": _never,
    "return_prompt_text": _one_of(False),
    "return_token_offsets": _one_of(False),
    "return_tokens_as_token_ids": _one_of(False),
    "return_weight_versions": _one_of(False),
    "routed_experts_prompt_start": _never,
    "session_id": _never,
    "spaces_between_special_tokens": _one_of(True),
    "stream_interval": _one_of(1),
    "structured_outputs": _never,
    "thinking_token_budget": _never,
    "truncate_prompt_tokens": _never,
    "truncation_side": _never,
    "use_beam_search": _one_of(False),
    "vllm_xargs": _one_of({}),
    "watermarking": _never,
}


def parse_request(model: type[RequestModel], body: dict[str, Any]) -> RequestModel:
    """Raises InvalidRequestError for the first thing wrong, with the dotted path of the field in `param`."""
    known = model.model_fields
    fields = {name: value for name, value in body.items() if name in known or _must_be_honoured(name, value, known)}
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False)[0], body, model) from None


def _must_be_honoured(name: str, value: Any, known: Mapping[str, Any]) -> bool:
    """False: `name` may be dropped, it asks for nothing. Raises for what cannot be."""
    is_neutral = UNSUPPORTED.get(name)
    if is_neutral is None:
        raise InvalidRequestError(_unknown(name, list(known)), name[:80])
    if value is not None and not is_neutral(value):
        raise InvalidRequestError(
            f"{name!r} with the value {_shown(value)} is not supported by this server. Leave it out.", name
        )
    return False


def _unknown(name: str, known: list[str]) -> str:
    return f"{name[:80]!r} is an unknown parameter.{did_you_mean(name, known)}"


def _explain(detail: ErrorDetails, body: dict[str, Any], model: type[BaseModel]) -> InvalidRequestError:
    path = _path_in(body, detail["loc"])
    param = ".".join(path)
    kind = detail["type"]
    if kind == "missing":
        param = ".".join([*path, str(detail["loc"][-1])])
        return InvalidRequestError(f"{param!r} is required.", param)
    if kind == "extra_forbidden":
        return InvalidRequestError(_unknown(param, list(_fields_beside(model, path))), param)
    if kind == "value_error":
        return InvalidRequestError(f"{param!r} {detail['ctx']['error']}.", param)
    reason = _COUNTED.sub("", _SUBJECT.sub("should", detail["msg"]))
    return InvalidRequestError(f"{param!r} {reason}; it is {_shown(detail['input'])}.", param)


def _path_in(body: Any, loc: tuple[int | str, ...]) -> list[str]:
    """The part of pydantic's location that exists in the body: it mixes in the names of union members."""
    path: list[str] = []
    for part in loc:
        if isinstance(body, dict) and str(part) in body:
            body = body[str(part)]
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            body = body[part]
        else:
            continue
        path.append(str(part))
    return path


def _fields_beside(model: type[BaseModel], path: list[str]) -> list[str]:
    """Dotted paths of the fields that an unknown one could have meant, one level into nested models."""
    prefix = ".".join(path[:-1])
    definitions = model.model_json_schema().get("$defs", {})
    names = {name for definition in definitions.values() for name in definition.get("properties", {})}
    return [f"{prefix}.{name}" for name in sorted(names)]


def _shown(value: Any) -> str:
    """A value as JSON for a message, cut to a length that is safe to send back."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number of more than 64 bits"
    try:
        text = msgspec.json.encode(value).decode()
    except (TypeError, ValueError, OverflowError, RecursionError):
        return f"of the type {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
