"""One inference over gRPC: ModelInferRequest to InferRequest, InferResponse to ModelInferResponse. Knows no server."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Mapping
from typing import Any

from tritonclient.grpc import service_pb2

from llmserve.api.v2_errors import TENSOR_IN_SHARED_MEMORY
from llmserve.api.v2_infer_json import UNKNOWN_DATATYPE
from llmserve.api.v2_parameters import RESERVED_PREFIX, read_common
from llmserve.errors import InferenceError, InvalidRequestError
from llmserve.inference import DATATYPE_SIZES, InferRequest, InferResponse, Parameter, RequestedOutput, Tensor

FINAL = "triton_final_response"
_EMPTY_FINAL = "triton_enable_empty_final_response"
_RESERVED = (
    "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys starting with "
    f"'triton_' are allowed: {_EMPTY_FINAL}"
)

# (field of InferTensorContents, the datatype it is named after in errors, array code of each datatype it carries)
_CONTENTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("bool_contents", "BOOL", {"BOOL": "B"}),
    ("int_contents", "INT32", {"INT8": "b", "INT16": "h", "INT32": "i"}),
    ("int64_contents", "INT64", {"INT64": "q"}),
    ("uint_contents", "UINT32", {"UINT8": "B", "UINT16": "H", "UINT32": "I"}),
    ("uint64_contents", "UINT64", {"UINT64": "Q"}),
    ("fp32_contents", "FP32", {"FP32": "f"}),
    ("fp64_contents", "FP64", {"FP64": "d"}),
    ("bytes_contents", "BYTES", {"BYTES": ""}),
)
_LENGTH = struct.Struct("<I")
_MAX_COUNT = 1024  # inputs, outputs, parameters of one request


def read_request(message: service_pb2.ModelInferRequest) -> tuple[InferRequest, bool]:
    """The request, and whether an empty final response is wanted. Raises InvalidRequestError, InferenceError."""
    for field in ("inputs", "outputs", "parameters"):
        if len(getattr(message, field)) > _MAX_COUNT:
            raise InvalidRequestError(f"a request has at most {_MAX_COUNT} {field}", field)
    request = InferRequest(message.model_name, _read_inputs(message), message.model_version, message.id)
    wants_final = _read_parameters(message.parameters, request) if message.parameters else False
    names: set[str] = set()
    for output in message.outputs:
        if output.name in names:
            raise InvalidRequestError(f"output '{output.name}' is requested more than once", "outputs")
        names.add(output.name)
        request.outputs.append(RequestedOutput(output.name, _classification(output)))
    return request, wants_final


def write_response(response: InferResponse) -> service_pb2.ModelInferResponse:
    """All outputs in `raw_output_contents`, in their order."""
    message = service_pb2.ModelInferResponse(
        model_name=response.model_name, model_version=response.model_version, id=response.id
    )
    for tensor in response.outputs:
        message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_output_contents.append(bytes(tensor.data))
    for key, value in response.parameters.items():
        _set_parameter(message.parameters[key], value)
    return message


def parameter_value(parameter: service_pb2.InferParameter) -> Parameter:
    """What an InferParameter holds. Raises InvalidRequestError if it holds nothing."""
    kind = parameter.WhichOneof("parameter_choice")
    if kind is None:
        raise InvalidRequestError("a parameter has no value: set one of bool, int64, string, double and uint64")
    value: Parameter = getattr(parameter, kind)
    return value


def _set_parameter(parameter: service_pb2.InferParameter, value: Parameter) -> None:
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        if value < 2**63:
            parameter.int64_param = value
        else:
            parameter.uint64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = value


def _read_inputs(message: service_pb2.ModelInferRequest) -> list[Tensor]:
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise InvalidRequestError(
            f"raw_input_contents must hold one entry for each input: got {len(raw)} for {len(message.inputs)} inputs "
            f"of model '{message.model_name}'",
            "raw_input_contents",
        )
    tensors = []
    for position, item in enumerate(message.inputs):
        if item.parameters and "shared_memory_region" in item.parameters:
            raise InferenceError(TENSOR_IN_SHARED_MEMORY.format(item.name), InferenceError.UNSUPPORTED)
        shape = tuple(item.shape)
        datatype = item.datatype
        if datatype not in DATATYPE_SIZES and datatype != "BYTES":
            datatype = UNKNOWN_DATATYPE
        if raw:
            if item.HasField("contents"):
                raise InvalidRequestError(
                    f"contents field must not be specified when using raw_input_contents for '{item.name}' for model "
                    f"'{message.model_name}'",
                    item.name,
                )
            data: bytes = raw[position]
        else:
            data = _read_contents(item, datatype, shape, message.model_name)
        tensors.append(Tensor(item.name, datatype, shape, data))
    return tensors


def _read_contents(item: Any, datatype: str, shape: tuple[int, ...], model: str) -> bytes:
    """The typed `contents` of an input as its buffer."""
    if datatype == UNKNOWN_DATATYPE:
        return b""
    for field, named, codes in _CONTENTS:
        values = getattr(item.contents, field)
        if not values:
            continue
        if datatype not in codes:
            raise InvalidRequestError(
                f"unexpected explicit tensor data for input tensor '{item.name}' for model '{model}' of type "
                f"'{named}', expected datatype '{datatype}'",
                item.name,
            )
        if len(values) != math.prod(shape):
            raise InvalidRequestError(
                f"unexpected number of elements {len(values)} for input '{item.name}' for model '{model}', "
                f"expecting {math.prod(shape)}",
                item.name,
            )
        if datatype == "BYTES":
            return b"".join([_LENGTH.pack(len(value)) + value for value in values])
        try:
            return array(codes[datatype], values).tobytes()
        except OverflowError:
            raise InvalidRequestError(
                f"input '{item.name}' has a value out of the range of {datatype}", item.name
            ) from None
    return b""


def _read_parameters(parameters: Mapping[str, service_pb2.InferParameter], request: InferRequest) -> bool:
    """Fills in `request`; whether an empty final response is wanted."""
    wants_final = False
    for key, parameter in parameters.items():
        value = parameter_value(parameter)
        if read_common(request, key, value, _WORDING):
            continue
        if key == _EMPTY_FINAL:
            wants_final = _boolean(value, key)
        elif key.startswith(RESERVED_PREFIX):
            raise InvalidRequestError(_RESERVED, key)
        else:
            request.parameters[key] = value
    return wants_final


def _classification(output: Any) -> int:
    if not output.parameters:
        return 0
    if "shared_memory_region" in output.parameters:
        raise InferenceError(TENSOR_IN_SHARED_MEMORY.format(output.name), InferenceError.UNSUPPORTED)
    if "classification" not in output.parameters:
        return 0
    count = _unsigned(parameter_value(output.parameters["classification"]), "classification")
    if not count:
        raise InvalidRequestError(f"'classification' of output '{output.name}' must be at least 1", output.name)
    return count


def _unsigned(value: Any, key: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise InvalidRequestError(f"invalid value type for '{key}' parameter, expected a non-negative integer", key)


def _boolean(value: Any, key: str) -> bool:
    if isinstance(value, bool):
        return value
    raise InvalidRequestError(f"invalid value type for '{key}' parameter, expected bool_param.", key)


class _GrpcWording:
    unsigned = staticmethod(_unsigned)
    boolean = staticmethod(_boolean)


_WORDING = _GrpcWording()
