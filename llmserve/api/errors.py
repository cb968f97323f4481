"""Turns every error into OpenAI's shape: the only place where an error's code meets an HTTP status."""

from __future__ import annotations

import logging
import math
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from llmserve.api.body import UnsupportedMediaTypeError
from llmserve.api.disconnect import ClientDisconnectedError
from llmserve.errors import (
    DeadlineExceededError,
    ForbiddenError,
    InvalidRequestError,
    LLMServeError,
    ModelNotFoundError,
    NotReadyError,
    QueueFullError,
    RequestTooLargeError,
    StreamConflictError,
    StreamGoneError,
    UnauthorizedError,
)
from llmserve.request_context import current_request

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499  # nginx's word; nobody is left to read it, but the HTTP metrics count it

# The first class of an error's method resolution order that stands here decides.
_STATUSES: dict[type[BaseException], int] = {
    UnsupportedMediaTypeError: 415,
    RequestTooLargeError: 413,
    InvalidRequestError: 400,
    StreamConflictError: 409,
    StreamGoneError: 410,
    UnauthorizedError: 401,
    ForbiddenError: 403,
    ModelNotFoundError: 404,
    QueueFullError: 429,
    NotReadyError: 503,
    DeadlineExceededError: 504,
    ClientDisconnectedError: CLIENT_CLOSED_REQUEST,
    LLMServeError: 500,
}


def status_of(error: BaseException) -> int:
    """The HTTP status of an error; 500 for one that is not ours."""
    return next((_STATUSES[base] for base in type(error).__mro__ if base in _STATUSES), 500)


def error_body(error: BaseException) -> dict[str, Any]:
    """`{"error": {...}}`. What an error that is not ours says stays in the log: it may not be the client's to know."""
    if not isinstance(error, LLMServeError):
        return _body("The server failed on this request. The log of the server says why.", 500, None, "internal_error")
    param = error.param if isinstance(error, InvalidRequestError) else None
    if isinstance(error, ModelNotFoundError):
        param = "model"
    return _body(error.message, status_of(error), param, error.code)


def error_response(error: BaseException) -> Response:
    """The answer to a request that failed before anything was sent."""
    status = status_of(error)
    current_request().error = error.code if isinstance(error, LLMServeError) else "internal_error"
    if status == 500 and isinstance(error, LLMServeError):  # others are raised again, and logged by the ASGI server
        logger.error("Request failed: %s", error)
    headers: dict[str, str] = {}
    if isinstance(error, QueueFullError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(error, NotReadyError):
        headers["Retry-After"] = "1"
    elif isinstance(error, RequestTooLargeError):
        headers["Connection"] = "close"  # or the rest of the body would have to be read
    return _response(error_body(error), status, headers)


def install_error_handlers(app: FastAPI) -> None:
    """Routes every error of `app`, its 404s and 405s included, to the shape above."""

    async def on_error(request: Request, error: Exception) -> Response:
        return error_response(error)

    async def on_disconnect(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        known = {getattr(route, "path", "") for route in app.routes}
        near = [other for other in (f"/v1{path}", path.rstrip("/"), f"/v1{path.rstrip('/')}") if other in known]
        meant = f"Did you mean {near[0]}?" if near else "GET / lists what there is."
        messages = {
            404: f"There is no {path} here. {meant}",
            405: f"{path} does not answer {request.method}.",
        }
        codes = {404: "not_found", 405: "method_not_allowed"}
        status = error.status_code
        body = _body(messages.get(status, str(error.detail)), status, None, codes.get(status, "http_error"))
        return _response(body, status, dict(error.headers or {}))

    app.add_exception_handler(LLMServeError, on_error)
    app.add_exception_handler(ClientDisconnectedError, on_disconnect)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(Exception, on_error)


def _body(message: str, status: int, param: str | None, code: str) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _response(body: dict[str, Any], status: int, headers: dict[str, str]) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")
