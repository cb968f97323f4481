"""POST /score: how near texts are to each other, or how well one answers the other, pair by pair. vLLM's shape."""

from __future__ import annotations

import uuid

from starlette.requests import Request
from starlette.responses import Response

from llmserve.api.context import ApiContext, json_response
from llmserve.api.embeddings import usage
from llmserve.api.pooling_call import check_count
from llmserve.api.pooling_protocol import ScoreRequest
from llmserve.api.rerank import score_with
from llmserve.api.score_pairs import PairOptions
from llmserve.errors import InvalidRequestError

_NAMES = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))


async def score(http_request: Request, context: ApiContext) -> Response:
    """One with many, or as many with as many."""
    request = await context.read_request(http_request, ScoreRequest)
    queries, documents, param = _pairs(request)
    check_count(len(documents), context, param)
    options = PairOptions(
        truncation=request.truncated(),
        raw_scores=request.use_activation is False,
        instruction=request.instruction,
        documents_param=param,
    )
    name, scored = await score_with(http_request, context, request.model, queries, documents, options)
    data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scored.scores)]
    return json_response(
        {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "model": name,
            "data": data,
            "method": scored.method,
            "usage": usage(scored.num_tokens),
        }
    )


def _pairs(request: ScoreRequest) -> tuple[list[str], list[str], str]:
    """The two sides, and what the second is called. Raises InvalidRequestError."""
    given = request.model_dump(include={name for names in _NAMES for name in names}, exclude_none=True)
    for first, second in _NAMES:
        if given.keys() == {first, second}:
            queries, documents = given[first], given[second]
            if len(queries) not in (1, len(documents)):
                raise InvalidRequestError(
                    f"{first!r} has {len(queries)} texts and {second!r} has {len(documents)}; one goes with many, or "
                    "as many with as many.",
                    second,
                )
            return queries, documents, second
    known = ", ".join(f"{first!r} and {second!r}" for first, second in _NAMES)
    raise InvalidRequestError(f"Give two sides: {known}.", next(iter(given), "text_1"))
