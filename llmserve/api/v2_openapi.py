"""The v2 routes as the application's OpenAPI document describes them. They are served outside its routing table."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

_DATATYPES = ["BOOL", *(f"{sign}INT{bits}" for sign in ("U", "") for bits in (8, 16, 32, 64))]
_DATATYPES += ["FP16", "BF16", "FP32", "FP64", "BYTES"]

_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {"type": ["string", "number", "boolean"]},
}
_INFER: dict[str, Any] = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": _PARAMETERS,
        "inputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "datatype", "shape", "data"],
                "properties": {
                    "name": {"type": "string"},
                    "datatype": {"type": "string", "enum": _DATATYPES},
                    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                    "data": {"type": "array"},
                    "parameters": _PARAMETERS,
                },
            },
        },
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"type": "string"}, "parameters": _PARAMETERS},
            },
        },
    },
}
_OBJECT: dict[str, Any] = {"type": "object"}
_LOAD: dict[str, Any] = {
    "type": "object",
    "properties": {"parameters": {"type": "object", "additionalProperties": {"type": "string"}}},
}
_UNLOAD: dict[str, Any] = {
    "type": "object",
    "properties": {"parameters": {"type": "object", "properties": {"unload_dependents": {"type": "boolean"}}}},
}
_INDEX: dict[str, Any] = {"type": "object", "properties": {"ready": {"type": "boolean"}}}

# path -> method -> (summary, schema of the body)
_OPERATIONS: dict[str, dict[str, tuple[str, dict[str, Any] | None]]] = {
    "/v2": {"get": ("The server's name, version and extensions.", None)},
    "/v2/health/live": {"get": ("200 while the server answers.", None)},
    "/v2/health/ready": {"get": ("200 if the models that should serve do, else 400.", None)},
    "/v2/models/stats": {"get": ("The statistics of every model.", None)},
    "/v2/repository/index": {"post": ("Every model and version, and its state.", _INDEX)},
    "/v2/repository/models/{model}/load": {"post": ("Loads or reloads a model.", _LOAD)},
    "/v2/repository/models/{model}/unload": {"post": ("Takes a model out of service.", _UNLOAD)},
    "/v2/logging": {"get": ("The log settings.", None), "post": ("Changes them.", _OBJECT)},
    "/v2/trace/setting": {"get": ("The trace settings.", None), "post": ("Changes them.", _OBJECT)},
    "/v2/models/{model}/trace/setting": {"get": ("A model's own.", None), "post": ("Changes them.", _OBJECT)},
}
_MODEL_OPERATIONS: dict[str, dict[str, tuple[str, dict[str, Any] | None]]] = {
    "": {"get": ("A model's inputs and outputs.", None)},
    "/ready": {"get": ("200 if the model takes requests, else 400.", None)},
    "/config": {"get": ("A model's complete configuration.", None)},
    "/stats": {"get": ("A model's statistics.", None)},
    "/explain": {"get": ("Why the last batches had the size they had.", None)},
    "/infer": {"post": ("One inference. Tensors may also follow the JSON as bytes.", _INFER)},
    "/generate": {"post": ("One inference as a plain JSON object; exactly one answer.", _OBJECT)},
    "/generate_stream": {"post": ("The same, its answers as Server-Sent Events.", _OBJECT)},
}


def describe_v2(app: FastAPI) -> None:
    """Adds the v2 routes to the application's OpenAPI document. Call when it has all its own routes."""
    app.openapi()["paths"] |= v2_paths()  # made once, and kept by the application


def v2_paths() -> dict[str, Any]:
    """The member `paths` of an OpenAPI 3.1 document."""
    operations = dict(_OPERATIONS)
    for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        operations |= {prefix + suffix: methods for suffix, methods in _MODEL_OPERATIONS.items()}
    return {
        path: {method: _operation(path, summary, schema) for method, (summary, schema) in methods.items()}
        for path, methods in operations.items()
    }


def _operation(path: str, summary: str, schema: dict[str, Any] | None) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "tags": ["Open Inference Protocol v2"],
        "summary": summary,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": kind}}
            for name, kind in (("model", "string"), ("version", "integer"))
            if f"{{{name}}}" in path
        ],
        "responses": {"200": {"description": "Done."}, "default": {"description": 'An error: `{"error": ...}`.'}},
    }
    if schema is not None:
        operation["requestBody"] = {"content": {"application/json": {"schema": schema}}}
    return operation
