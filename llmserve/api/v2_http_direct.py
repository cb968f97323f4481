"""The route `infer` on the short way: small, plain requests, answered without a task. Knows no socket.

What a request meets is what it meets as ASGI, in the same order: the door (identity, key, rate limit, log line), the
reading of the body, the data plane, the metrics. What needs more than that (a time limit, compression, CORS) is not
taken, and goes the way of all others.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from llmserve.api.door import Door, answer_headers, refusal
from llmserve.api.errors import CLIENT_CLOSED_REQUEST
from llmserve.api.http_protocol import DirectExchange
from llmserve.api.scopes import INFER
from llmserve.api.v2_http import is_version
from llmserve.api.v2_http_call import (
    HttpAnswer,
    check_size,
    error_answer,
    preferred_encoding,
    refused_answer,
)
from llmserve.api.v2_http_infer import find_single_response, read_infer, single_response, write_infer
from llmserve.api.v2_infer_json import InferCall
from llmserve.api.v2_settings import V2HttpSettings
from llmserve.errors import LLMServeError
from llmserve.http_metrics import HttpMetrics
from llmserve.inference import InferResponse
from llmserve.repository.data_plane import DataPlane
from llmserve.repository.model_version import ResponseStream
from llmserve.repository.served_version import Answering
from llmserve.request_context import CURRENT_REQUEST, RequestContext

logger = logging.getLogger(__name__)

_UNUSUAL = frozenset((b"content-encoding", b"expect", b"origin"))
_MAX_ROUTES = 1024
_MAX_URL_BYTES = 512  # of one that is remembered: strangers make them up, before anybody asks who they are


class DirectInfer:
    """A `DirectHandler`, behind a door."""

    def __init__(self, door: Door, *, plane: DataPlane, settings: V2HttpSettings, metrics: HttpMetrics) -> None:
        self.door = door
        self.plane = plane
        self.settings = settings
        self.metrics = metrics
        self._routes: dict[bytes, Route | None] = {}

    def accepts(self, method: bytes, url: bytes, headers: dict[bytes, bytes]) -> bool:
        """Whether it is a plain inference."""
        return (
            method == b"POST"
            and self._route(url) is not None
            and _UNUSUAL.isdisjoint(headers)
            and not self.door.limits_time(headers)
            and not preferred_encoding(headers.get(b"accept-encoding", b""))
        )

    def serve(self, exchange: DirectExchange) -> None:
        """One exchange."""
        route = self._route(exchange.url)
        assert route is not None
        _Call(self, route, exchange).begin()

    def _route(self, url: bytes) -> Route | None:
        """What a URL says, remembered: most are asked for again."""
        try:
            return self._routes[url]
        except KeyError:
            if len(self._routes) == _MAX_ROUTES:
                self._routes.clear()
            route = _read_route(url)
            if len(url) <= _MAX_URL_BYTES:
                self._routes[url] = route
            return route


class Route:
    """What a path says."""

    __slots__ = ("model", "path", "template", "version")

    def __init__(self, path: str, model: str, version: str, template: str) -> None:
        self.path = path
        self.model = model
        self.version = version
        self.template = template


def _read_route(url: bytes) -> Route | None:
    """None for what is no path of `infer`, or one that has to be decoded first."""
    if b"%" in url or b"?" in url or b"#" in url or not url.isascii():
        return None
    path = url.decode()
    match path.split("/"):
        case ["", "v2", "models", model, "infer"] if model:
            return Route(path, model, "", "/v2/models/{model}/infer")
        case ["", "v2", "models", model, "versions", version, "infer"] if model and is_version(version):
            return Route(path, model, version, "/v2/models/{model}/versions/{version}/infer")
        case _:
            return None


class _Call:
    """One request while it is being answered."""

    __slots__ = ("_begin_s", "_cancel", "_context", "_exchange", "_infer_call", "_owner", "_route")

    def __init__(self, owner: DirectInfer, route: Route, exchange: DirectExchange) -> None:
        self._owner = owner
        self._route = route
        self._exchange = exchange
        self._infer_call: InferCall
        self._context: RequestContext
        self._begin_s = 0.0
        self._cancel: Callable[[], object] | None = None

    def begin(self) -> None:
        """Past the door, to the model."""
        exchange, door = self._exchange, self._owner.door
        exchange.on_gone = self._gone
        context = self._context = door.begin(self._route.path, exchange.headers)
        token = CURRENT_REQUEST.set(context)
        try:
            door.admit(context, exchange.headers, INFER, _unasked)
            self._begin_s = time.monotonic()
            if exchange.disconnected:
                self._gone()
            else:
                self._infer()
        except LLMServeError as error:  # the door's
            context.error = error.code
            response = refusal(error, is_v2=True)
            context.status = response.status_code
            headers = [header for header in response.raw_headers if header[0] != b"content-length"]
            exchange.answer(context.status, headers + answer_headers(context), response.body)
            door.end(context)
        finally:
            CURRENT_REQUEST.reset(token)

    def _infer(self) -> None:
        """Hands the request to the model; its answer comes later."""
        owner, model, version, body = self._owner, self._route.model, self._route.version, self._exchange.body
        try:
            served = find_single_response(model, version, owner.plane)
            check_size(len(body), owner.settings.max_body_bytes)
            self._infer_call = read_infer(model, version, self._exchange.headers, body, owner.plane, owner.settings)
            responses = owner.plane.infer(self._infer_call.request, served)
            if isinstance(responses, Answering) and responses.deliver(self._take):
                self._cancel = responses.close
            else:
                self._cancel = asyncio.create_task(self._wait(responses), name="infer").cancel
        except Exception as error:  # noqa: BLE001 (the HTTP door)
            self._send(self._failed(error))

    async def _wait(self, responses: ResponseStream) -> None:
        """For a model whose responses can only be iterated over."""
        try:
            response = await single_response(responses, self._route.model)
        except Exception as error:  # noqa: BLE001 (the HTTP door)
            self._send(self._failed(error))
        else:
            self._take(response)

    def _take(self, response: InferResponse | LLMServeError) -> None:
        """The model has answered."""
        try:
            if isinstance(response, LLMServeError):
                raise response
            answer = write_infer(response, self._infer_call)
        except Exception as error:  # noqa: BLE001 (the HTTP door)
            answer = self._failed(error)
        self._send(answer)

    def _failed(self, error: Exception) -> HttpAnswer:
        if isinstance(error, LLMServeError):
            return refused_answer(error, self._owner.settings)
        logger.error("infer of model %r failed", self._route.model, exc_info=error)
        return error_answer(error)

    def _send(self, answer: HttpAnswer) -> None:
        context = self._context
        context.status = answer.status
        headers = [(b"content-type", answer.content_type), *answer.headers, *answer_headers(context)]
        self._exchange.answer(answer.status, headers, answer.body, answer.parts)
        self._end(answer.status)

    def _gone(self) -> None:
        """The client has closed the connection: nobody waits for the answer."""
        if self._cancel is not None:
            self._cancel()
        self._end(CLIENT_CLOSED_REQUEST)

    def _end(self, status: int) -> None:
        self._cancel = None  # it would hold the request and all it has brought
        owner = self._owner
        owner.metrics.observe(self._route.template, "POST", status, time.monotonic() - self._begin_s)
        owner.door.end(self._context)


def _unasked() -> bool:
    raise AssertionError("where a client is does not matter to inference")
