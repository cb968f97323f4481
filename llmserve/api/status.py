"""What the server says of itself: its models, whether it lives and is ready, its metrics and version."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from llmserve import __version__
from llmserve.api.context import ApiContext, json_response
from llmserve.backends.generation import TextGenerator
from llmserve.request_context import STRANGER, current_request


def list_models(context: ApiContext) -> Response:
    """GET /v1/models."""
    models = [_model_card(name, context.models.get(name)) for name in context.models.names]
    models += [_pooling_card(name, context) for name in context.pooling.names]
    return json_response({"object": "list", "data": models})


def show_model(model_id: str, context: ApiContext) -> Response:
    """GET /v1/models/{id}. Raises ModelNotFoundError."""
    if model_id in context.pooling.names:
        return json_response(_pooling_card(model_id, context))
    return json_response(_model_card(model_id, context.models.get(model_id)))


def _model_card(name: str, generator: TextGenerator) -> dict[str, Any]:
    return _card(name, generator.created, generator.root, generator.max_model_len)


def _pooling_card(name: str, context: ApiContext) -> dict[str, Any]:
    model = context.pooling.get(name)
    return _card(name, model.created, model.root, model.pooling.max_model_len)


def _card(name: str, created: int, root: str, max_model_len: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "llmserve",
        "root": root,
        "parent": None,
        "max_model_len": max_model_len,
        "permission": [],
    }


def health(context: ApiContext) -> Response:
    """GET /health: 503 if an engine is gone and cannot be brought back. Restarting the server would help then."""
    live = {name: context.models.get(name).is_live() for name in context.models.names}
    ok = all(live.values())
    return _probe_answer("ok" if ok else "unhealthy", ok, {"live": live}, context)


def ready(context: ApiContext) -> Response:
    """GET /ready: 503 while a model does not take requests. Waiting, or sending them elsewhere, would help then."""
    is_ready = {name: context.models.get(name).is_ready() for name in context.models.names}
    ok = all(is_ready.values()) and (bool(is_ready) if context.plane is None else context.plane.server_ready())
    return _probe_answer("ready" if ok else "not ready", ok, {"ready": is_ready}, context)


def _probe_answer(status: str, ok: bool, models: dict[str, dict[str, bool]], context: ApiContext) -> Response:
    """Which models there are, and what is wrong with them, is not a stranger's business."""
    is_stranger = current_request().tenant is STRANGER
    details = {} if is_stranger else {**models, **_reasons(context)}
    return json_response({"status": status, **details}, 200 if ok else 503)


def _reasons(context: ApiContext) -> dict[str, dict[str, str]]:
    """Why those models are not ready that are not."""
    reasons = {} if context.plane is None else context.plane.unready_reasons()
    reasons.update((name, context.models.get(name).reason) for name in context.models.names)
    return {"reasons": {name: reason for name, reason in reasons.items() if reason}} if any(reasons.values()) else {}


def render_metrics(context: ApiContext) -> Response:
    """GET /metrics."""
    return Response(context.metrics.render(), headers={"Content-Type": context.metrics.content_type})


def version() -> Response:
    """GET /version."""
    return json_response({"version": __version__})


def index(routes: list[str], context: ApiContext) -> Response:
    """GET /: what there is."""
    names = [*context.models.names, *context.pooling.names]
    return json_response({"server": "llmserve", "version": __version__, "models": names, "routes": routes})
