"""A pooling model's side of the Open Inference Protocol: tensors to texts, rows to one tensor. Knows no HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

import numpy as np
from tritonclient.grpc.model_config_pb2 import ModelConfig

from llmserve.backends.pooling_job import Pooled, PoolingTask
from llmserve.backends.pooling_signature import ATTENTION_MASK, INPUT_IDS, TEXT, TEXT_PAIR, output_name
from llmserve.backends.pooling_tokenizer import NEVER, PoolingInput, TextPair, Truncation
from llmserve.backends.tensors import Array, to_array, to_wire
from llmserve.backends.validation import RequestValidator
from llmserve.backends.vectors import activate, shorten
from llmserve.errors import InvalidRequestError
from llmserve.inference import InferRequest, InferResponse, Tensor
from llmserve.pooling_config import PoolingConfig

_PARAMETERS = {"truncate": bool, "normalize": bool, "dimensions": int, "raw_scores": bool}


class Pooler(Protocol):
    """Who computes."""

    name: str
    version: str
    pooling: PoolingConfig

    async def pool(
        self,
        inputs: Sequence[PoolingInput],
        task: PoolingTask,
        truncation: Truncation = NEVER,
        param: str | Sequence[str] = "input",
        *,
        add_special_tokens: bool = True,
        timeout_s: float = 0.0,
    ) -> Pooled:
        """`PoolingModel.pool`."""
        ...


class PoolingV2:
    """Answers v2 requests of one model. `parameters`: truncate, normalize and dimensions, or raw_scores."""

    def __init__(self, model: Pooler, config: ModelConfig) -> None:
        self._model = model
        self._validator = RequestValidator(config)

    async def infer(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        """The one response. Raises InvalidRequestError, and what `pool` raises."""
        checked = self._validator.check(request)
        given = {
            tensor.name: to_array(tensor.datatype, tensor.shape, memoryview(tensor.data)) for tensor in checked.inputs
        }
        options = _options(request)
        config = self._model.pooling
        task: PoolingTask = "embed" if config.kind == "embed" else "classify"
        truncation = Truncation(allowed=bool(options.get("truncate")))
        timeout_s = request.timeout_us * 1e-6
        pooled = await self._model.pool(_inputs(given), task, truncation, "inputs", timeout_s=timeout_s)
        rows = np.stack(pooled.rows)
        if config.kind == "embed":
            dimensions = check_dimensions(options.get("dimensions"), config)
            rows = shorten(rows, dimensions, unit=bool(options.get("normalize", config.normalize)))
        elif not options.get("raw_scores"):
            rows = activate(rows, config.activation).astype(np.float32)
        datatype, data = to_wire(rows)
        output = Tensor(output_name(config), datatype, rows.shape, memoryview(data))
        yield InferResponse(self._model.name, self._model.version, [output], request.id)


def check_dimensions(dimensions: int | None, config: PoolingConfig) -> int | None:
    """The length that vectors are cut to. Raises InvalidRequestError for one that the model's do not have."""
    if dimensions is None or dimensions == config.dimension:
        return None
    if not 1 <= dimensions <= config.dimension:
        raise InvalidRequestError(
            f"'dimensions' is {dimensions}; the model's vectors have {config.dimension}, and may be cut to fewer.",
            "dimensions",
        )
    return dimensions


def _inputs(given: dict[str, Array]) -> list[PoolingInput]:
    """Texts, pairs of texts or token ids. Raises InvalidRequestError."""
    if (TEXT in given) == (INPUT_IDS in given):
        raise InvalidRequestError(f"Give either the input '{TEXT}' or the input '{INPUT_IDS}'.", "inputs")
    if INPUT_IDS in given:
        if TEXT_PAIR in given:
            raise InvalidRequestError(f"'{TEXT_PAIR}' goes with '{TEXT}', not with '{INPUT_IDS}'.", "inputs")
        return _unpadded(given[INPUT_IDS], given.get(ATTENTION_MASK))
    if ATTENTION_MASK in given:
        raise InvalidRequestError(f"'{ATTENTION_MASK}' goes with '{INPUT_IDS}', not with '{TEXT}'.", "inputs")
    texts = _decoded(given[TEXT], TEXT)
    if TEXT_PAIR not in given:
        return list[PoolingInput](texts)
    return [TextPair(*both) for both in zip(texts, _decoded(given[TEXT_PAIR], TEXT_PAIR), strict=True)]


def _decoded(array: Array, name: str) -> list[str]:
    try:
        texts = [element.decode() for element in array.reshape(-1).tolist()]
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"input '{name}' holds bytes that are not UTF-8: {error}", name) from error
    if "" in texts:
        raise InvalidRequestError(f"input '{name}' holds an empty text.", name)
    return texts


def _unpadded(token_ids: Array, mask: Array | None) -> list[PoolingInput]:
    if token_ids.size and not 0 <= token_ids.min() <= token_ids.max() < 2**31:
        raise InvalidRequestError(f"input '{INPUT_IDS}' has values that are no token ids.", INPUT_IDS)
    if mask is None:
        return [row.tolist() for row in token_ids]
    if mask.shape != token_ids.shape:
        raise InvalidRequestError(f"'{ATTENTION_MASK}' and '{INPUT_IDS}' differ in shape.", ATTENTION_MASK)
    return [row[row_mask != 0].tolist() for row, row_mask in zip(token_ids, mask, strict=True)]


def _options(request: InferRequest) -> dict[str, Any]:
    for name, value in request.parameters.items():
        wanted = _PARAMETERS.get(name)
        if wanted is None or type(value) is not wanted:
            known = ", ".join(f"{known} ({kind.__name__})" for known, kind in _PARAMETERS.items())
            raise InvalidRequestError(f"The parameter {name!r} is not honoured here. Those that are: {known}.", name)
    return dict(request.parameters)
