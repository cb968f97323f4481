"""The ONNX Runtime backend: `model.onnx`, its signature read from the file. Knows no process and no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime

from llmserve.backends.base import Backend, Batch, ModelContext, Response
from llmserve.backends.model_messages import Signature, TensorSpec
from llmserve.backends.signatures import batched_signature, check_against_config, without_batch_dimension
from llmserve.backends.tensors import Array
from llmserve.errors import InferenceError, InvalidRequestError, ModelLoadError

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
# it raises a class of its own for each status, by no common root
_ERRORS = tuple(
    value
    for value in vars(onnxruntime.capi.onnxruntime_pybind11_state).values()
    if isinstance(value, type) and issubclass(value, Exception)
)
_OPTIMIZATION = {
    "-1": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "1": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "2": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
}


class OnnxRuntimeBackend(Backend):
    """One session. `parameters` may set Triton's intra_op_thread_count, inter_op_thread_count, execution_mode (0, 1)
    and enable_mem_arena.
    """

    def __init__(self) -> None:
        self._session: Any = None
        self._outputs: list[str] = []
        self._strings: frozenset[str] = frozenset()

    def auto_complete(self, model: ModelContext) -> Signature | None:
        """Inputs and outputs as the file has them; batches if the first dimension of all of them varies."""
        session = self._open(model)
        inputs = [_spec(value, "input") for value in session.get_inputs()]
        outputs = [_spec(value, "output") for value in session.get_outputs()]
        check_against_config(model, inputs, outputs)
        if model.config.get("input") or model.config.get("output"):
            batches = bool(model.config.get("max_batch_size"))
            return Signature(
                inputs=None if model.config.get("input") else without_batch_dimension(inputs, batches),
                outputs=None if model.config.get("output") else without_batch_dimension(outputs, batches),
            )
        return batched_signature(model, inputs, outputs)

    def load(self, model: ModelContext) -> None:
        """Opens the session, if `auto_complete` has not, and checks it against the configuration."""
        session = self._open(model)
        inputs = [_spec(value, "input") for value in session.get_inputs()]
        outputs = [_spec(value, "output") for value in session.get_outputs()]
        check_against_config(model, inputs, outputs)
        self._outputs = [output["name"] for output in model.config["output"]]
        self._strings = frozenset(spec.name for spec in inputs if spec.datatype == "BYTES")
        self.device = "cuda" if "CUDAExecutionProvider" in session.get_providers() else "cpu"

    def execute(self, batch: Batch) -> Sequence[Response]:
        """One run for the whole batch, of the outputs that anybody wants."""
        feeds = batch.stacked()
        for name in self._strings & feeds.keys():
            feeds = {**feeds, name: _text(name, feeds[name])}
        wanted = self._wanted(batch)
        try:
            values = self._session.run(wanted, feeds)
        except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument as error:
            raise InferenceError(f"onnx runtime error: {error}", InferenceError.INVALID_ARG) from error
        return batch.split(dict(zip(wanted, values, strict=True)))

    def unload(self) -> None:
        """Closes the session."""
        self._session = None

    def _wanted(self, batch: Batch) -> list[str]:
        wanted: set[str] = set()
        for request in batch.requests:
            if not request.header.outputs:
                return self._outputs
            wanted.update(request.header.outputs)
        return [name for name in self._outputs if name in wanted]

    def _open(self, model: ModelContext) -> Any:
        """The session, made once. Raises ModelLoadError with what ONNX Runtime says."""
        if self._session is None:
            path = model.file("model.onnx")
            try:
                self._session = onnxruntime.InferenceSession(str(path), _options(model), providers=_providers(model))
            except _ERRORS as error:
                raise ModelLoadError(f"{path} cannot be loaded: {error}") from error
        return self._session


def _options(model: ModelContext) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(model.parameter("intra_op_thread_count", "0")) or model.num_threads
    options.inter_op_num_threads = int(model.parameter("inter_op_thread_count", "0")) or 1
    if model.parameter("execution_mode", "0") == "1":
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    options.enable_cpu_mem_arena = model.parameter("enable_mem_arena", "1") != "0"
    # threads that spin between requests take the cores other models need
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    level = str(model.config.get("optimization", {}).get("graph", {}).get("level", "0"))
    if level in _OPTIMIZATION:
        options.graph_optimization_level = _OPTIMIZATION[level]
    return options


def _providers(model: ModelContext) -> list[Any]:
    """CUDA where it is asked for or, for AUTO and MODEL, where there is one. Raises ModelLoadError."""
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if model.kind == "GPU" and not has_cuda:
        raise ModelLoadError(
            f"Model {model.name!r} asks for a GPU (instance_group.kind KIND_GPU), and this ONNX Runtime has no "
            "CUDAExecutionProvider. Install onnxruntime-gpu, or set KIND_CPU."
        )
    if model.kind == "CPU" or not has_cuda:
        return ["CPUExecutionProvider"]
    return [("CUDAExecutionProvider", {"device_id": model.device_id}), "CPUExecutionProvider"]


def _spec(value: Any, kind: str) -> TensorSpec:
    """An input or output of the file. Raises ModelLoadError for what is no tensor of a datatype v2 has."""
    datatype = _DATATYPES.get(value.type)
    if datatype is None:
        advice = (
            "export the model without ZipMap (skl2onnx: options={'zipmap': False})"
            if "seq" in value.type or "map" in value.type
            else "export the model with another type there"
        )
        raise ModelLoadError(f"The {kind} {value.name!r} is a {value.type}, which cannot be served: {advice}.")
    shape = [size if isinstance(size, int) and size >= 0 else -1 for size in value.shape or ()]
    return TensorSpec(value.name, datatype, shape)


def _text(name: str, array: Array) -> Array:
    """ONNX strings are text. Raises InvalidRequestError for bytes that are not UTF-8."""
    try:
        return np.array([element.decode() for element in array.reshape(-1)], dtype=object).reshape(array.shape)
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"input '{name}' holds a string that is not UTF-8: {error}", name) from error
