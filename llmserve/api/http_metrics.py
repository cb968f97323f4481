"""Counts HTTP requests by route and times them to their last byte. Pure ASGI; knows no route by name."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmserve.http_metrics import HttpMetrics

# Where the streams find the server's own `send`. Each middleware wraps it once more, FastAPI's included, to see the
# start of the response; through all of them a token would pay for what concerns the first message alone.
DIRECT_SEND = "llmserve.direct_send"


class HttpMetricsMiddleware:
    """A request that matches no route is counted under the handler "none": paths would be labels without end."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin_s = time.monotonic()
        scope.setdefault(DIRECT_SEND, send)
        status = 500  # what the server makes of an exception

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start":
                nonlocal status
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            handler = getattr(scope.get("route"), "path", "none")
            self._metrics.observe(handler, scope["method"], status, time.monotonic() - begin_s)
