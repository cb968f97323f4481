"""The door of the gRPC server: what `door` is to HTTP. Every method passes it, those added later too."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio

from llmserve.api.gatekeeper import Gatekeeper, bearer_key, is_from_proxy, is_loopback
from llmserve.api.scopes import grpc_scope
from llmserve.errors import ForbiddenError, LLMServeError, RateLimitError, UnauthorizedError
from llmserve.request_context import CURRENT_REQUEST, RequestContext, Tenant

_STATUSES = {
    UnauthorizedError: grpc.StatusCode.UNAUTHENTICATED,
    ForbiddenError: grpc.StatusCode.PERMISSION_DENIED,
    RateLimitError: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class GrpcDoor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Admits and accounts for every call. `on_end` hears of each when it is over."""

    def __init__(
        self,
        gatekeeper: Gatekeeper,
        on_begin: Callable[[RequestContext, str], None] | None = None,
        on_end: Callable[[RequestContext], None] | None = None,
    ) -> None:
        self._gatekeeper = gatekeeper
        self._on_begin = on_begin
        self._on_end = on_end

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """Wraps the method found; what is not found is refused by gRPC itself."""
        handler = await continuation(details)
        if handler is None:
            return None
        metadata = {key: value for key, value in details.invocation_metadata or () if isinstance(value, str)}
        call = _Call(self, details.method, metadata)
        make, method = _kind_of(handler)
        if handler.response_streaming:

            async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
                await call.begin(context)
                try:
                    async for response in method(request, context):
                        yield response
                finally:
                    call.end(context)

            guarded: Any = stream
        else:

            async def unary(request: Any, context: Any) -> Any:
                await call.begin(context)
                try:
                    return await method(request, context)
                finally:
                    call.end(context)

            guarded = unary
        return make(
            guarded, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )

    def admit(self, method: str, metadata: dict[str, str], peer: str) -> Tenant:
        """Raises UnauthorizedError, ForbiddenError, RateLimitError."""
        key = bearer_key(metadata.get("authorization", ""), metadata.get("x-api-key", ""))
        return self._gatekeeper.admit(
            key, grpc_scope(method), lambda: _is_local_peer(peer) and not any(map(is_from_proxy, metadata))
        )

    def began(self, context: RequestContext, traceparent: str) -> None:
        """A call is here."""
        if self._on_begin is not None:
            self._on_begin(context, traceparent)

    def ended(self, context: RequestContext) -> None:
        """A call is over."""
        if self._on_end is not None:
            self._on_end(context)


class _Call:
    """One call, from its admission to its end."""

    def __init__(self, door: GrpcDoor, method: str, metadata: dict[str, str]) -> None:
        self._door = door
        self._method = method
        self._metadata = metadata
        request_id = metadata.get("x-request-id", "")[:128] or f"req-{uuid.uuid4().hex}"
        self.context = RequestContext(request_id=request_id, route=method)

    async def begin(self, context: Any) -> None:
        """Aborts the call if it may not be made."""
        CURRENT_REQUEST.set(self.context)  # the task is the call's own
        self._door.began(self.context, self._metadata.get("traceparent", ""))
        try:
            self.context.tenant = self._door.admit(self._method, self._metadata, context.peer())
            if (left_s := context.time_remaining()) is not None:  # the client's own deadline: gRPC keeps it itself
                self.context.limit_time(left_s)
        except LLMServeError as error:
            self.context.error = error.code
            self._door.ended(self.context)
            await context.abort(_STATUSES[type(error)], error.message)

    def end(self, context: Any) -> None:
        """However it ended. The books have HTTP's statuses: gRPC's codes are known to its own metrics."""
        code = context.code()
        self.context.status = 200 if code in (None, 0, grpc.StatusCode.OK) else 500
        self._door.ended(self.context)


def _kind_of(handler: Any) -> tuple[Any, Any]:
    """(what makes a handler of the same kind, its method)."""
    kinds = {
        (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
        (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
    }
    return kinds[bool(handler.request_streaming), bool(handler.response_streaming)]


def _is_local_peer(peer: str) -> bool:
    """`ipv4:127.0.0.1:5000`, `ipv6:%5B::1%5D:5000`, `unix:...`."""
    kind, _, address = unquote(peer).partition(":")
    return kind == "unix" or is_loopback(address)
