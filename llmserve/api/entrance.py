"""All that stands before the routes, put together from its configuration: keys, TLS, limits, CORS, the books.

Knows no route. HTTP and gRPC each get their door here, over the same gatekeeper.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Scope

from llmserve.api.body_memory import BodyMemory
from llmserve.api.door import Door
from llmserve.api.gatekeeper import Gatekeeper
from llmserve.api.http_protocol import DirectHandler
from llmserve.api.http_server import grpc_settings, http_config, open_tls
from llmserve.api.journal import Journal
from llmserve.api.tenant_metrics import TenantMetrics
from llmserve.api.tracing import Tracer, open_tracer, pass_on, read_traceparent
from llmserve.api.v2_grpc import GrpcSettings
from llmserve.api.v2_grpc_door import GrpcDoor
from llmserve.api_keys import ApiKeys
from llmserve.config import DoorConfig
from llmserve.http_metrics import HttpMetrics
from llmserve.metrics import Metrics
from llmserve.request_context import RequestContext

logger = logging.getLogger(__name__)

_CORS_HEADERS = (
    *("Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"),
    *("traceparent", "tracestate", "X-Request-Id", "X-Request-Timeout"),
)
_CORS_EXPOSED = ("Retry-After", "traceparent", "X-Request-Id")


class Entrance:
    """Raises ConfigError if the keys or the certificate cannot be used."""

    def __init__(
        self, config: DoorConfig | None = None, metrics: Metrics | None = None, tracer: Tracer | None = None
    ) -> None:
        self._config = config = config or DoorConfig()
        keys = ApiKeys(Path(config.api_keys)) if config.api_keys else None
        self._gatekeeper = Gatekeeper(keys)
        self._tls = open_tls(config)
        self._journal = Journal(config.request_log, config.slow_request_s)
        self._tracer = tracer or (open_tracer() if config.otel else None)
        self._direct: DirectHandler | None = None
        self._http_metrics = HttpMetrics() if metrics is None else metrics.http
        if keys is not None and metrics is not None:
            metrics.register(TenantMetrics(keys), lambda: b"")

    def wrap(
        self,
        app: ASGIApp,
        has_route: Callable[[Scope], bool] = lambda scope: True,
        make_direct: Callable[[Door], DirectHandler] | None = None,
    ) -> ASGIApp:
        """`app` behind the door: the only way to it. `has_route`: whether it has an answer there. `make_direct` makes,
        behind the same door, who answers what need not come as ASGI; `http_config` leads to both."""
        door = Door(
            app,
            gatekeeper=self._gatekeeper,
            body_memory=BodyMemory(self._config.max_body_memory),
            request_timeout_s=self._config.request_timeout_s,
            on_begin=self._begin,
            on_end=self._end,
            has_route=has_route,
        )
        guarded: ASGIApp = door
        if make_direct is not None:
            self._direct = make_direct(door)
        if self._config.cors_origin:  # before the door: a preflight carries no key
            guarded = CORSMiddleware(
                guarded,
                allow_origins=list(self._config.cors_origin),
                allow_methods=["GET", "POST"],
                allow_headers=list(_CORS_HEADERS),
                expose_headers=list(_CORS_EXPOSED),
            )
        return guarded

    def grpc_door(self) -> GrpcDoor:
        """The interceptor before all others."""
        return GrpcDoor(self._gatekeeper, self._begin, self._end)

    def grpc_credentials(self) -> Any:
        """None without TLS."""
        return None if self._tls is None else self._tls.grpc_credentials()

    def grpc_settings(self, max_body_bytes: int) -> GrpcSettings:
        """The limits of the gRPC server; `max_body_bytes` bounds a message too."""
        return grpc_settings(self._config, max_body_bytes)

    def close(self) -> None:
        """Sends the spans that are left."""
        if self._tracer is not None:
            self._tracer.shutdown()

    def _begin(self, context: RequestContext, traceparent: str) -> None:
        parent = read_traceparent(traceparent) if traceparent else None
        if self._tracer is not None:
            self._tracer.begin(context, parent)
        elif parent is not None:
            pass_on(context, parent)

    def _end(self, context: RequestContext) -> None:
        """Whoever answers calls this last; what goes wrong with the books costs a line of them, and no answer."""
        try:
            self._journal.record(context)
            if self._tracer is not None:
                self._tracer.end(context)
        except Exception:
            logger.exception("the end of request %s could not be written down", context.request_id)

    def http_config(self, app: ASGIApp, drain_timeout_s: float) -> uvicorn.Config:
        """For the HTTP server."""
        return http_config(app, self._config, self._tls, drain_timeout_s, self._http_metrics, self._direct)
