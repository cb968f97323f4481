"""The route `infer` over HTTP: bytes in, the data plane, bytes out. Knows no socket."""

from __future__ import annotations

import re
from collections.abc import Mapping

from llmserve.api.http_protocol import MAX_LENGTH_DIGITS
from llmserve.api.v2_http_call import OCTETS, HttpAnswer, HttpCall
from llmserve.api.v2_infer_json import InferCall, raw_infer_call, read_infer_call, write_response
from llmserve.api.v2_settings import V2HttpSettings
from llmserve.backends.validation import datatype_name
from llmserve.errors import InferenceError, InvalidRequestError
from llmserve.inference import InferResponse
from llmserve.repository.data_plane import DataPlane, is_decoupled
from llmserve.repository.model_version import ResponseStream, Servable

_NUMBER = re.compile(b"-?[0-9]{1,%d}" % MAX_LENGTH_DIGITS)
_HEADER_LENGTH = b"inference-header-content-length"


async def infer(call: HttpCall, plane: DataPlane) -> HttpAnswer:
    """One request, one response. Raises LLMServeError."""
    find_single_response(call.model, call.version, plane)
    body = await call.read_body()
    infer_call = read_infer(call.model, call.version, call.headers, body, plane, call.settings)
    with call.watch():
        response = await single_response(plane.infer(infer_call.request), call.model)
    answer = write_infer(response, infer_call)
    if b"accept-encoding" in call.headers:
        encoding, compressed = await call.compress(answer.body, answer.parts)
        if encoding:
            answer.body, answer.parts = compressed, ()
            answer.headers.append((b"content-encoding", encoding))
    return answer


def find_single_response(model: str, version: str, plane: DataPlane) -> Servable:
    """What serves the model. Raises InferenceError for one that may answer any number of times."""
    served = plane.servable(model, version)
    if is_decoupled(served):
        text = "HTTP end point doesn't support models with decoupled transaction policy"
        if plane.is_language_model(model):
            text += (
                f": '{model}' is a language model, which answers POST /v1/chat/completions, and here "
                f"/v2/models/{model}/generate"
            )
        raise InferenceError(text, InferenceError.UNSUPPORTED)
    return served


async def single_response(responses: ResponseStream, model: str) -> InferResponse:
    """The first, which is the only one. Raises LLMServeError."""
    try:
        return await anext(aiter(responses))
    except StopAsyncIteration:
        raise InferenceError(f"model '{model}' gave no response") from None
    finally:
        await responses.aclose()


def write_infer(response: InferResponse, infer_call: InferCall) -> HttpAnswer:
    """The whole answer: JSON, and behind it the outputs asked for in binary."""
    head, buffers = write_response(response, infer_call)
    answer = HttpAnswer(head, parts=buffers)
    if buffers:
        answer.content_type = OCTETS
        answer.headers.append((_HEADER_LENGTH, b"%d" % len(head)))
    return answer


def read_infer(
    model: str, version: str, headers: Mapping[bytes, bytes], body: bytes, plane: DataPlane, settings: V2HttpSettings
) -> InferCall:
    """A request of any of the three forms: JSON, JSON and binary, raw. Raises InvalidRequestError, InferenceError."""
    declared = headers.get(_HEADER_LENGTH)
    if declared is None:
        if body:
            return read_infer_call(model, version, body, None, settings)
        return _raw_call(model, version, body, plane)  # Triton takes a request without a body as an empty tensor
    if not _NUMBER.fullmatch(declared):
        raise InvalidRequestError(
            f"the header Inference-Header-Content-Length must be a number, got: {declared[:64].decode('latin-1')!r}"
        )
    length = int(declared)
    if length == 0:
        return _raw_call(model, version, body, plane)
    if not 0 < length <= len(body):
        raise InvalidRequestError(f"inference header size should be in range (0, {len(body)}), got: {length}")
    return read_infer_call(model, version, body, length, settings)


def _raw_call(model: str, version: str, body: bytes, plane: DataPlane) -> InferCall:
    config = plane.model_config(model, version)
    if len(config.input) != 1:
        raise InvalidRequestError(
            f"[request id: <id_unknown>] Raw request must only have 1 input (found 1) to be deduced but got "
            f"{len(config.input)} inputs in '{model}' model configuration",
            "inputs",
        )
    only = config.input[0]
    batches = config.max_batch_size > 0
    raw = raw_infer_call(model, version, body, datatype_name(only.data_type), tuple(only.dims), batches)
    raw.request.inputs[0].name = only.name
    return raw
