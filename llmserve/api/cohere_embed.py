"""POST /v2/embed: Cohere's embeddings, in any of its number formats. Translates and decides nothing."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from llmserve.api.context import ApiContext, json_response
from llmserve.api.embeddings import embed
from llmserve.api.pooling_call import check_count, run, use_model
from llmserve.api.pooling_protocol import CohereEmbedRequest, EmbeddingOptions
from llmserve.api.vector_format import VectorFormat, check_format, write_vectors
from llmserve.backends.pooling_tokenizer import Truncation
from llmserve.errors import InvalidRequestError


async def cohere_embed(http_request: Request, context: ApiContext) -> Response:
    """Answers one request."""
    request = await context.read_request(http_request, CohereEmbedRequest)
    texts = _texts(request)
    check_count(len(texts), context, "texts")
    with use_model(context, request.model, ["embed"]) as model:
        forms: list[VectorFormat] = list(dict.fromkeys(request.embedding_types or ["float"]))
        for form in forms:
            check_format(form, request.output_dimension or model.pooling.dimension)
        options = EmbeddingOptions(dimensions=request.output_dimension, input_type=request.input_type)
        truncation = Truncation(
            request.max_tokens, request.truncate != "NONE", "left" if request.truncate == "START" else "right"
        )

        async def work() -> tuple[int, dict[VectorFormat, list[msgspec.Raw]]]:
            answer = await embed(texts, options, model, "texts", truncation)
            return answer.num_tokens, {form: await write_vectors(answer.vectors, form) for form in forms}

        num_tokens, embeddings = await run(http_request, work())
        return json_response(
            {
                "id": str(uuid.uuid4()),
                "response_type": "embeddings_by_type",
                "embeddings": embeddings,
                "texts": texts,
                "meta": {
                    "api_version": {"version": "2"},
                    "billed_units": {"input_tokens": num_tokens},
                    "tokens": {"input_tokens": num_tokens},
                },
            }
        )


def _texts(request: CohereEmbedRequest) -> list[str]:
    """`texts`, or `inputs` whose content is one text each. Raises InvalidRequestError."""
    if (request.texts is None) == (request.inputs is None):
        raise InvalidRequestError("Give either 'texts' or 'inputs'.", "texts")
    if request.texts is not None:
        return request.texts
    assert request.inputs is not None
    texts = [_text_of(item) for item in request.inputs]
    if not texts:
        raise InvalidRequestError("'inputs' must not be empty.", "inputs")
    for position, text in enumerate(texts):
        if not text:
            raise InvalidRequestError(
                f"'inputs.{position}' must be {{'content': [{{'type': 'text', 'text': <string>}}]}}; images are not "
                "supported.",
                "inputs",
            )
    return [text for text in texts if text]


def _text_of(item: Any) -> str | None:
    match item:
        case {"content": [{"type": "text", "text": str(text)}]}:
            return text
    return None
