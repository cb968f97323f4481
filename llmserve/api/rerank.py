"""POST /rerank, /v1/rerank and /v2/rerank: one handler for the requests of all servers that have it.

The word a request has for its documents says in whose shape it is answered. Translates and decides nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response

from llmserve.api.context import ApiContext, json_response
from llmserve.api.embeddings import usage
from llmserve.api.pooling_call import check_count, run, use_model
from llmserve.api.pooling_protocol import RerankRequest
from llmserve.api.query_likelihood import query_likelihoods
from llmserve.api.score_pairs import PairOptions, PairScores, score_pairs
from llmserve.api.tei_headers import tei_headers
from llmserve.errors import InvalidRequestError

Dialect = Literal["tei", "mixedbread", "voyage", "cohere"]


async def rerank(http_request: Request, context: ApiContext, version: int) -> Response:
    """Scores every document and sorts them, the best first. `version` is that of the route, as Cohere counts."""
    request = await context.read_request(http_request, RerankRequest)
    dialect, documents, param = _documents(request)
    check_count(len(documents), context, param)
    options = PairOptions(
        truncation=request.truncated(),
        raw_scores=bool(request.raw_scores) or request.use_activation is False,
        max_tokens_per_doc=request.max_tokens_per_doc,
        instruction=request.instruction,
        documents_param=param,
    )
    name, scored = await score_with(http_request, context, request.model, [request.query], documents, options)
    order = sorted(range(len(documents)), key=lambda index: -scored.scores[index])[: _top(request)]
    if dialect == "tei":
        ranks = [_rank(scored, index, "score") for index in order]
        _show(ranks, "text", documents, bool(request.return_text))
        headers = tei_headers(scored.pooled, sum(map(len, documents)) + len(request.query))
        return json_response(ranks, headers=headers)
    if dialect == "mixedbread":
        ranks = [{**_rank(scored, index, "score"), "object": "rank_result"} for index in order]
        _show(ranks, "input", documents, bool(request.return_input))
        listed = {"object": "list", "data": ranks, "return_input": bool(request.return_input)}
    elif dialect == "voyage":
        ranks = [_rank(scored, index, "relevance_score") for index in order]
        _show(ranks, "document", documents, bool(request.return_documents))
        listed = {"object": "list", "data": ranks}
    else:
        ranks = [_rank(scored, index, "relevance_score") for index in order]
        shows = version == 1 if request.return_documents is None else request.return_documents
        _show(ranks, "document", [{"text": document} for document in documents], shows)
        units = {"search_units": 1}
        meta = {
            "api_version": {"version": str(version)},
            "billed_units": units,
            "tokens": {"input_tokens": scored.num_tokens},
        }
        listed = {"id": f"rerank-{uuid.uuid4().hex}", "results": ranks, "meta": meta}
    return json_response({**listed, "model": name, "method": scored.method, "usage": usage(scored.num_tokens)})


async def score_with(
    http_request: Request,
    context: ApiContext,
    model_name: str | None,
    queries: Sequence[str],
    documents: Sequence[str],
    options: PairOptions,
) -> tuple[str, PairScores]:
    """(the model's name, the scores): by a reranker, else by an embedding model; by a chat model if it is named."""
    if model_name is not None and model_name in context.models.names and model_name not in context.pooling.names:
        generator = context.ready_generator(model_name)
        return model_name, await run(http_request, query_likelihoods(queries, documents, options, generator))
    with use_model(context, model_name, ["score", "embed"]) as model:
        return model.name, await run(http_request, score_pairs(queries, documents, options, model))


def _documents(request: RerankRequest) -> tuple[Dialect, list[str], str]:
    """Whose request it is, its documents and their name in it. Raises InvalidRequestError."""
    given = [name for name in ("documents", "texts", "input") if getattr(request, name) is not None]
    if len(given) != 1:
        raise InvalidRequestError("Give the documents once, as 'documents', 'texts' or 'input'.", "documents")
    if request.texts is not None:
        return "tei", request.texts, "texts"
    if request.input is not None:
        return "mixedbread", request.input, "input"
    assert request.documents is not None
    is_voyage = request.top_k is not None or request.truncation is not None
    return "voyage" if is_voyage else "cohere", request.documents, "documents"


def _top(request: RerankRequest) -> int | None:
    if request.top_n is not None and request.top_k is not None:
        raise InvalidRequestError("Give either 'top_n' or 'top_k'.", "top_n")
    return request.top_n or request.top_k or None


def _rank(scored: PairScores, index: int, name: str) -> dict[str, Any]:
    return {"index": index, name: scored.scores[index]}


def _show(ranks: list[dict[str, Any]], name: str, documents: Sequence[Any], shows: bool) -> None:
    if shows:
        for rank in ranks:
            rank[name] = documents[rank["index"]]
