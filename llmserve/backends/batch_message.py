"""A batch of requests as the message to a model's process, and its answer as a response. Tensors stay buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmserve.backends.infer_stream import InferStream
from llmserve.backends.model_messages import BatchTensor, ExecuteBatch, RequestHeader, ResponseEntry
from llmserve.backends.transport import Payload, PayloadReader
from llmserve.backends.validation import ModelTensor
from llmserve.errors import InferenceError, LLMServeError, ModelExecutionError
from llmserve.inference import InferResponse, Tensor

_SEQUENCE_START, _SEQUENCE_END = 1, 2


def batch_message(batch_id: int, streams: Sequence[InferStream], model_batches: bool) -> tuple[ExecuteBatch, Payload]:
    """The message and its tensors. All requests have the same inputs, and but for ragged ones of the same shapes."""
    payload = Payload()
    inputs: list[BatchTensor] = []
    for position, tensor in enumerate(streams[0].checked.inputs):
        tensors = [tensor] if len(streams) == 1 else [_input_at(stream, position, tensor.name) for stream in streams]
        inputs.append(_batch_tensor(tensors, payload, model_batches))
    return ExecuteBatch(batch_id, [_header(stream) for stream in streams], inputs), payload


def _input_at(stream: InferStream, position: int, name: str) -> ModelTensor:
    """The input of that name, which clients mostly send in the same place."""
    inputs = stream.checked.inputs
    if inputs[position].name == name:
        return inputs[position]
    return next(tensor for tensor in inputs if tensor.name == name)


def _batch_tensor(tensors: list[ModelTensor], payload: Payload, model_batches: bool) -> BatchTensor:
    """The requests' tensors of one name, one after the other."""
    payload.align()
    start = payload.num_bytes
    for tensor in tensors:
        payload.add(tensor.data)
    num_bytes = payload.num_bytes - start
    first = tensors[0]
    if first.ragged:
        return BatchTensor(first.name, first.datatype, [-1], num_bytes, [list(tensor.shape) for tensor in tensors])
    if first.pad_to and any(tensor.shape[first.pad_axis] != first.pad_to for tensor in tensors):
        shapes = [list(tensor.shape) for tensor in tensors]
        return BatchTensor(first.name, first.datatype, [-1], num_bytes, shapes, first.pad_axis, first.pad_to)
    shape = list(first.shape)
    if model_batches:
        shape[0] = sum(tensor.shape[0] for tensor in tensors)
    return BatchTensor(first.name, first.datatype, shape, num_bytes)


def _header(stream: InferStream) -> RequestHeader:
    request = stream.request
    return RequestHeader(
        stream.id,
        stream.checked.rows,
        request.id,
        [output.name for output in request.outputs],
        request.parameters,
        request.sequence_id,
        _SEQUENCE_START * request.sequence_start + _SEQUENCE_END * request.sequence_end,
        request.timeout_us,
    )


def read_response(
    entry: ResponseEntry,
    reader: PayloadReader,
    model: str,
    version: str,
    reshape: Callable[[str, Sequence[int]], tuple[int, ...]],
    request_id: str = "",
) -> InferResponse | LLMServeError:
    """What a model answered; the outputs look into the frame that brought them. Raises ValueError if it is short."""
    if entry.error is not None:
        code, text = entry.error
        return InferenceError(text, code) if code else ModelExecutionError(text)
    outputs = [
        Tensor(output.name, output.datatype, reshape(output.name, output.shape), reader.take(output.num_bytes))
        for output in entry.outputs
    ]
    return InferResponse(model, version, outputs, request_id, entry.parameters, entry.final)
