"""`triton_python_backend_utils`, as models written for Triton Inference Server import it: their `pb_utils`.

The module that such a model finds under that name, so that it runs here unmodified. It knows no process.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmserve.backends.python_config import ModelConfig
from llmserve.backends.python_metrics import Metric, MetricFamily
from llmserve.backends.python_request import (
    TRITONSERVER_MEMORY_CPU,
    TRITONSERVER_MEMORY_GPU,
    TRITONSERVER_REQUEST_FLAG_SEQUENCE_END,
    TRITONSERVER_REQUEST_FLAG_SEQUENCE_START,
    TRITONSERVER_REQUEST_RELEASE_ALL,
    TRITONSERVER_REQUEST_RELEASE_RESCHEDULE,
    TRITONSERVER_RESPONSE_COMPLETE_FINAL,
    InferenceRequest,
    InferenceResponse,
    InferenceResponseSender,
    PreferredMemory,
    TritonError,
)
from llmserve.backends.python_tensor import Tensor, TritonModelException
from llmserve.backends.tensors import DTYPES, Array, datatype_of, decode_bytes, encode_bytes

__all__ = [
    "TRITONSERVER_MEMORY_CPU",
    "TRITONSERVER_MEMORY_GPU",
    "TRITONSERVER_REQUEST_FLAG_SEQUENCE_END",
    "TRITONSERVER_REQUEST_FLAG_SEQUENCE_START",
    "TRITONSERVER_REQUEST_RELEASE_ALL",
    "TRITONSERVER_REQUEST_RELEASE_RESCHEDULE",
    "TRITONSERVER_RESPONSE_COMPLETE_FINAL",
    "InferenceRequest",
    "InferenceResponse",
    "InferenceResponseSender",
    "Logger",
    "Metric",
    "MetricFamily",
    "ModelConfig",
    "PreferredMemory",
    "Tensor",
    "TritonError",
    "TritonModelException",
    "deserialize_bytes_tensor",
    "get_input_config_by_name",
    "get_input_tensor_by_name",
    "get_output_config_by_name",
    "get_output_tensor_by_name",
    "is_model_ready",
    "load_model",
    "np_to_triton_type",
    "serialize_byte_tensor",
    "triton_string_to_numpy",
    "unload_model",
    "using_decoupled_model_transaction_policy",
]


class Logger:
    """The server's log."""

    INFO = logging.INFO
    WARNING = logging.WARNING
    ERROR = logging.ERROR
    VERBOSE = logging.DEBUG

    _logger = logging.getLogger("model")

    @classmethod
    def log(cls, message: str, level: int = INFO) -> None:
        """Writes a line."""
        cls._logger.log(level, "%s", message)

    @classmethod
    def log_info(cls, message: str) -> None:
        """For people to know."""
        cls.log(message, cls.INFO)

    @classmethod
    def log_warn(cls, message: str) -> None:
        """For people to look at."""
        cls.log(message, cls.WARNING)

    @classmethod
    def log_error(cls, message: str) -> None:
        """For people to repair."""
        cls.log(message, cls.ERROR)

    @classmethod
    def log_verbose(cls, message: str) -> None:
        """For whoever is looking for something."""
        cls.log(message, cls.VERBOSE)


def get_input_tensor_by_name(inference_request: InferenceRequest, name: str) -> Tensor | None:
    """The input of that name; None if the client has not sent it."""
    for tensor in inference_request._inputs:
        if tensor._name == name:
            return tensor
    return None


def get_output_tensor_by_name(inference_response: InferenceResponse, name: str) -> Tensor | None:
    """The output of that name; None if there is none."""
    for tensor in inference_response._tensors:
        if tensor._name == name:
            return tensor
    return None


def get_input_config_by_name(model_config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The entry of `input` with that name."""
    return next((dict(entry) for entry in model_config.get("input", ()) if entry["name"] == name), None)


def get_output_config_by_name(model_config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The entry of `output` with that name."""
    return next((dict(entry) for entry in model_config.get("output", ()) if entry["name"] == name), None)


def using_decoupled_model_transaction_policy(model_config: Mapping[str, Any]) -> bool:
    """Whether requests may have any number of responses."""
    return bool(model_config.get("model_transaction_policy", {}).get("decoupled", False))


def triton_string_to_numpy(triton_type_string: str) -> Any:
    """TYPE_FP32 -> numpy.float32, TYPE_STRING -> numpy.object_."""
    name = triton_type_string.removeprefix("TYPE_")
    return np.object_ if name == "STRING" else DTYPES[name].type if name in DTYPES else None


def np_to_triton_type(data_type: Any) -> str:
    """numpy.float32 -> TYPE_FP32."""
    datatype = datatype_of(np.empty(0, data_type))
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def serialize_byte_tensor(input_tensor: Array) -> bytes:
    """An array of strings as it is on the wire."""
    return encode_bytes(input_tensor)


def deserialize_bytes_tensor(encoded_tensor: bytes) -> Array:
    """The array that `serialize_byte_tensor` wrote: of `bytes`."""
    return decode_bytes(memoryview(encoded_tensor))


def load_model(model_name: str, files: object = None, config: str = "") -> None:
    """Not served yet."""
    raise TritonModelException("Loading a model from within a model is not served yet.")


def unload_model(model_name: str, unload_dependents: bool = False) -> None:
    """Not served yet."""
    raise TritonModelException("Unloading a model from within a model is not served yet.")


def is_model_ready(model_name: str, model_version: str = "") -> bool:
    """Not served yet."""
    raise TritonModelException("Asking for a model's readiness from within a model is not served yet.")
