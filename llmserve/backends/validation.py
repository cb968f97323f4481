"""Whether a request fits a model's configuration, and how it is to be batched. Knows no process and no HTTP.

The texts are Triton's, because its clients look for them. Where several inputs are wrong it names the last one first;
so does this.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInput, ModelOutput

from llmserve.errors import InvalidRequestError
from llmserve.inference import DATATYPE_SIZES, InferRequest, Tensor

_BATCH_NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try "
    "setting max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)
_LENGTH = struct.Struct("<I")
_MAX_KNOWN = 256


@dataclass(slots=True)
class ModelTensor:
    """One tensor as the model gets it: reshaped as the configuration says."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview
    ragged: bool
    pad_axis: int = 0  # the dimension that is padded, if any
    pad_to: int = 0

    @property
    def row_shape(self) -> tuple[int, ...] | None:
        """What is equal for tensors that may be batched."""
        if self.ragged:
            return None
        if self.pad_to:
            return (*self.shape[1 : self.pad_axis], self.pad_to, *self.shape[self.pad_axis + 1 :])
        return self.shape[1:]


@dataclass(slots=True)
class CheckedRequest:
    """A request that fits. Those with equal keys may share a batch."""

    rows: int
    shape_key: Hashable
    inputs: list[ModelTensor]
    length: int = 0  # of its longest input that varies in one dimension
    padded_length: int = 0

    def with_data(self, data: Sequence[bytes | bytearray | memoryview]) -> CheckedRequest:
        """The same for a request that differs in nothing but its tensors' data."""
        tensors = [
            ModelTensor(own.name, own.datatype, own.shape, buffer, own.ragged, own.pad_axis, own.pad_to)
            for own, buffer in zip(self.inputs, data, strict=True)
        ]
        return CheckedRequest(self.rows, self.shape_key, tensors, self.length, self.padded_length)


