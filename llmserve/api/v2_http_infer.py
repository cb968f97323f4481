"""The route `infer` over HTTP: bytes in, the data plane, bytes out. Knows no socket."""

from __future__ import annotations

from llmserve.api.v2_http_call import OCTETS, HttpAnswer, HttpCall
from llmserve.api.v2_infer_json import InferCall, raw_infer_call, read_infer_call, write_response
from llmserve.backends.validation import datatype_name
from llmserve.errors import InferenceError, InvalidRequestError
from llmserve.inference import InferResponse
from llmserve.repository.data_plane import DataPlane

_HEADER_LENGTH = b"inference-header-content-length"


async def infer(call: HttpCall, plane: DataPlane) -> HttpAnswer:
    """One request, one response. Raises LLMServeError."""
    if plane.is_decoupled(call.model, call.version):
        raise InferenceError(
            "HTTP end point doesn't support models with decoupled transaction policy", InferenceError.UNSUPPORTED
        )
    body = await call.read_body()
    infer_call = _read(call, body, plane)
    with call.watch():
        response = await _single_response(plane, infer_call)
    head, buffers = write_response(response, infer_call)
    answer = HttpAnswer(head, parts=buffers)
    if buffers:
        answer.content_type = OCTETS
        answer.headers.append((_HEADER_LENGTH, b"%d" % len(head)))
    if b"accept-encoding" in call.headers:
        encoding, compressed = await call.compress(head, buffers)
        if encoding:
            answer.body, answer.parts = compressed, ()
            answer.headers.append((b"content-encoding", encoding))
    return answer


async def _single_response(plane: DataPlane, infer_call: InferCall) -> InferResponse:
    responses = plane.infer(infer_call.request)
    try:
        return await anext(responses)
    except StopAsyncIteration:
        raise InferenceError(f"model '{infer_call.request.model_name}' gave no response") from None
    finally:
        await responses.aclose()


def _read(call: HttpCall, body: bytes, plane: DataPlane) -> InferCall:
    declared = call.headers.get(_HEADER_LENGTH)
    if declared is None:
        if body:
            return read_infer_call(call.model, call.version, body, None, call.settings)
        return _raw_call(call, body, plane)  # Triton takes a request without a body as a tensor without elements
    try:
        length = int(declared)
    except ValueError:
        raise InvalidRequestError(
            f"the header Inference-Header-Content-Length must be a number, got: {declared[:64].decode('latin-1')!r}"
        ) from None
    if length == 0:
        return _raw_call(call, body, plane)
    if not 0 < length <= len(body):
        raise InvalidRequestError(f"inference header size should be in range (0, {len(body)}), got: {length}")
    return read_infer_call(call.model, call.version, body, length, call.settings)


def _raw_call(call: HttpCall, body: bytes, plane: DataPlane) -> InferCall:
    config = plane.model_config(call.model, call.version)
    if len(config.input) != 1:
        raise InvalidRequestError(
            f"[request id: <id_unknown>] Raw request must only have 1 input (found 1) to be deduced but got "
            f"{len(config.input)} inputs in '{call.model}' model configuration",
            "inputs",
        )
    only = config.input[0]
    batches = config.max_batch_size > 0
    raw = raw_infer_call(call.model, call.version, body, datatype_name(only.data_type), tuple(only.dims), batches)
    raw.request.inputs[0].name = only.name
    return raw
