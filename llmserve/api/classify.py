"""POST /classify: the label of each text. vLLM's shape. Translates and decides nothing."""

from __future__ import annotations

import uuid

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from llmserve.api.context import ApiContext, json_response
from llmserve.api.embeddings import usage
from llmserve.api.pooling_call import check_count, run, use_model
from llmserve.api.pooling_protocol import ClassifyRequest
from llmserve.backends.vectors import activate


async def classify(http_request: Request, context: ApiContext) -> Response:
    """Answers one request. A reranker is a classifier of one label."""
    request = await context.read_request(http_request, ClassifyRequest)
    check_count(len(request.input), context, "input")
    with use_model(context, request.model, ["classify", "score"]) as model:
        special = request.add_special_tokens is not False
        work = model.pool(request.input, "classify", request.truncated(), "input", add_special_tokens=special)
        pooled = await run(http_request, work)
        raw = bool(request.raw_scores) or request.use_activation is False
        activation = "identity" if raw else model.pooling.activation
        data = []
        for index, row in enumerate(pooled.rows):
            scores = activate(row, activation)
            best = int(np.argmax(scores))
            data.append(
                {
                    "index": index,
                    "label": model.label(best),
                    "probs": scores.tolist(),
                    "num_classes": len(scores),
                }
            )
        return json_response(
            {
                "id": f"classify-{uuid.uuid4().hex}",
                "object": "list",
                "model": model.name,
                "data": data,
                "usage": usage(sum(pooled.num_tokens)),
            }
        )
