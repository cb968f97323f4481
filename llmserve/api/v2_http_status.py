"""The routes that read: health, metadata, configuration, statistics, explain. Knows no socket."""

from __future__ import annotations

import msgspec

from llmserve.api.v2_http_call import HttpAnswer, HttpCall
from llmserve.api.v2_statistics import statistics_json
from llmserve.backends.model_config import to_dict
from llmserve.repository.data_plane import DataPlane, TensorMetadata
from llmserve.request_context import STRANGER, current_request


async def live(call: HttpCall, plane: DataPlane) -> HttpAnswer:
    """200 while the server answers. The body is the protocol's; Triton sends none, and its clients read none."""
    return _health({"live": plane.server_live()}, plane.server_live())


async def ready(call: HttpCall, plane: DataPlane) -> HttpAnswer:
    """200 or 400. The reasons are ours: the protocol has no place for them, and forbids none."""
    if plane.server_ready():
        return _health({"ready": True}, True)
    reasons = {} if current_request().tenant is STRANGER else plane.unready_reasons()
    return _health({"ready": False, "reasons": reasons} if reasons else {"ready": False}, False)


async def model_ready(call: HttpCall, plane: DataPlane) -> HttpAnswer:
    """200 or 400."""
    is_ready = plane.model_ready(call.model, call.version)
    if is_ready:
        return _health({"name": call.model, "ready": True}, True)
    body: dict[str, object] = {"error": "Model version not ready"}
    if reason := plane.model_unready_reason(call.model, call.version):
        body["reason"] = reason
    return _health(body, False)


async def server_metadata(call: HttpCall, plane: DataPlane) -> HttpAnswer:
    """Name, version, extensions."""
    metadata = plane.server_metadata()
    return _json({"name": metadata.name, "version": metadata.version, "extensions": metadata.extensions})


async def model_metadata(call: HttpCall, plane: DataPlane) -> HttpAnswer:
    """A model's signature."""
    metadata = plane.model_metadata(call.model, call.version)
    return _json(
        {
            "name": metadata.name,
            "versions": metadata.versions,
            "platform": metadata.platform,
            "inputs": [_tensor(tensor) for tensor in metadata.inputs],
            "outputs": [_tensor(tensor) for tensor in metadata.outputs],
        }
    )


async def model_config(call: HttpCall, plane: DataPlane) -> HttpAnswer:
    """ModelConfig as JSON."""
    return _json(to_dict(plane.model_config(call.model, call.version)))


async def statistics(call: HttpCall, plane: DataPlane) -> HttpAnswer:
    """Of a version, a model or all."""
    return _json({"model_stats": [statistics_json(entry) for entry in plane.statistics(call.model, call.version)]})


async def explain(call: HttpCall, plane: DataPlane) -> HttpAnswer:
    """Why the last batches had the size they had."""
    return _json(plane.explain(call.model, call.version))


def _tensor(tensor: TensorMetadata) -> dict[str, object]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}


def _health(body: dict[str, object], good: bool) -> HttpAnswer:
    return HttpAnswer(msgspec.json.encode(body), 200 if good else 400)


def _json(value: object) -> HttpAnswer:
    return HttpAnswer(msgspec.json.encode(value))
