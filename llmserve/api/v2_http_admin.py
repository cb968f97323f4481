"""The routes that change the server: repository, log and trace settings; shared memory, to say no. Knows no socket."""

from __future__ import annotations

import base64
from typing import Any

import msgspec

from llmserve.api.v2_errors import REPOSITORY_NAME, SHARED_MEMORY, MalformedRequestError
from llmserve.api.v2_http_call import HttpAnswer, HttpCall
from llmserve.api.v2_json import parse_json_object
from llmserve.errors import InferenceError, InvalidRequestError
from llmserve.repository.data_plane import DataPlane


async def repository_index(call: HttpCall, plane: DataPlane) -> HttpAnswer:
    """Every model and version; `{"ready": true}` leaves out those that do not serve."""
    _refuse_repository_name(call)
    body = await _object(call)
    entries = await plane.repository_index(ready=_boolean(body.get("ready", False)))
    lines = []
    for entry in entries:
        line = {"name": entry.name}
        if entry.version:
            line["version"] = entry.version
        if entry.state:
            line["state"] = entry.state
        if entry.reason:
            line["reason"] = entry.reason
        lines.append(line)
    return HttpAnswer(msgspec.json.encode(lines))


async def load(call: HttpCall, plane: DataPlane) -> HttpAnswer:
    """`{"parameters": {"config": "<JSON>", "file:1/model.py": "<base64>"}}`, all optional."""
    _refuse_repository_name(call)
    config: str | None = None
    files: dict[str, bytes] = {}
    for key, value in _parameters(await _object(call)).items():
        if not isinstance(value, str):
            raise MalformedRequestError("attempt to access JSON non-string as string", key)
        if key == "config":
            config = value
        elif key.startswith("file:"):
            try:
                files[key] = base64.b64decode(value, validate=True)
            except ValueError:
                raise InvalidRequestError(f"the content of '{key}' is not valid base64", key) from None
        else:
            raise InvalidRequestError(f"unrecognized load parameter '{key}': use 'config' or 'file:<path>'", key)
    await plane.load(call.model, config, files)
    return HttpAnswer()


async def unload(call: HttpCall, plane: DataPlane) -> HttpAnswer:
    """`{"parameters": {"unload_dependents": true}}`, optional."""
    _refuse_repository_name(call)
    parameters = _parameters(await _object(call))
    await plane.unload(call.model, _boolean(parameters.get("unload_dependents", False)))
    return HttpAnswer()


async def log_settings(call: HttpCall, plane: DataPlane) -> HttpAnswer:
    """Shows the log settings; a POST changes them first."""
    if call.method == "GET":
        return HttpAnswer(msgspec.json.encode(plane.log_settings.get()))
    changes = parse_json_object(await call.read_body())
    for key, value in changes.items():
        if key in ("log_info", "log_warning", "log_error"):
            _boolean(value)
        elif key == "log_verbose_level" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise MalformedRequestError("attempt to access JSON non-unsigned-integer as unsigned-integer", key)
        elif key in ("log_format", "log_file") and not isinstance(value, str):
            raise MalformedRequestError("attempt to access JSON non-string as string", key)
    return HttpAnswer(msgspec.json.encode(plane.log_settings.update(changes)))


async def trace_settings(call: HttpCall, plane: DataPlane) -> HttpAnswer:
    """Shows the trace settings, of a model or of all; a POST changes them first."""
    if call.method == "GET":
        return HttpAnswer(msgspec.json.encode(plane.trace_settings(call.model)))
    changes: dict[str, str | list[str] | None] = {}
    known = plane.trace_settings().keys() - {"trace_mode"}  # which nobody can change, and Triton does not look at
    for key, value in parse_json_object(await call.read_body()).items():
        if key == "trace_level" and value is not None:
            if not isinstance(value, list):
                raise MalformedRequestError("attempt to access JSON non-array as array", key)
            if not all(isinstance(level, str) for level in value):
                raise MalformedRequestError("attempt to access JSON non-string as string", key)
        elif key not in known:
            continue
        elif value is not None and not isinstance(value, str):
            raise MalformedRequestError("attempt to access JSON non-string as string", key)
        changes[key] = value
    return HttpAnswer(msgspec.json.encode(plane.trace_settings(call.model, changes)))


async def shared_memory_status(call: HttpCall, plane: DataPlane) -> HttpAnswer:
    """No region is ever registered."""
    if call.region:
        raise InferenceError(
            f"Unable to find {call.repository} shared memory region: '{call.region}'", InferenceError.NOT_FOUND
        )
    return HttpAnswer(b"[]")


async def shared_memory_register(call: HttpCall, plane: DataPlane) -> HttpAnswer:
    """Not served yet."""
    raise InferenceError(SHARED_MEMORY, InferenceError.UNSUPPORTED)


async def shared_memory_unregister(call: HttpCall, plane: DataPlane) -> HttpAnswer:
    """What is not there is gone already."""
    return HttpAnswer()


async def _object(call: HttpCall) -> dict[str, Any]:
    body = await call.read_body()
    return parse_json_object(body) if body.strip() else {}


def _parameters(body: dict[str, Any]) -> dict[str, Any]:
    parameters = body.get("parameters", {})
    if not isinstance(parameters, dict):
        raise MalformedRequestError("attempt to get members for non-object", "parameters")
    return parameters


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise MalformedRequestError("attempt to access JSON non-boolean as boolean")
    return value


def _refuse_repository_name(call: HttpCall) -> None:
    if call.repository:
        raise InferenceError(REPOSITORY_NAME, InferenceError.UNSUPPORTED)