class InputSpec:
    """One input of a configuration, ready to be compared with."""

    __slots__ = ("datatype", "dims", "element_bytes", "is_ragged", "length_axis", "name", "optional", "reshaped")

    def __init__(self, config: ModelInput) -> None:
        self.name = config.name
        self.datatype = datatype_name(config.data_type)
        self.element_bytes = DATATYPE_SIZES.get(self.datatype, 0)
        self.dims = tuple(config.dims)
        self.reshaped = tuple(config.reshape.shape) if config.HasField("reshape") else None
        self.optional = config.optional
        self.is_ragged = config.allow_ragged_batch
        model_dims = self.dims if self.reshaped is None else self.reshaped
        # of the batched tensor: its one dimension that varies beside the batch
        self.length_axis = model_dims.index(-1) + 1 if model_dims.count(-1) == 1 and not self.is_ragged else 0

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a shape without its batch dimension is one of those the model takes."""
        if shape == self.dims:
            return True
        return len(shape) == len(self.dims) and all(
            want in (-1, got) for want, got in zip(self.dims, shape, strict=True)
        )


class RequestValidator:
    """Checks the requests of one model. With `buckets`, lengths are rounded up to one of them, so that they meet."""

    def __init__(self, config: ModelConfig, buckets: Sequence[int] = ()) -> None:
        self._buckets = buckets
        self._model = config.name
        self._max_batch_size = config.max_batch_size
        self._inputs = {tensor.name: InputSpec(tensor) for tensor in config.input}
        self._required = [name for name, spec in self._inputs.items() if not spec.optional]
        self._outputs = {tensor.name for tensor in config.output}
        # requests that fit, by all that was looked at: most that come are like one that came before
        self._known: dict[Hashable, CheckedRequest] = {}

    def check(self, request: InferRequest) -> CheckedRequest:
        """Raises InvalidRequestError, which names the input or output."""
        if request.parameters or request.timeout_us or request.priority or request.sequence_id:
            return self._check(request)
        look = (
            tuple([(tensor.name, tensor.datatype, tensor.shape, len(tensor.data)) for tensor in request.inputs]),
            tuple([output.name for output in request.outputs]),
        )
        known = self._known.get(look)
        if known is not None:
            return known.with_data([tensor.data for tensor in request.inputs])
        checked = self._check(request)
        if not any(tensor.datatype == "BYTES" for tensor in request.inputs):  # whose lengths stand in their data
            if len(self._known) == _MAX_KNOWN:
                self._known.clear()
            self._known[look] = checked.with_data([b""] * len(checked.inputs))
        return checked

    def _check(self, request: InferRequest) -> CheckedRequest:
        for output in request.outputs:
            if output.name not in self._outputs:
                raise InvalidRequestError(
                    f"unexpected inference output '{output.name}' for model '{self._model}'", "outputs"
                )
        _check_numbers(request)
        _check_names(request)
        if not len(self._required) <= len(request.inputs) <= len(self._inputs):
            raise self._wrong_count(request)
        rows = self._check_batch(request) if self._max_batch_size else 1
        tensors = [self._check_tensor(request, tensor, rows) for tensor in reversed(request.inputs)]
        names = {tensor.name for tensor in tensors}
        if len(names) < len(self._inputs) and any(name not in names for name in self._required):
            raise self._wrong_count(request)
        tensors.reverse()
        checked = CheckedRequest(rows, None, tensors)
        if self._max_batch_size:
            for tensor in tensors:
                self._pad(tensor, checked)
            checked.shape_key = self._shape_key(tensors)
        return checked

    def _pad(self, tensor: ModelTensor, checked: CheckedRequest) -> None:
        """What the tensor's length is, and what it is padded to."""
        axis = self._inputs[tensor.name].length_axis
        if not axis:
            return
        length = tensor.shape[axis]
        padded = next((bucket for bucket in self._buckets if bucket >= length), length)
        if self._buckets:
            tensor.pad_axis, tensor.pad_to = axis, padded
        checked.length = max(checked.length, length)
        checked.padded_length = max(checked.padded_length, padded)

    def _check_batch(self, request: InferRequest) -> int:
        """The request's rows: the first dimension of every input."""
        rows: int | None = None
        for tensor in reversed(request.inputs):
            self._spec_of(request, tensor)
            if not tensor.shape:
                raise self._invalid(
                    request,
                    f"input '{tensor.name}' has no shape but model requires batch dimension for '{self._model}'",
                )
            if rows is None:
                rows = tensor.shape[0]
            elif rows != tensor.shape[0]:
                raise self._invalid(
                    request, f"input '{tensor.name}' batch size does not match other inputs for '{self._model}'"
                )
        if rows is not None and rows > self._max_batch_size:
            raise self._invalid(
                request, f"inference request batch-size must be <= {self._max_batch_size} for '{self._model}'"
            )
        return rows or 1

    def _spec_of(self, request: InferRequest, tensor: Tensor) -> InputSpec:
        spec = self._inputs.get(tensor.name)
        if spec is None:
            raise InvalidRequestError(
                f"unexpected inference input '{tensor.name}' for model '{self._model}'", f"inputs.{tensor.name}"
            )
        if tensor.datatype != spec.datatype:
            raise self._invalid(
                request,
                f"inference input '{tensor.name}' data-type is '{tensor.datatype}', "
                f"but model '{self._model}' expects '{spec.datatype}'",
                tensor.name,
            )
        return spec

    def _check_tensor(self, request: InferRequest, tensor: Tensor, rows: int) -> ModelTensor:
        spec = self._spec_of(request, tensor)
        batches = bool(self._max_batch_size)
        shape = tensor.shape[1:] if batches else tensor.shape
        if not spec.fits(shape):
            expected = ((-1,) if batches else ()) + spec.dims
            raise self._invalid(
                request,
                f"unexpected shape for input '{tensor.name}' for model '{self._model}'. "
                f"Expected {_listed(expected)}, got {_listed(tensor.shape)}. {_BATCH_NOTE if batches else ''}",
                tensor.name,
            )
        if min(shape, default=0) < 0:
            raise self._invalid(request, f"input '{tensor.name}' has a negative dimension", tensor.name)
        num_elements = rows * math.prod(shape)
        if spec.element_bytes:
            if len(tensor.data) != (expected_bytes := num_elements * spec.element_bytes):
                raise self._invalid(
                    request,
                    f"input byte size mismatch for input '{tensor.name}' for model '{self._model}'. "
                    f"Expected {expected_bytes}, got {len(tensor.data)}",
                    tensor.name,
                )
        else:
            _check_bytes(tensor, num_elements)
        if spec.reshaped is not None:
            shape = reshape(shape, spec.dims, spec.reshaped)
        return ModelTensor(
            spec.name, spec.datatype, (rows, *shape) if batches else shape, tensor.data, spec.is_ragged and batches
        )

    def _shape_key(self, tensors: list[ModelTensor]) -> Hashable:
        """Two requests with equal keys have the same inputs, and but for ragged ones of the same shapes per row."""
        if len(tensors) == 1:
            return tensors[0].name, tensors[0].row_shape
        return frozenset((tensor.name, tensor.row_shape) for tensor in tensors)

    def _wrong_count(self, request: InferRequest) -> InvalidRequestError:
        got = [tensor.name for tensor in reversed(request.inputs)]
        missing = [name for name in self._required if name not in got]
        most, least = len(self._inputs), len(self._required)
        expected = (
            f"expected {most} inputs" if most == least else f"expected number of inputs between {least} and {most}"
        )
        return self._invalid(
            request,
            f"{expected} but got {len(got)} inputs for model '{self._model}'. Got input(s) {_quoted(got)}, "
            f"but missing required input(s) {_quoted(missing)}. Please provide all required input(s).",
        )

    def _invalid(self, request: InferRequest, text: str, name: str = "") -> InvalidRequestError:
        prefix = f"[request id: {request.id or '<id_unknown>'}] "
        return InvalidRequestError(prefix + text, f"inputs.{name}" if name else "inputs")


