"""One inference over HTTP: the body's JSON header and binary tensors to an InferRequest, an InferResponse to a body.

Knows no routes and no sockets. A typed pass of msgspec reads the usual request; what it refuses is read again by hand,
to say in Triton's words what is wrong, or to take what JSON lacks (NaN).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import msgspec

from llmserve.api import v2_tensors
from llmserve.api.v2_errors import TENSOR_IN_SHARED_MEMORY, MalformedRequestError
from llmserve.api.v2_json import encode_with_nan, parse_json_object
from llmserve.api.v2_parameters import CommonFields, read_parameters, unsigned
from llmserve.api.v2_settings import V2HttpSettings
from llmserve.errors import InferenceError, InvalidRequestError
from llmserve.inference import DATATYPE_SIZES, InferRequest, InferResponse, RequestedOutput, Tensor

UNKNOWN_DATATYPE = "<invalid>"  # what the check of an input against its model then says it got
_ONE_SOURCE = (
    "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
    "'shared_memory_region' in 'parameters'. But "
)
_NOTHING = msgspec.Raw(b"")


class _InputJson(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    data: msgspec.Raw = _NOTHING
    parameters: dict[str, Any] | None = None


class _OutputJson(msgspec.Struct):
    name: str
    parameters: dict[str, Any] | None = None


class _RequestJson(msgspec.Struct):
    inputs: list[_InputJson]
    id: str = ""
    parameters: dict[str, Any] = {}  # null is none, as Triton has it
    outputs: list[_OutputJson] | None = None


class _ResponseTensor(msgspec.Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, int] | None = None
    data: list[Any] | msgspec.UnsetType = msgspec.UNSET


class _ResponseJson(msgspec.Struct, omit_defaults=True):
    model_name: str
    model_version: str
    outputs: list[_ResponseTensor]
    parameters: dict[str, Any] | None = None


class _NamedResponseJson(msgspec.Struct, omit_defaults=True):
    id: str
    model_name: str
    model_version: str
    outputs: list[_ResponseTensor]
    parameters: dict[str, Any] | None = None


_decode_request = msgspec.json.Decoder(_RequestJson).decode
_encode = msgspec.json.Encoder().encode


@dataclass(slots=True)
class InferCall:
    """A request and how its answer is to be written: which outputs binary, the others by `binary_default`."""

    request: InferRequest
    binary_default: bool = False
    binary_outputs: dict[str, bool] | None = None

    def is_binary(self, output: str) -> bool:
        """Whether `output` travels as bytes behind the JSON."""
        if self.binary_outputs is None:
            return self.binary_default
        return self.binary_outputs.get(output, self.binary_default)


def read_infer_call(
    model: str, version: str, body: bytes, header_length: int | None, settings: V2HttpSettings
) -> InferCall:
    """An infer request. `header_length`: bytes of JSON at the body's start; None: all of it.

    Raises MalformedRequestError, InvalidRequestError.
    """
    if header_length is None:
        header, tensors = body, memoryview(b"")
    else:
        view = memoryview(body)
        header, tensors = bytes(view[:header_length]), view[header_length:]
    try:
        parsed = _decode_request(header)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        parsed = _read_slowly(header)
    _check_counts(parsed, settings)
    fields = read_parameters(parsed.parameters)
    request = InferRequest(
        model,
        _read_inputs(parsed.inputs, tensors, model, settings),
        version,
        parsed.id,
        [],
        fields.parameters,
        fields.priority,
        fields.timeout_us,
        fields.sequence_id,
        fields.sequence_start,
        fields.sequence_end,
    )
    call = InferCall(request, fields.binary_data_output)
    if parsed.outputs:
        call.binary_outputs = _read_outputs(parsed.outputs, request, fields)
    return call


def raw_infer_call(
    model: str, version: str, body: bytes, datatype: str, dims: tuple[int, ...], batches: bool
) -> InferCall:
    """A request whose whole body is the model's only input, of type `datatype` and configured shape `dims`.

    At most one of `dims` may vary: the body's length says how large it is. Raises InvalidRequestError.
    """
    if datatype == "BYTES":
        if math.prod(dims) != 1:
            raise InvalidRequestError(
                f"For BYTE datatype raw input 'raw_input', the model '{model}' must have input shape [1]", "inputs"
            )
        data: bytes = len(body).to_bytes(4, "little") + body
        shape = dims
    else:
        data = body
        shape = _deduce_shape(model, dims, len(body), DATATYPE_SIZES[datatype])
    if batches:
        shape = (1, *shape)
    return InferCall(InferRequest(model, [Tensor("", datatype, shape, data)], version), binary_default=True)


def write_response(response: InferResponse, call: InferCall) -> tuple[bytes, list[bytes | bytearray | memoryview]]:
    """The JSON of an answer and the buffers that follow it. Raises InvalidRequestError."""
    tensors: list[_ResponseTensor] = []
    buffers: list[bytes | bytearray | memoryview] = []
    finite = True
    for tensor in response.outputs:
        if call.is_binary(tensor.name):
            size = memoryview(tensor.data).nbytes
            tensors.append(_ResponseTensor(tensor.name, tensor.datatype, tensor.shape, {"binary_data_size": size}))
            if size:
                buffers.append(tensor.data)
        else:
            values = v2_tensors.decode_values(tensor)
            finite = finite and v2_tensors.has_only_finite(values, tensor.datatype)
            tensors.append(_ResponseTensor(tensor.name, tensor.datatype, tensor.shape, None, values))
    parameters = response.parameters or None
    answer: _ResponseJson | _NamedResponseJson
    if response.id:
        answer = _NamedResponseJson(response.id, response.model_name, response.model_version, tensors, parameters)
    else:
        answer = _ResponseJson(response.model_name, response.model_version, tensors, parameters)
    return (_encode(answer) if finite else encode_with_nan(msgspec.to_builtins(answer))), buffers


def _check_counts(parsed: _RequestJson, settings: V2HttpSettings) -> None:
    if len(parsed.inputs) > settings.max_inputs or len(parsed.outputs or ()) > settings.max_inputs:
        raise InvalidRequestError(f"a request has at most {settings.max_inputs} inputs and outputs", "inputs")
    if len(parsed.parameters) > settings.max_parameters:
        raise InvalidRequestError(f"a request has at most {settings.max_parameters} parameters", "parameters")


def _read_inputs(inputs: list[_InputJson], tensors: memoryview, model: str, settings: V2HttpSettings) -> list[Tensor]:
    """Binary inputs are cut from `tensors` in the order of `inputs`."""
    offset = 0
    read: list[Tensor] = []
    for item in inputs:
        shape = tuple(item.shape)
        if shape and min(shape) < 0:
            raise MalformedRequestError(_NOT_UNSIGNED.format("shape"), "shape")
        size = None if item.parameters is None else _binary_size(item)
        has_data = item.data is not _NOTHING
        if has_data is (size is not None):
            found = "set 'data' 'binary_data_size'" if has_data else "no field is set"
            raise InvalidRequestError(_ONE_SOURCE + found, item.name)
        datatype = item.datatype if item.datatype in DATATYPE_SIZES or item.datatype == "BYTES" else UNKNOWN_DATATYPE
        data: bytes | memoryview = b""
        if size is not None:
            data = tensors[offset : offset + size]
            if len(data) < size:
                missing = size - len(data)
                raise InvalidRequestError(
                    f"unexpected size for input '{item.name}', expecting {missing} additional bytes "
                    f"for model '{model}'",
                    item.name,
                )
            offset += size
        elif datatype is UNKNOWN_DATATYPE:
            raise InvalidRequestError(f"invalid datatype for input {item.name}", item.name)
        else:
            data = v2_tensors.decode_json(item.data, item.name, datatype, math.prod(shape), settings.max_json_depth)
        read.append(Tensor(item.name, datatype, shape, data))
    if offset != len(tensors):
        raise InvalidRequestError(f"unexpected additional input data for model '{model}'", "inputs")
    return read


def _binary_size(item: _InputJson) -> int | None:
    parameters = item.parameters
    assert parameters is not None
    if "shared_memory_region" in parameters:
        raise InferenceError(TENSOR_IN_SHARED_MEMORY.format(item.name), InferenceError.UNSUPPORTED)
    if "binary_data_size" not in parameters:
        return None
    return unsigned(parameters["binary_data_size"], "binary_data_size")


def _read_outputs(outputs: list[_OutputJson], request: InferRequest, fields: CommonFields) -> dict[str, bool]:
    """Adds the outputs to `request`; which of them are binary."""
    binary: dict[str, bool] = {}
    for item in outputs:
        if item.name in binary:
            raise InvalidRequestError(f"output '{item.name}' is requested more than once", "outputs")
        parameters = item.parameters or {}
        if "shared_memory_region" in parameters:
            raise InferenceError(TENSOR_IN_SHARED_MEMORY.format(item.name), InferenceError.UNSUPPORTED)
        wanted = parameters.get("binary_data", fields.binary_data_output)
        if not isinstance(wanted, bool):
            raise MalformedRequestError(
                "Unable to parse 'binary_data': attempt to access JSON non-boolean as boolean", item.name
            )
        classification = unsigned(parameters.get("classification", 0), "classification", "set")  # 0: not asked for
        binary[item.name] = wanted
        request.outputs.append(RequestedOutput(item.name, classification))
    return binary


_NOT_UNSIGNED = "Unable to parse '{}': attempt to access JSON non-unsigned-integer as unsigned-integer"


def _deduce_shape(model: str, dims: tuple[int, ...], num_bytes: int, element_size: int) -> tuple[int, ...]:
    variable = [position for position, dim in enumerate(dims) if dim < 0]
    if len(variable) > 1:
        raise InvalidRequestError(
            f"The shape of Raw input 'raw_input' can not be deduced because there are more than one variable-sized "
            f"dimension in model '{model}'",
            "inputs",
        )
    row = math.prod(dim for dim in dims if dim >= 0) * element_size
    filled = num_bytes // row if row else 0
    expected = row * filled if variable else row
    if expected != num_bytes:
        raise InvalidRequestError(
            f"[request id: <id_unknown>] input byte size mismatch for input 'raw_input' for model '{model}'. "
            f"Expected {expected}, got {num_bytes}",
            "inputs",
        )
    return tuple(filled if dim < 0 else dim for dim in dims)


# The slow way, for what the typed pass refused.


def _read_slowly(header: bytes) -> _RequestJson:
    """The same, field by field. Raises MalformedRequestError naming the first that is wrong."""
    value = parse_json_object(header)
    inputs = [_input_slowly(item) for item in _member(value, "inputs", list)]
    request = _RequestJson(inputs)
    if "id" in value:
        request.id = _member(value, "id", str)
    if "parameters" in value:
        if not isinstance(value["parameters"], dict):
            raise MalformedRequestError("failed to get request params.: attempt to get members for non-object")
        request.parameters = value["parameters"]
    if value.get("outputs") is not None:
        outputs = [(item, _member(item, "name", str)) for item in _member(value, "outputs", list)]
        request.outputs = [_OutputJson(name, _parameters(item)) for item, name in outputs]
    return request


def _input_slowly(item: Any) -> _InputJson:
    name = _member(item, "name", str)
    datatype = _member(item, "datatype", str)
    shape = _member(item, "shape", list)
    if not all(isinstance(dim, int) and not isinstance(dim, bool) and dim >= 0 for dim in shape):
        raise MalformedRequestError(_NOT_UNSIGNED.format("shape"), "shape")
    data = msgspec.Raw(json.dumps(item["data"]).encode()) if "data" in item else _NOTHING
    return _InputJson(name, datatype, shape, data, _parameters(item))


def _parameters(item: dict[str, Any]) -> dict[str, Any] | None:
    parameters = item.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise MalformedRequestError("Unable to parse 'parameters': attempt to get members for non-object", "parameters")
    return parameters


_JSON_TYPES: dict[type, str] = {list: "array", str: "string"}


def _member(value: Any, key: str, wanted: type) -> Any:
    if not isinstance(value, dict) or key not in value:
        raise MalformedRequestError(
            f"Unable to parse '{key}': attempt to access non-existing object member '{key}'", key
        )
    if not isinstance(value[key], wanted):
        kind = _JSON_TYPES[wanted]
        raise MalformedRequestError(f"Unable to parse '{key}': attempt to access JSON non-{kind} as {kind}", key)
    return value[key]
