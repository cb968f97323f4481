"""The routes of text-embeddings-inference: /embed, /embed_all, /predict and /similarity, with its headers and errors.

Its /rerank is the shared one (`rerank.py`). Statuses are this server's: 400 where TEI says 413 or 422.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from llmserve.api.context import ApiContext, json_response
from llmserve.api.embeddings import embed
from llmserve.api.errors import error_response, status_of
from llmserve.api.pooling_call import check_count, run, use_model
from llmserve.api.pooling_protocol import (
    SimilarityParameters,
    TeiEmbedRequest,
    TeiPredictRequest,
    TeiSimilarityRequest,
)
from llmserve.api.tei_headers import tei_headers
from llmserve.api.vector_format import write_vectors
from llmserve.backends.pooling_job import Pooled
from llmserve.backends.pooling_model import PoolingModel
from llmserve.backends.pooling_tokenizer import PoolingInput, TextPair
from llmserve.backends.vectors import FloatArray, activate, similarities
from llmserve.errors import LLMServeError, NotReadyError, QueueFullError

_ERROR_TYPES = {400: "Validation", 404: "Validation", 413: "Validation", 415: "Validation", 429: "Overloaded"}

Handler = Callable[[Request, ApiContext], Awaitable[Response]]


def in_tei_words(handler: Handler) -> Handler:
    """A handler whose errors are `{error, error_type}`."""

    async def answer(http_request: Request, context: ApiContext) -> Response:
        try:
            return await handler(http_request, context)
        except LLMServeError as error:
            kind = "Unhealthy" if isinstance(error, NotReadyError) else _ERROR_TYPES.get(status_of(error), "Backend")
            headers = {"Retry-After": error_response(error).headers["retry-after"]} if _retries(error) else {}
            return json_response({"error": error.message, "error_type": kind}, status_of(error), headers)

    return answer


def _retries(error: LLMServeError) -> bool:
    return isinstance(error, QueueFullError | NotReadyError)


@in_tei_words
async def tei_embed(http_request: Request, context: ApiContext) -> Response:
    """POST /embed: a vector for each input, and nothing around them."""
    return await _embed(http_request, context, all_tokens=False)


@in_tei_words
async def tei_embed_all(http_request: Request, context: ApiContext) -> Response:
    """POST /embed_all: a vector for each token of each input, before pooling."""
    return await _embed(http_request, context, all_tokens=True)


async def _embed(http_request: Request, context: ApiContext, *, all_tokens: bool) -> Response:
    request = await context.read_request(http_request, TeiEmbedRequest)
    check_count(len(request.inputs), context, "inputs")
    with use_model(context, request.model, ["embed"]) as model:
        options = request if all_tokens or request.unit is not None else request.model_copy(update={"normalize": True})
        task: Any = "token_embed" if all_tokens else "embed"

        async def work() -> tuple[Pooled, list[msgspec.Raw]]:
            answer = await embed(request.inputs, options, model, "inputs", task=task)
            return answer.pooled, await write_vectors(answer.vectors, "float")

        pooled, written = await run(http_request, work())
        num_characters = sum(len(text) for text in request.inputs if isinstance(text, str))
        return json_response(written, headers=tei_headers(pooled, num_characters))


@in_tei_words
async def tei_predict(http_request: Request, context: ApiContext) -> Response:
    """POST /predict: every label of a text or of a pair of texts, the likeliest first."""
    request = await context.read_request(http_request, TeiPredictRequest)
    check_count(len(request.inputs), context, "inputs")
    is_single = all(isinstance(row, str) for row in request.inputs)
    flat = [row for row in request.inputs if isinstance(row, str)]
    rows = [flat] if is_single else [row for row in request.inputs if isinstance(row, list)]
    inputs: list[PoolingInput] = [TextPair(row[0], row[1]) if len(row) == 2 else row[0] for row in rows]
    with use_model(context, request.model, ["classify", "score"]) as model:
        pooled = await run(http_request, model.pool(inputs, "classify", request.truncated(), "inputs"))
        predictions = [_predictions(row, model, bool(request.raw_scores)) for row in pooled.rows]
        num_characters = sum(len(text) for row in rows for text in row)
        return json_response(predictions[0] if is_single else predictions, headers=tei_headers(pooled, num_characters))


def _predictions(row: FloatArray, model: PoolingModel, raw: bool) -> list[dict[str, Any]]:
    scores = activate(row, "identity" if raw else model.pooling.activation)
    order = np.argsort(-scores, kind="stable").tolist()
    return [{"score": float(scores[index]), "label": model.label(index)} for index in order]


@in_tei_words
async def tei_similarity(http_request: Request, context: ApiContext) -> Response:
    """POST /similarity: how near each sentence is to the source sentence."""
    request = await context.read_request(http_request, TeiSimilarityRequest)
    texts = [request.inputs.source_sentence, *request.inputs.sentences]
    check_count(len(texts), context, "inputs.sentences")
    with use_model(context, request.model, ["embed"]) as model:
        options = request.parameters or SimilarityParameters()
        answer = await run(http_request, embed(texts, options, model, "inputs"))
        source, others = answer.vectors[0], np.stack(answer.vectors[1:])
        near = similarities(source, others, model.pooling.similarity)
        return json_response(near.tolist(), headers=tei_headers(answer.pooled, sum(map(len, texts))))