class OutputReshaper:
    """Gives the outputs of a model the shapes its configuration promises to clients (`reshape`)."""

    def __init__(self, config: ModelConfig) -> None:
        self._batches = bool(config.max_batch_size)
        self._specs: dict[str, ModelOutput] = {
            output.name: output for output in config.output if output.HasField("reshape")
        }

    def __call__(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape for the client of a tensor the model made with `shape`."""
        spec = self._specs.get(name)
        if spec is None:
            return tuple(shape)
        first = int(self._batches)
        return (*shape[:first], *reshape(tuple(shape[first:]), tuple(spec.reshape.shape), tuple(spec.dims)))


def reshape(shape: tuple[int, ...], dims: tuple[int, ...], reshaped: tuple[int, ...]) -> tuple[int, ...]:
    """`shape`, an instance of `dims`, as an instance of `reshaped`: the k-th -1 of one is the k-th of the other."""
    varying = iter([size for size, dim in zip(shape, dims, strict=False) if dim == -1])
    return tuple(next(varying, -1) if dim == -1 else dim for dim in reshaped)


def datatype_name(data_type: int) -> str:
    """TYPE_FP32 -> FP32, TYPE_STRING -> BYTES."""
    name = DataType.Name(data_type).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name


def _check_names(request: InferRequest) -> None:
    """Every input once."""
    if len(request.inputs) > 1:
        seen: set[str] = set()
        for tensor in request.inputs:
            if tensor.name in seen:
                prefix = f"[request id: {request.id or '<id_unknown>'}] "
                raise InvalidRequestError(f"{prefix}input '{tensor.name}' already exists in request", "inputs")
            seen.add(tensor.name)


def _check_numbers(request: InferRequest) -> None:
    """All that go to the model's process fit into 64 bits."""
    numbers = {"timeout": request.timeout_us, "priority": request.priority, "sequence_id": request.sequence_id}
    for name, number in (*request.parameters.items(), *numbers.items()):
        if type(number) is int and not -(1 << 63) <= number < 1 << 64:
            raise InvalidRequestError(f"parameter '{name}' is {number}, which does not fit into 64 bits", name)


def _check_bytes(tensor: Tensor, num_elements: int) -> None:
    """Walks over the lengths: an element cut short would spoil the batch it is put into."""
    position, end, count = 0, len(tensor.data), 0
    while position < end:
        if end - position < 4:
            raise InvalidRequestError(
                f"incomplete string length indicator for inference input '{tensor.name}', "
                f"expecting 4 bytes but only {end - position} bytes available",
                f"inputs.{tensor.name}",
            )
        (length,) = _LENGTH.unpack_from(tensor.data, position)
        position += 4
        if end - position < length:
            raise InvalidRequestError(
                f"incomplete string data for inference input '{tensor.name}', "
                f"expecting string of length {length} but only {end - position} bytes available",
                f"inputs.{tensor.name}",
            )
        position += length
        count += 1
    if count != num_elements:
        raise InvalidRequestError(
            f"unexpected number of string elements {count} for inference input '{tensor.name}', "
            f"expecting {num_elements}",
            f"inputs.{tensor.name}",
        )


def _listed(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _quoted(names: Sequence[str]) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"
