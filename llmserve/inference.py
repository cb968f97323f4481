"""The words of general inference, Open Inference Protocol v2: what one request asks of a model and what it answers.

Floor 1: no HTTP, no gRPC, no process, no batching. Tensors are plain buffers here: little-endian, row-major, without
padding; a BYTES element is its length as uint32, then its bytes (as on the wire).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Parameter = bool | int | float | str

# v2 datatype -> bytes of an element; BYTES has no fixed size
DATATYPE_SIZES: Mapping[str, int] = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "BF16": 2,
    "FP32": 4,
    "FP64": 8,
}


@dataclass(slots=True)
class Tensor:
    """A named tensor. `shape` includes the batch dimension where the model batches."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview


@dataclass(slots=True)
class RequestedOutput:
    """An output the client wants. `classification` k > 0 asks for the top k classes in place of the tensor."""

    name: str
    classification: int = 0


@dataclass(slots=True)
class InferRequest:
    """One inference. `model_version` "" lets the version policy choose; no `outputs` means all of them.

    Parameters with a meaning have fields of their own and do not stand in `parameters`.
    """

    model_name: str
    inputs: list[Tensor]
    model_version: str = ""
    id: str = ""
    outputs: list[RequestedOutput] = field(default_factory=list)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    priority: int = 0  # 0: the model's default level; 1 is the highest
    timeout_us: int = 0  # 0: the queue policy's own
    sequence_id: int | str = 0
    sequence_start: bool = False
    sequence_end: bool = False


@dataclass(slots=True)
class InferResponse:
    """One answer; a decoupled model gives any number of them, the last with `final` (and maybe without outputs)."""

    model_name: str
    model_version: str
    outputs: list[Tensor]
    id: str = ""
    parameters: dict[str, Parameter] = field(default_factory=dict)
    final: bool = True
