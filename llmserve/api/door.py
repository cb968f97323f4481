"""The door of the HTTP server: every request passes it, whatever route it is for. Plain ASGI; knows no route's meaning.

Here a request gets its identity (who asks, under which id, until when), and here its end is written down. Routes that
are added later are behind it without knowing it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmserve.api.body_memory import BodyMemory
from llmserve.api.deadline import Deadline
from llmserve.api.errors import error_body, error_response
from llmserve.api.gatekeeper import Gatekeeper, bearer_key, is_from_proxy, is_loopback
from llmserve.api.http_metrics import DIRECT_SEND
from llmserve.api.pooling_routes import COHERE_PATHS
from llmserve.api.scopes import ADMIN, ANY, http_scope
from llmserve.api.v2_errors import error_text
from llmserve.errors import DeadlineExceededError, InvalidRequestError, LLMServeError
from llmserve.request_context import CURRENT_REQUEST, RequestContext

_MAX_ID_CHARS = 128
_MAX_TIMEOUT_S = 86_400.0
Headers = dict[bytes, bytes]


class Door:
    """Admits, limits the time of, and accounts for every HTTP request. `on_begin` hears of each, and of its
    `traceparent`, `on_end` when it is over."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        gatekeeper: Gatekeeper,
        body_memory: BodyMemory,
        request_timeout_s: float = 0.0,
        on_begin: Callable[[RequestContext, str], None] | None = None,
        on_end: Callable[[RequestContext], None] | None = None,
        has_route: Callable[[Scope], bool] = lambda scope: True,
    ) -> None:
        """`has_route`: whether anything answers there; without it, all that is not known by name is closed."""
        self._app = app
        self._has_route = has_route
        self._gatekeeper = gatekeeper
        self._body_memory = body_memory
        self._request_timeout_s = request_timeout_s
        self._on_begin = on_begin
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what may pass; answers the rest itself, in the shape of the protocol asked in."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a web socket: there is none here
            await send({"type": "websocket.close", "code": 1008})
            return
        headers: Headers = dict(scope["headers"])
        context = self.begin(scope["path"], headers)
        token = CURRENT_REQUEST.set(context)
        answer = _Answer(scope, send, context, keeps_id=b"x-request-id" in headers)
        body = self._body_memory.body_of(receive)
        try:
            self.admit(context, headers, self._needed(scope), lambda: _is_local(scope, headers))
            await self._run(scope, body.receive, answer, headers)
        except LLMServeError as error:
            await answer.refuse(error)
        finally:
            body.close()
            CURRENT_REQUEST.reset(token)
            self.end(context)

    # What concerns every request, by whichever way it comes.

    def begin(self, path: str, headers: Headers) -> RequestContext:
        """A request has come: it gets its identity. A request id that cannot be used leaves `headers`."""
        context = RequestContext(request_id=_request_id(headers), route=path)
        if self._on_begin is not None:
            self._on_begin(context, headers.get(b"traceparent", b"").decode("latin-1"))
        return context

    def admit(self, context: RequestContext, headers: Headers, needed: str, is_local: Callable[[], bool]) -> None:
        """Who asks, for a route of the scope `needed`. `is_local`: whether surely from this machine; asked only where
        that matters. Raises UnauthorizedError, ForbiddenError, RateLimitError."""
        if self._gatekeeper.keys is None:
            key = None
        else:
            key = bearer_key(
                headers.get(b"authorization", b"").decode("latin-1"),
                headers.get(b"x-api-key", b"").decode("latin-1"),
                headers.get(b"api-key", b"").decode("latin-1"),
            )
        context.tenant = self._gatekeeper.admit(key, needed, is_local)

    def limits_time(self, headers: Headers) -> bool:
        """Whether the request has to be answered within some time."""
        return self._request_timeout_s > 0 or b"x-request-timeout" in headers

    def end(self, context: RequestContext) -> None:
        """A request is over."""
        if self._on_end is not None:
            self._on_end(context)

    def _needed(self, scope: Scope) -> str:
        """The scope that a key must have."""
        needed = http_scope(scope["path"])
        if needed == ADMIN and not self._has_route(scope):
            return ANY  # to whoever may ask at all: there is nothing there
        return needed

    async def _run(self, scope: Scope, receive: Receive, answer: _Answer, headers: Headers) -> None:
        """Raises DeadlineExceededError once the request's time is up; whatever it had started has been left then."""
        context = answer.context
        deadline = Deadline(lambda: context.is_complete)
        try:
            with deadline:
                context.on_deadline = deadline.move
                timeout_s = _timeout_s(headers) or self._request_timeout_s
                if timeout_s:
                    context.limit_time(timeout_s)
                await self._app(scope, receive, answer.send)
        except TimeoutError:
            if not deadline.passed:
                raise
            assert context.deadline_s is not None
            allowed_s = context.deadline_s - context.arrival_s
            raise DeadlineExceededError(f"The request was not answered within its {allowed_s:g} s.") from None
        finally:
            context.on_deadline = None


