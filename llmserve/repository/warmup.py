"""The requests that `model_warmup` of a configuration asks for: built here, run by whoever loads the model."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

from tritonclient.grpc import model_config_pb2
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelWarmup

from llmserve.backends.validation import datatype_name
from llmserve.errors import ModelLoadError
from llmserve.inference import DATATYPE_SIZES, InferRequest, Tensor
from llmserve.repository.model_folder import leaves_folder

_WARMUP_FOLDER = "warmup"
_BELOW_64 = bytes(value & 63 for value in range(256))


def warmup_requests(config: ModelConfig, model_path: Path) -> Iterator[InferRequest]:
    """`count` requests (at least one) of each sample, each of `batch_size` rows. Raises ModelLoadError."""
    for sample in config.model_warmup:
        tensors = [_tensor(name, spec, config, sample, model_path) for name, spec in sorted(sample.inputs.items())]
        for _ in range(max(1, sample.count)):
            yield InferRequest(model_name=config.name, inputs=tensors, id=f"warmup:{sample.name}")


def _tensor(name: str, spec: ModelWarmup.Input, config: ModelConfig, sample: ModelWarmup, model_path: Path) -> Tensor:
    """All rows of a sample travel in one request, where Triton sends `batch_size`: no queue has to gather them."""
    datatype = datatype_name(spec.data_type)
    shape = tuple(spec.dims)
    if config.max_batch_size:
        shape = (max(1, sample.batch_size), *shape)
    if min(shape, default=1) < 0:
        raise ModelLoadError(f"Model {config.name!r}: model_warmup input {name!r} has a variable dimension.")
    return Tensor(name, datatype, shape, _data(name, spec, datatype, math.prod(shape), config.name, model_path))


def _data(name: str, spec: ModelWarmup.Input, datatype: str, num_elements: int, model: str, model_path: Path) -> bytes:
    if spec.WhichOneof("input_data_type") == "input_data_file":
        file = model_path / _WARMUP_FOLDER / spec.input_data_file
        if leaves_folder(spec.input_data_file):
            raise ModelLoadError(f"Model {model!r}: warm-up file {spec.input_data_file!r} leaves {file.parent}.")
        try:
            content: bytes = file.read_bytes()
        except OSError as error:
            raise ModelLoadError(f"Model {model!r}: the warm-up data {file} cannot be read: {error}") from error
        return content
    if datatype == "BYTES":
        return bytes(4 * num_elements)  # empty strings
    num_bytes = DATATYPE_SIZES[datatype] * num_elements
    if spec.random_data and spec.data_type != model_config_pb2.TYPE_BOOL:
        # 0 to 63 in every byte is a finite number in every format
        return random.Random(name).randbytes(num_bytes).translate(_BELOW_64)
    return bytes(num_bytes)
