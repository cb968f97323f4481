"""What every route is given: the models, the bounds, the metrics. Knows no route."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from llmserve.api.body import decode_object, read_json_body
from llmserve.api.directory import ModelDirectory, PoolingDirectory
from llmserve.api.resume import ResumableStreams
from llmserve.api.settings import ApiSettings
from llmserve.api.validation import RequestModel, parse_request
from llmserve.backends.generation import TextGenerator
from llmserve.errors import InvalidRequestError, NotReadyError
from llmserve.metrics import Metrics
from llmserve.pooling_config import Kind
from llmserve.repository.data_plane import DataPlane

Parsed = TypeVar("Parsed")
_USES: Mapping[Kind, str] = {
    "embed": "/v1/embeddings, /rerank and /score",
    "score": "/rerank and /score",
    "classify": "/classify and /predict",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiContext:
    """One for an application."""

    models: ModelDirectory
    pooling: PoolingDirectory
    settings: ApiSettings
    metrics: Metrics
    plane: DataPlane | None = None  # general models, where they are served
    streams: ResumableStreams = field(default_factory=lambda: ResumableStreams(0.0))

    async def read_request(self, request: Request, model: type[RequestModel]) -> RequestModel:
        """The body as `model`. Raises InvalidRequestError."""
        return await self.read_body(request, lambda body: parse_request(model, body))

    async def read_body(self, request: Request, parse: Callable[[dict[str, Any]], Parsed]) -> Parsed:
        """What `parse` makes of the body, a JSON object. A large one is read in a thread: that takes up to a second,
        and streams want to flow. Raises InvalidRequestError, and what `parse` raises."""
        body = await read_json_body(request, self.settings.max_body_bytes)
        if len(body) <= self.settings.inline_parse_bytes:
            return parse(decode_object(body))
        return await asyncio.to_thread(lambda: parse(decode_object(body)))

    def generator(self, name: str | None) -> TextGenerator:
        """The model a request means. Raises InvalidRequestError, ModelNotFoundError."""
        if name is None:
            name = self.models.default
        if name is None:
            if not self.models.names:
                raise InvalidRequestError(
                    "No language model is served here. Name one when you start the server: `llmserve serve MODEL`.",
                    "model",
                )
            listed = ", ".join(repr(known) for known in self.models.names)
            raise InvalidRequestError(f"'model' is required where several models are served: {listed}.", "model")
        if name in self.pooling.names and name not in self.models.names:
            raise InvalidRequestError(
                f"The model {name!r} generates no text: it is for {_USES[self.pooling.kind(name)]}.", "model"
            )
        if self.plane is not None and self.plane.has_general_model(name) and name not in self.models.names:
            raise InvalidRequestError(
                f"The model {name!r} is no language model. Ask it by POST /v2/models/{name}/infer; "
                f"GET /v2/models/{name} says what it takes.",
                "model",
            )
        return self.models.get(name)

    def ready_generator(self, name: str | None) -> TextGenerator:
        """As `generator`, for requests that need the engine: before it is loaded, the context length is not known yet.

        Raises NotReadyError too.
        """
        generator = self.generator(name)
        if not generator.takes_requests():
            raise NotReadyError(f"The model {generator.name!r} takes no requests now: it is {generator.reason}")
        return generator


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON by msgspec, which is several times faster than the standard library's."""
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")