class _Answer:
    """What goes back over one request: its start gets the door's headers, its failure the protocol's shape."""

    def __init__(self, scope: Scope, send: Send, context: RequestContext, *, keeps_id: bool) -> None:
        self.context = context
        self._send = send
        path: str = scope["path"]
        self._is_v2 = (path == "/v2" or path.startswith("/v2/")) and path not in COHERE_PATHS
        self._scope = scope
        self._keeps_id = keeps_id
        self._is_stream = False
        scope[DIRECT_SEND] = send  # events need none of this: they go straight to the socket

    async def send(self, message: Message) -> None:
        """ASGI's `send`."""
        if message["type"] == "http.response.start":
            self._begin(message)
        elif not message.get("more_body", False):
            self.context.is_complete = True
        await self._send(message)

    async def refuse(self, error: LLMServeError) -> None:
        """Answers with an error; behind the beginning of a stream, as its last event, unless that has been sent."""
        self.context.error = error.code
        response = refusal(error, is_v2=self._is_v2)
        if not self.context.status:
            await response(self._scope, _nothing, self.send)
        elif self._is_stream and not self.context.is_complete:
            await self._send({"type": "http.response.body", "body": b"data: " + bytes(response.body) + b"\n\n"})
        # else: the server closes a connection whose answer was not completed

    def _begin(self, message: Message) -> None:
        context = self.context
        context.status = message["status"]
        headers = list(message["headers"])
        names = dict(headers)  # in lower case, as ASGI has them
        self._is_stream = names.get(b"content-type", b"").startswith(b"text/event-stream")
        context.is_complete = not self._is_stream  # all of it is there, and how long the client reads is its own affair
        if self._keeps_id:
            headers = [pair for pair in headers if pair[0] != b"x-request-id"]
        own = answer_headers(context)
        message["headers"] = headers + (own if self._keeps_id or b"x-request-id" not in names else own[1:])


def answer_headers(context: RequestContext) -> list[tuple[bytes, bytes]]:
    """What the door adds to every answer; the request's id first."""
    headers = [(b"x-request-id", context.request_id.encode())]
    if context.traceparent:
        headers.append((b"traceparent", context.traceparent.encode()))
    headers += context.tenant.limits.headers(time.monotonic())
    return headers


def refusal(error: LLMServeError, *, is_v2: bool) -> Response:
    """The answer to a request that the door does not let in, or on, in the shape of the protocol asked in."""
    response = error_response(error)
    response.body = msgspec.json.encode({"error": error_text(error)} if is_v2 else error_body(error))
    response.headers["content-length"] = str(len(response.body))
    return response


async def _nothing() -> Message:
    raise AssertionError("a refusal reads no body")


def _request_id(headers: Headers) -> str:
    """The client's, if it is one that logs and headers can carry; else a new one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    if given and given.isascii() and given.isprintable() and len(given) <= _MAX_ID_CHARS:
        return given
    headers.pop(b"x-request-id", None)
    return f"req-{random.getrandbits(128):032x}"  # a name, no secret


def _timeout_s(headers: Headers) -> float:
    """Of `X-Request-Timeout`, seconds; 0 without one. Raises InvalidRequestError."""
    text = headers.get(b"x-request-timeout")
    if text is None:
        return 0.0
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _MAX_TIMEOUT_S:
        raise InvalidRequestError(
            f"The header X-Request-Timeout must be a number of seconds above 0 and at most {_MAX_TIMEOUT_S:g}.",
            "X-Request-Timeout",
        )
    return seconds


def _is_local(scope: Scope, headers: Headers) -> bool:
    """Whether a request is surely this machine's own: no proxy's, and no web page's that a browser here was sent by.

    A page can send a request to a loopback address, but not without naming its origin, or the host it was fooled about.
    """
    client = scope.get("client")
    if scope.get("http_version") == "1.0":  # nginx asks in it, with the host name of its own configuration
        return False
    if client is None or not is_loopback(client[0]) or any(is_from_proxy(name.decode("latin-1")) for name in headers):
        return False
    origin = headers.get(b"origin", b"").decode("latin-1")
    try:
        if origin and not is_loopback(urlsplit(origin).hostname or ""):
            return False
    except ValueError:  # no address at all
        return False
    return is_loopback(headers.get(b"host", b"localhost").decode("latin-1"))
