"""What the server process and a general model's process say to each other. Plain data: no behaviour, no tensors.

Tagged `msgspec.Struct`s in MessagePack; the tensors of a message follow it in its frame (`transport.py`) in the order
in which they are named here. Times are nanoseconds of `time.monotonic_ns()`, one clock for all processes of a machine.
"""

from __future__ import annotations

from typing import Any

import msgspec

from llmserve.inference import Parameter


class ModelLaunch(msgspec.Struct, tag="launch", array_like=True, kw_only=True):
    """The first message to a model's process: which model, by which backend, on which device."""

    name: str
    version: str
    version_path: str
    model_path: str
    backend: str  # `module:Class`
    config: dict[str, Any]  # ModelConfig as Triton writes it in JSON
    auto_complete: bool  # say the signature and wait for the complete configuration in a LoadModel
    instance_name: str
    kind: str  # CPU, GPU, AUTO or MODEL
    device_id: int = 0
    num_threads: int = 1
    log_level: str = "info"


class LoadModel(msgspec.Struct, tag="load", array_like=True):
    """Load, with this configuration."""

    config: dict[str, Any]


class RequestHeader(msgspec.Struct, array_like=True, gc=False):
    """One request of a batch. No `outputs` means all of them."""

    id: int
    rows: int
    request_id: str = ""
    outputs: list[str] = []
    parameters: dict[str, Parameter] = {}
    correlation_id: int | str = 0
    flags: int = 0  # 1: sequence start, 2: sequence end
    timeout_us: int = 0


class BatchTensor(msgspec.Struct, array_like=True, gc=False):
    """One input of a whole batch: the requests' tensors one after the other, so that the batch is there uncopied.

    `shape` is that of all together; of a ragged input it is flat, and `ragged` has the shape of each request's. With
    `pad_to` the backend sees each padded with zeros to that size along `pad_axis`.
    """

    name: str
    datatype: str
    shape: list[int]
    num_bytes: int
    ragged: list[list[int]] | None = None
    pad_axis: int = 0
    pad_to: int = 0


class ExecuteBatch(msgspec.Struct, tag="execute", array_like=True, gc=False):
    """Run these requests together."""

    batch_id: int
    requests: list[RequestHeader]
    inputs: list[BatchTensor]


class CancelRequests(msgspec.Struct, tag="cancel", array_like=True):
    """Nobody waits for these any more; unknown ids have just finished."""

    ids: list[int]


class AcknowledgeResponses(msgspec.Struct, tag="acknowledge", array_like=True):
    """The client has taken responses of this request worth so many units (`response_window.py`)."""

    id: int
    units: int


class UnloadModel(msgspec.Struct, tag="unload", array_like=True):
    """Unload, then exit."""


ToModel = ModelLaunch | LoadModel | ExecuteBatch | CancelRequests | AcknowledgeResponses | UnloadModel


class TensorSpec(msgspec.Struct, frozen=True):
    """An input or output of a model. `shape` has -1 for what varies, and no batch dimension if the model batches."""

    name: str
    datatype: str  # of v2: FP32, BYTES, ...
    shape: list[int]
    optional: bool = False


class Signature(msgspec.Struct, tag="signature", array_like=True, kw_only=True):
    """What a model says of itself; None where it says nothing."""

    inputs: list[TensorSpec] | None = None
    outputs: list[TensorSpec] | None = None
    max_batch_size: int | None = None
    decoupled: bool | None = None
    dynamic_batching: dict[str, Any] | None = None  # fields of ModelDynamicBatching; {} is its default


class ModelLoaded(msgspec.Struct, tag="loaded", array_like=True):
    """The model takes batches. `device` is where it runs: cpu or cuda:0."""

    load_s: float
    device: str


class LoadFailed(msgspec.Struct, tag="failed", array_like=True):
    """The model cannot be loaded; the process ends after this."""

    message: str


class OutputTensor(msgspec.Struct, array_like=True, gc=False):
    """One output of one response."""

    name: str
    datatype: str
    shape: list[int]
    num_bytes: int


class ResponseEntry(msgspec.Struct, array_like=True, gc=False):
    """One response to one request. `error` is (code of InferenceError or "" for the model's own failure, text)."""

    id: int
    outputs: list[OutputTensor]
    final: bool = True
    parameters: dict[str, Parameter] = {}
    error: tuple[str, str] | None = None


class MetricSample(msgspec.Struct, array_like=True):
    """A metric that a model keeps itself: its family and, for a histogram, counts per bucket (not cumulative)."""

    name: str
    description: str
    kind: str  # counter, gauge or histogram
    labels: dict[str, str]
    value: float  # of a histogram: the sum of what was observed
    bounds: list[float] = []
    counts: list[int] = []


class Results(msgspec.Struct, tag="results", array_like=True, gc=False):
    """Responses; `batch_id` is not 0 if `execute` has returned from that batch, so that the instance is free."""

    responses: list[ResponseEntry]
    batch_id: int = 0
    started_ns: int = 0  # when execute was called
    ended_ns: int = 0
    metrics: list[MetricSample] | None = None  # those that have changed


FromModel = Signature | ModelLoaded | LoadFailed | Results
