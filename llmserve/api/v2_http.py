"""The Open Inference Protocol v2 over HTTP: which route is answered by what. Plain ASGI, in front of the application.

A framework's routing costs more than a small inference, so these routes have their own: the path's segments looked up
in a table. Paths outside `/v2` are passed on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from llmserve.api import v2_http_admin as admin
from llmserve.api import v2_http_generate as generation
from llmserve.api import v2_http_status as status
from llmserve.api.errors import CLIENT_CLOSED_REQUEST
from llmserve.api.v2_http_call import (
    ClientGoneError,
    DisconnectWatches,
    HttpAnswer,
    HttpCall,
    error_answer,
    refused_answer,
)
from llmserve.api.v2_http_infer import infer
from llmserve.api.v2_settings import V2HttpSettings
from llmserve.errors import LLMServeError
from llmserve.http_metrics import HttpMetrics
from llmserve.repository.data_plane import DataPlane

logger = logging.getLogger(__name__)

Handler = Callable[[HttpCall, DataPlane], Awaitable[HttpAnswer | None]]  # None: it has sent its answer itself
Methods = dict[str, Handler]

_SERVER: dict[tuple[str, ...], Methods] = {
    (): {"GET": status.server_metadata},
    ("",): {"GET": status.server_metadata},
    ("health", "live"): {"GET": status.live},
    ("health", "ready"): {"GET": status.ready},
    ("models", "stats"): {"GET": status.statistics},
    ("logging",): {"GET": admin.log_settings, "POST": admin.log_settings},
    ("trace", "setting"): {"GET": admin.trace_settings, "POST": admin.trace_settings},
    ("repository", "index"): {"POST": admin.repository_index},
}
_MODEL: dict[tuple[str, ...], Methods] = {  # after models/{model} and maybe versions/{version}
    (): {"GET": status.model_metadata},
    ("ready",): {"GET": status.model_ready},
    ("config",): {"GET": status.model_config},
    ("stats",): {"GET": status.statistics},
    ("explain",): {"GET": status.explain},
    ("infer",): {"POST": infer},
    ("generate",): {"POST": generation.generate},
    ("generate_stream",): {"POST": generation.generate_stream},
}
_MODEL_TRACE: Methods = {"GET": admin.trace_settings, "POST": admin.trace_settings}
_LOAD: dict[str, Methods] = {"load": {"POST": admin.load}, "unload": {"POST": admin.unload}}
_INDEX: Methods = {"POST": admin.repository_index}
_SHARED_MEMORY: dict[str, Methods] = {
    "status": {"GET": admin.shared_memory_status},
    "register": {"POST": admin.shared_memory_register},
    "unregister": {"POST": admin.shared_memory_unregister},
}
_NO_METHODS: Methods = {}


class V2Http:
    """An ASGI application that passes on what is not under `/v2`. `metrics` counts requests by route; `others` are
    paths under `/v2` that are not the protocol's, and the application's own."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        plane: DataPlane,
        settings: V2HttpSettings,
        metrics: HttpMetrics | None = None,
        others: Collection[str] = (),
    ) -> None:
        self._app = app
        self._others = others
        self._plane = plane
        self._settings = settings
        self._metrics = metrics
        self._watches = DisconnectWatches()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One exchange."""
        path: str = scope.get("path", "")
        if scope["type"] != "http" or not self.takes(path):
            await self._app(scope, receive, send)
            return
        begin_s = time.monotonic()
        call = HttpCall(scope, receive, send, self._settings, self._watches)
        template, methods = _route(path.split("/")[2:], call)
        try:
            await self._answer(call, methods)
        except ClientGoneError:
            call.status = CLIENT_CLOSED_REQUEST
        finally:
            if self._metrics is not None:
                self._metrics.observe(template, call.method, call.status, time.monotonic() - begin_s)

    def takes(self, path: str) -> bool:
        """Whether a path is this protocol's."""
        return (path.startswith("/v2/") or path == "/v2") and path not in self._others

    def has_route(self, scope: Scope) -> bool:
        """Whether one of its paths is answered, by whatever method."""
        call = HttpCall(scope, _nobody, _nobody, self._settings, self._watches)
        return bool(_route(scope["path"].split("/")[2:], call)[1])

    async def _answer(self, call: HttpCall, methods: Methods) -> None:
        handler = methods.get(call.method)
        if handler is None:
            text, code = (b"Method Not Allowed", 405) if methods else (b"Not Found", 404)
            await call.answer(HttpAnswer(b'{"error":"%s"}' % text, code))
            return
        try:
            answer = await handler(call, self._plane)
        except LLMServeError as error:
            answer = refused_answer(error, self._settings)
        except ClientGoneError:
            raise
        except Exception as error:  # the HTTP door
            logger.exception("%s of model %r failed", call.method, call.model)
            if call.started:
                raise
            answer = error_answer(error)
        if answer is not None:
            await call.answer(answer)


async def _nobody(*_: object) -> Any:
    raise AssertionError("only the path was to be looked at")


def _route(segments: list[str], call: HttpCall) -> tuple[str, Methods]:
    """(template for the metrics, what answers by method); fills in what the path says. No methods: no such route."""
    match segments:
        case ["models", "stats"]:
            pass
        case ["models", model, *rest] if model:
            call.model = model
            return _of_model(rest, call)
        case ["repository", "models", model, "load" | "unload" as verb] if model:
            call.model = model
            return f"/v2/repository/models/{{model}}/{verb}", _LOAD[verb]
        case ["repository", repository, "models", model, "load" | "unload" as verb] if model and repository:
            call.repository, call.model = repository, model
            return f"/v2/repository/{{repository}}/models/{{model}}/{verb}", _LOAD[verb]
        case ["repository", repository, "index"] if repository:
            call.repository = repository
            return "/v2/repository/{repository}/index", _INDEX
        case ["systemsharedmemory" | "cudasharedmemory" as kind, *rest]:
            return _of_shared_memory(kind, rest, call)
        case _:
            pass
    methods = _SERVER.get(tuple(segments), _NO_METHODS)
    return ("/v2/" + "/".join(segments)).rstrip("/") if methods else "none", methods


def _of_model(rest: list[str], call: HttpCall) -> tuple[str, Methods]:
    """After models/{model}."""
    prefix = "/v2/models/{model}"
    if rest == ["trace", "setting"]:
        return f"{prefix}/trace/setting", _MODEL_TRACE
    if len(rest) > 1 and rest[0] == "versions" and is_version(rest[1]):
        call.version = rest[1]
        prefix, rest = f"{prefix}/versions/{{version}}", rest[2:]
    methods = _MODEL.get(tuple(rest), _NO_METHODS)
    return "/".join((prefix, *rest)) if methods else "none", methods


def is_version(text: str) -> bool:
    """Whether a path may name a version so."""
    return text.isascii() and text.isdigit()


def _of_shared_memory(kind: str, rest: list[str], call: HttpCall) -> tuple[str, Methods]:
    call.repository = "system" if kind == "systemsharedmemory" else "CUDA"
    match rest:
        case ["region", region, verb] if region and verb in _SHARED_MEMORY:
            call.region = region
            return f"/v2/{kind}/region/{{region}}/{verb}", _SHARED_MEMORY[verb]
        case ["status" | "unregister" as verb]:
            return f"/v2/{kind}/{verb}", _SHARED_MEMORY[verb]
        case _:
            return "none", _NO_METHODS
