"""POST /v1/embeddings and /pooling, and the vectors that other routes need. Translates and decides nothing."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from llmserve.api.context import ApiContext, json_response
from llmserve.api.pooling_call import ANY, check_count, prompt_of, run, use_model, with_prompt
from llmserve.api.pooling_protocol import EmbeddingOptions, EmbeddingsRequest, PoolingTaskRequest
from llmserve.api.vector_format import VectorFormat, check_format, write_vectors
from llmserve.backends.pooling_job import Pooled, PoolingTask
from llmserve.backends.pooling_model import PoolingModel
from llmserve.backends.pooling_tokenizer import Truncation
from llmserve.backends.pooling_v2 import check_dimensions
from llmserve.backends.vectors import FloatArray, activate, shorten
from llmserve.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors [dimension], or for `token_embed` [tokens, dimension], in the order of the inputs."""

    vectors: list[FloatArray]
    pooled: Pooled

    @property
    def num_tokens(self) -> int:
        """Of all inputs."""
        return sum(self.pooled.num_tokens)


async def embed(
    inputs: Sequence[str | list[int]],
    options: EmbeddingOptions,
    model: PoolingModel,
    param: str,
    truncation: Truncation | None = None,
    task: PoolingTask = "embed",
    add_special_tokens: bool = True,
) -> Embeddings:
    """Raises InvalidRequestError, and what `PoolingModel.pool` raises."""
    config = model.pooling
    dimensions = check_dimensions(options.dimensions, config)
    prompted = with_prompt(prompt_of(options, config), inputs, config)
    cut = options.truncated() if truncation is None else truncation
    pooled = await model.pool(prompted, task, cut, param, add_special_tokens=add_special_tokens)
    unit = config.normalize if options.unit is None else options.unit
    if task == "token_embed":
        return Embeddings([shorten(rows, dimensions, unit=bool(options.unit)) for rows in pooled.rows], pooled)
    return Embeddings(list(shorten(np.stack(pooled.rows), dimensions, unit=unit)), pooled)


async def embeddings(http_request: Request, context: ApiContext) -> Response:
    """OpenAI's, with the fields of vLLM, infinity and Jina."""
    request = await context.read_request(http_request, EmbeddingsRequest)
    check_count(len(request.input), context, "input")
    with use_model(context, request.model, ["embed"]) as model:
        form: VectorFormat = request.embedding_type or request.encoding_format or "float"
        check_format(form, request.dimensions or model.pooling.dimension)
        special = request.add_special_tokens is not False

        async def work() -> tuple[Embeddings, list[msgspec.Raw]]:
            answer = await embed(request.input, request, model, "input", add_special_tokens=special)
            return answer, await write_vectors(answer.vectors, form)

        answer, written = await run(http_request, work())
        return json_response(
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(written)
                ],
                "model": model.name,
                "usage": usage(answer.num_tokens),
            }
        )


async def pooling(http_request: Request, context: ApiContext) -> Response:
    """vLLM's: whatever the model makes of a text, or of each of its tokens."""
    request = await context.read_request(http_request, PoolingTaskRequest)
    check_count(len(request.input), context, "input")
    with use_model(context, request.model, ANY) as model:
        form: VectorFormat = request.embedding_type or request.encoding_format or "float"

        async def work() -> tuple[Pooled, list[msgspec.Raw]]:
            rows, pooled = await _pool(request, model)
            check_format(form, rows[0].shape[-1])
            return pooled, await write_vectors(rows, form)

        pooled, written = await run(http_request, work())
        return json_response(
            {
                "id": f"pool-{uuid.uuid4().hex}",
                "object": "list",
                "model": model.name,
                "data": [{"index": index, "object": "pooling", "data": row} for index, row in enumerate(written)],
                "usage": usage(sum(pooled.num_tokens)),
            }
        )


async def _pool(request: PoolingTaskRequest, model: PoolingModel) -> tuple[list[FloatArray], Pooled]:
    """What is answered for each input, and what the model made of it. Raises as `embed` does."""
    task = _task(request, model)
    special = request.add_special_tokens is not False
    if task != "classify":
        options = request.model_copy(update={"task": None})
        answer = await embed(request.input, options, model, "input", task=task, add_special_tokens=special)
        return answer.vectors, answer.pooled
    if request.dimensions is not None:
        raise InvalidRequestError("'dimensions' is for embeddings; this model gives scores.", "dimensions")
    pooled = await model.pool(request.input, task, request.truncated(), "input", add_special_tokens=special)
    activation = "identity" if request.use_activation is False else model.pooling.activation
    return [activate(row, activation).astype(np.float32) for row in pooled.rows], pooled


def _task(request: PoolingTaskRequest, model: PoolingModel) -> PoolingTask:
    """What the request asks for, or the model is made for. Raises InvalidRequestError."""
    can_embed = model.pooling.kind == "embed"
    asked = request.task or ("embed" if can_embed else "classify")
    if (asked in ("embed", "token_embed")) != can_embed:
        able = "embed and token_embed" if can_embed else "classify"
        raise InvalidRequestError(f"'task' is {asked!r}, but the model {model.name!r} can {able} only.", "task")
    return "classify" if asked == "score" else asked


def usage(num_tokens: int) -> dict[str, int]:
    """OpenAI's, for what generates nothing."""
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
