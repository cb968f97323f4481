"""Which route of the embedding, rerank and classification families is answered by what."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from llmserve.api import pooling_protocol as bodies
from llmserve.api.classify import classify
from llmserve.api.cohere_embed import cohere_embed
from llmserve.api.context import ApiContext
from llmserve.api.embeddings import embeddings, pooling
from llmserve.api.openapi import request_body
from llmserve.api.rerank import rerank
from llmserve.api.score import score
from llmserve.api.tei import tei_embed, tei_embed_all, tei_predict, tei_similarity

Handler = Callable[[Request, ApiContext], Awaitable[Response]]

_ROUTES: tuple[tuple[str, Handler, type[BaseModel], str], ...] = (
    ("/v1/embeddings", embeddings, bodies.EmbeddingsRequest, "A vector for each input."),
    ("/embeddings", embeddings, bodies.EmbeddingsRequest, "As /v1/embeddings."),
    ("/pooling", pooling, bodies.PoolingTaskRequest, "What the model makes of each input, or of each token."),
    ("/rerank", partial(rerank, version=1), bodies.RerankRequest, "Documents sorted by how well they answer a query."),
    ("/v1/rerank", partial(rerank, version=1), bodies.RerankRequest, "As /rerank."),
    ("/v2/rerank", partial(rerank, version=2), bodies.RerankRequest, "As /rerank, in Cohere's newer shape."),
    ("/score", score, bodies.ScoreRequest, "A score for each pair of texts."),
    ("/v1/score", score, bodies.ScoreRequest, "As /score."),
    ("/classify", classify, bodies.ClassifyRequest, "The label of each input."),
    ("/v2/embed", cohere_embed, bodies.CohereEmbedRequest, "Cohere's embeddings: float, int8, uint8, bits or base64."),
    ("/embed", tei_embed, bodies.TeiEmbedRequest, "A vector for each input (text-embeddings-inference)."),
    ("/embed_all", tei_embed_all, bodies.TeiEmbedRequest, "A vector for each token of each input."),
    ("/predict", tei_predict, bodies.TeiPredictRequest, "Every label of each input, the likeliest first."),
    ("/similarity", tei_similarity, bodies.TeiSimilarityRequest, "How near sentences are to a source sentence."),
)
# Under /v2, but Cohere's: the Open Inference Protocol has no such routes, and its handlers let them pass.
COHERE_PATHS = frozenset(path for path, *_ in _ROUTES if path.startswith("/v2/"))


def add_pooling_routes(app: FastAPI, context: ApiContext) -> None:
    """All of them take a JSON body by POST, which is read by hand."""
    for path, handler, body, text in _ROUTES:
        app.add_api_route(
            path,
            _endpoint(handler, context),
            methods=["POST"],
            name=path.strip("/").replace("/", "_"),
            description=text,
            openapi_extra=request_body(path, body),
        )


def _endpoint(handler: Handler, context: ApiContext) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await handler(request, context)

    return endpoint
