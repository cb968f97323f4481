"""The ASGI application: which route is answered by what. Knows no engine; `serve.py` hands it the models."""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp, Scope

from llmserve import __version__
from llmserve.api import chat, completions, docs_page, status, tokens
from llmserve.api.context import ApiContext
from llmserve.api.directory import ModelDirectory, NoPoolingModels, PoolingDirectory
from llmserve.api.entrance import Entrance
from llmserve.api.errors import install_error_handlers
from llmserve.api.http_metrics import HttpMetricsMiddleware
from llmserve.api.openapi import request_body
from llmserve.api.pooling_routes import COHERE_PATHS, add_pooling_routes
from llmserve.api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
)
from llmserve.api.resume import ResumableStreams
from llmserve.api.settings import ApiSettings
from llmserve.api.triton_metrics import GeneralModelMetrics
from llmserve.api.v2_http import V2Http
from llmserve.api.v2_http_direct import DirectInfer
from llmserve.api.v2_openapi import describe_v2
from llmserve.api.v2_settings import V2HttpSettings
from llmserve.metrics import Metrics
from llmserve.pooling_metrics import PoolingCollector
from llmserve.repository.data_plane import DataPlane


def create_app(
    models: ModelDirectory,
    settings: ApiSettings,
    metrics: Metrics,
    plane: DataPlane | None = None,
    pooling: PoolingDirectory | None = None,
    entrance: Entrance | None = None,
) -> ASGIApp:
    """The application over the models served now, which may change under it. `plane` is what `/v2` speaks for.

    `entrance` is what stands before every route; without one, it is that of a server without keys. Behind it come the
    routes of `/v2`, which answer past the framework and its middleware, and then all others.
    """
    routes = create_routes(models, settings, metrics, plane, pooling)
    entrance = entrance or Entrance()
    if plane is None:
        return entrance.wrap(routes, partial(_has_route, routes))
    limits = V2HttpSettings(max_body_bytes=max(settings.max_body_bytes, V2HttpSettings().max_body_bytes))
    v2 = V2Http(routes, plane=plane, settings=limits, metrics=metrics.http, others=COHERE_PATHS)

    def has_route(scope: Scope) -> bool:
        return v2.has_route(scope) if v2.takes(scope["path"]) else _has_route(routes, scope)

    return entrance.wrap(v2, has_route, partial(DirectInfer, plane=plane, settings=limits, metrics=metrics.http))


def _has_route(routes: FastAPI, scope: Scope) -> bool:
    return any(route.matches(scope)[0] is not Match.NONE for route in routes.routes)


def create_routes(
    models: ModelDirectory,
    settings: ApiSettings,
    metrics: Metrics,
    plane: DataPlane | None = None,
    pooling: PoolingDirectory | None = None,
) -> FastAPI:
    """Every route but those of `/v2`, unguarded, and the OpenAPI document of all."""
    app = FastAPI(title="llmserve", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    pooling = pooling or NoPoolingModels()
    context = ApiContext(
        models=models,
        pooling=pooling,
        settings=settings,
        metrics=metrics,
        plane=plane,
        streams=ResumableStreams(settings.resume_window_s),
    )
    metrics.register(PoolingCollector(lambda: pooling.metrics), bytes)
    install_error_handlers(app)
    app.add_middleware(HttpMetricsMiddleware, metrics=metrics.http)
    _add_model_routes(app, context)
    add_pooling_routes(app, context)
    _add_status_routes(app, context)
    if plane is not None:
        general_metrics = GeneralModelMetrics(plane)
        metrics.register(general_metrics, general_metrics.render)
        describe_v2(app)
    return app


def _add_model_routes(app: FastAPI, context: ApiContext) -> None:
    """Routes that take a body. It is read by hand: FastAPI's own reading has no size limit and lenient JSON."""

    @app.post("/v1/chat/completions", openapi_extra=request_body("/v1/chat/completions", ChatCompletionRequest))
    async def chat_completions(request: Request) -> Response:
        """Answers a conversation. With `stream`, as Server-Sent Events."""
        return await chat.chat_completions(request, context)

    @app.post("/v1/completions", openapi_extra=request_body("/v1/completions", CompletionRequest))
    async def create_completion(request: Request) -> Response:
        """Continues one or several prompts. With `stream`, as Server-Sent Events."""
        return await completions.completions(request, context)

    @app.post("/tokenize", openapi_extra=request_body("/tokenize", TokenizeTextRequest, TokenizeChatRequest))
    async def tokenize(request: Request) -> Response:
        """The token ids of a text or a conversation."""
        return await tokens.tokenize(request, context)

    @app.post("/detokenize", openapi_extra=request_body("/detokenize", DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        return await tokens.detokenize(request, context)


def _add_status_routes(app: FastAPI, context: ApiContext) -> None:
    @app.get("/v1/models")
    async def list_models() -> Response:
        """The models served."""
        return status.list_models(context)

    @app.get("/v1/models/{model_id:path}")
    async def show_model(model_id: str) -> Response:
        """One model."""
        return status.show_model(model_id, context)

    @app.get("/health")
    async def health() -> Response:
        """200 if every engine is alive and makes progress, else 503."""
        return status.health(context)

    @app.get("/ready")
    async def ready() -> Response:
        """200 if every model takes requests, else 503."""
        return status.ready(context)

    @app.get("/metrics")
    async def render_metrics() -> Response:
        """Prometheus metrics."""
        return status.render_metrics(context)

    @app.get("/version")
    async def version() -> Response:
        """The server's version."""
        return status.version()

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page.PAGE, headers=docs_page.HEADERS)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return status.index(sorted({*app.openapi()["paths"], "/docs", "/openapi.json"}), context)
