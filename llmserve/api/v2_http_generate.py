"""The routes `generate` and `generate_stream`: a JSON object in, one or a stream of them out. Knows no socket.

Keys that are inputs of the model become tensors, all others parameters; so do those inside `parameters`. An answer is
one object: each output flattened, a single element as a scalar, beside the model's name and version.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from tritonclient.grpc.model_config_pb2 import ModelInput

from llmserve.api import v2_tensors
from llmserve.api.v2_errors import MalformedRequestError, error_text
from llmserve.api.v2_http_call import HttpAnswer, HttpCall, error_answer, error_status
from llmserve.api.v2_json import encode_with_nan, parse_json_object
from llmserve.api.v2_parameters import CommonFields, read_parameters
from llmserve.backends.validation import datatype_name
from llmserve.errors import InvalidRequestError, LLMServeError
from llmserve.inference import InferRequest, InferResponse, Tensor
from llmserve.repository.data_plane import DataPlane

_EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_NOT_ONE = (
    "generate expects model to produce exactly 1 response, use generate stream for model that generates various "
    "number of responses"
)
_decode = msgspec.json.Decoder(dict[str, Any]).decode


async def generate(call: HttpCall, plane: DataPlane) -> HttpAnswer:
    """Exactly one response. Raises LLMServeError."""
    request = await _read_request(call, plane)
    answer: bytes | None = None
    try:
        with call.watch():
            async with aclosing(plane.infer(request)) as responses:
                async for response in responses:
                    if not response.outputs and response.final:
                        continue
                    if answer is not None:
                        raise InvalidRequestError(_NOT_ONE)
                    answer = _write(response)
    except LLMServeError as error:
        return error_answer(error, _status(error))
    if answer is None:
        raise InvalidRequestError(_NOT_ONE)
    return HttpAnswer(answer)


async def generate_stream(call: HttpCall, plane: DataPlane) -> None:
    """Every response as an event, sent as it comes. Raises LLMServeError before the first one only for bad requests."""
    request = await _read_request(call, plane)
    if plane.is_language_model(call.model):
        request.parameters.setdefault("stream", True)
    with call.watch():
        try:
            async with aclosing(plane.infer(request)) as responses:
                async for response in responses:
                    if response.outputs or not response.final:
                        await _send_event(call, _write(response))
        except LLMServeError as error:
            if not call.started:
                if isinstance(error, InvalidRequestError):
                    raise  # it never came to the model: no stream has begun
                await call.start(_status(error), _EVENT_STREAM)
            await _send_event(call, msgspec.json.encode({"error": error_text(error)}))
        if not call.started:
            await call.start(200, _EVENT_STREAM)
        await call.send({"type": "http.response.body", "body": b""})


async def _send_event(call: HttpCall, data: bytes) -> None:
    if not call.started:
        await call.start(200, _EVENT_STREAM)
    await call.send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})


def _status(error: LLMServeError) -> int:
    """A model that fails is 400 here, as Triton's generate routes answer it."""
    status = error_status(error)
    return 400 if status == 500 else status


async def _read_request(call: HttpCall, plane: DataPlane) -> InferRequest:
    config = plane.model_config(call.model, call.version)
    if call.headers.get(b"content-encoding", b"identity") != b"identity":
        raise InvalidRequestError("Unsupported content-encoding, only 'identity' is supported.")
    body = await call.read_body()
    try:
        values = _decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        values = parse_json_object(body)
        if not body.lstrip().startswith(b"{"):
            raise MalformedRequestError("attempt to get members for non-object") from None
    if len(values) > call.settings.max_parameters:
        raise InvalidRequestError(f"a request has at most {call.settings.max_parameters} members")
    signature = {tensor.name: tensor for tensor in config.input}
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Any] = {}
    _sort(values, signature, tensors, parameters, config.max_batch_size > 0, call.settings.max_json_depth)
    fields: CommonFields = read_parameters(parameters)
    request_id = values.get("id", "")
    if not isinstance(request_id, str):
        raise MalformedRequestError("Unable to parse 'id': attempt to access JSON non-string as string", "id")
    return InferRequest(
        model_name=call.model,
        model_version=call.version,
        id=request_id,
        inputs=list(tensors.values()),
        parameters=fields.parameters,
        priority=fields.priority,
        timeout_us=fields.timeout_us,
        sequence_id=fields.sequence_id,
        sequence_start=fields.sequence_start,
        sequence_end=fields.sequence_end,
    )


def _sort(
    values: Mapping[str, Any],
    signature: Mapping[str, ModelInput],
    tensors: dict[str, Tensor],
    parameters: dict[str, Any],
    batches: bool,
    max_depth: int,
) -> None:
    """Puts each member where it belongs; those of the member `parameters` as if they stood beside it."""
    for key, value in values.items():
        if key in signature:
            tensors[key] = _tensor(signature[key], value, batches, max_depth)
        elif key == "parameters" and values is not parameters:
            if not isinstance(value, dict):
                raise MalformedRequestError(
                    "Expected JSON object for keyword: 'parameters': attempt to access JSON non-object as object", key
                )
            nested = {name: item for name, item in value.items() if name != "parameters"}
            _sort(nested, signature, tensors, parameters, batches, max_depth)
            if "parameters" in value:
                parameters["parameters"] = value["parameters"]
        else:
            parameters[key] = value


def _tensor(spec: ModelInput, value: Any, batches: bool, max_depth: int) -> Tensor:
    """A scalar or a list as the input `spec`. At most one dimension may vary: the number of values says how large."""
    datatype = datatype_name(spec.data_type)
    values = v2_tensors.flatten(value, max_depth) if isinstance(value, list) else [value]
    v2_tensors.check_elements(values, datatype)
    dims = tuple(spec.dims)
    if sum(dim < 0 for dim in dims) > 1:
        raise InvalidRequestError(
            f"input '{spec.name}' has more than one variable-sized dimension: its shape cannot be told from its values",
            spec.name,
        )
    row = math.prod(dim for dim in dims if dim >= 0)
    shape = tuple(len(values) // row if dim < 0 else dim for dim in dims)
    if math.prod(shape) != len(values):
        raise InvalidRequestError(
            f"The schema can not convert input '{spec.name}' to tensor with proper shape: it has {len(values)} values, "
            f"which do not fill the shape {list(dims)}",
            spec.name,
        )
    data = v2_tensors.encode_values(values, spec.name, datatype)
    return Tensor(spec.name, datatype, (1, *shape) if batches else shape, data)


def _write(response: InferResponse) -> bytes:
    answer: dict[str, Any] = {"model_name": response.model_name, "model_version": response.model_version}
    if response.id:
        answer["id"] = response.id
    answer.update(response.parameters)
    finite = True
    for tensor in response.outputs:
        values = v2_tensors.decode_values(tensor)
        finite = finite and v2_tensors.has_only_finite(values, tensor.datatype)
        answer[tensor.name] = values[0] if len(values) == 1 else values
    ordered = dict(sorted(answer.items()))
    return msgspec.json.encode(ordered) if finite else encode_with_nan(ordered)
