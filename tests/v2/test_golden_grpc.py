"""Replays over gRPC the calls whose names stand beside what the real Triton answered."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import service_pb2, service_pb2_grpc

from llmserve.backends.general import GeneralModel
from tests.v2.v2_server import GOLDEN, V2Server, serve_golden

Stub = Any  # of GRPCInferenceService; its generated code has no types

# call -> why our answer is not Triton's
DEVIATIONS = {"meta": "our own name, version, and the extensions that are served"}

MODELS = ("identity", "identity_bool", "identity_fp16", "failing", "repeat", "params", "broken_load")


def infer_request(
    model: str = "identity",
    values: Any = (1, 2, 3, 4),
    dtype: str = "float32",
    *,
    name: str = "INPUT0",
    datatype: str = "FP32",
    shape: list[int] | None = None,
    **fields: Any,
) -> service_pb2.ModelInferRequest:
    """One raw input."""
    array = np.array(values, dtype)
    request = service_pb2.ModelInferRequest(model_name=model, **fields)
    request.inputs.add(name=name, datatype=datatype, shape=shape or array.shape)
    request.raw_input_contents.append(array.tobytes())
    return request


def contents_request(model: str, datatype: str, field: str, values: list[Any]) -> service_pb2.ModelInferRequest:
    """One input in `contents`."""
    request = service_pb2.ModelInferRequest(model_name=model)
    tensor = request.inputs.add(name="INPUT0", datatype=datatype, shape=[len(values)])
    getattr(tensor.contents, field).extend(values)
    return request


def unknown_output() -> service_pb2.ModelInferRequest:
    request = infer_request()
    request.outputs.add(name="ZZ")
    return request


def reserved_parameter() -> service_pb2.ModelInferRequest:
    request = infer_request("params", [1])
    request.parameters["triton_x"].bool_param = True
    return request


def model_calls(name: str, version: str) -> dict[str, Callable[[Stub], Any]]:
    key = f"{name}-{version}"
    return {
        f"mready-{key}": lambda s: s.ModelReady(service_pb2.ModelReadyRequest(name=name, version=version)),
        f"mmeta-{key}": lambda s: s.ModelMetadata(service_pb2.ModelMetadataRequest(name=name, version=version)),
        f"mcfg-{key}": lambda s: s.ModelConfig(service_pb2.ModelConfigRequest(name=name, version=version)),
        f"mstats-{key}": lambda s: s.ModelStatistics(service_pb2.ModelStatisticsRequest(name=name, version=version)),
    }


def infer_call(make: Callable[[], service_pb2.ModelInferRequest]) -> Callable[[Stub], Any]:
    return lambda stub: stub.ModelInfer(make())


CALLS: dict[str, Callable[[Stub], Any]] = {
    "ready": lambda s: s.ServerReady(service_pb2.ServerReadyRequest()),
    "meta": lambda s: s.ServerMetadata(service_pb2.ServerMetadataRequest()),
    **model_calls("identity", ""),
    **model_calls("identity", "9"),
    **model_calls("identity", "abc"),
    **model_calls("nope", ""),
    **model_calls("broken_load", ""),
    "infer-raw": infer_call(lambda: infer_request(id="q")),
    "infer-badver": infer_call(lambda: infer_request(model_version="9")),
    "infer-vertext": infer_call(lambda: infer_request(model_version="abc")),
    "infer-bogusdt": infer_call(lambda: infer_request(datatype="BOGUS")),
    "infer-name": infer_call(lambda: infer_request(name="ZZ")),
    "infer-outunknown": infer_call(unknown_output),
    "infer-shape": infer_call(lambda: infer_request(shape=[2, 2])),
    "infer-decoupled": infer_call(lambda: infer_request("repeat", [1], "int32", name="IN", datatype="INT32")),
    "fp16-contents": infer_call(lambda: contents_request("identity_fp16", "FP16", "fp32_contents", [1.0])),
    "bool-contents": infer_call(lambda: contents_request("identity_bool", "BOOL", "bool_contents", [True, False])),
    **{f"failing-{k}": infer_call(partial(infer_request, "failing", [k])) for k in (0, 3, 4, 5, 6, 7, 8, 10)},
    "params-triton": infer_call(reserved_parameter),
    "unload-unknown": lambda s: s.RepositoryModelUnload(service_pb2.RepositoryModelUnloadRequest(model_name="nope")),
    "repo-named": lambda s: s.RepositoryModelLoad(
        service_pb2.RepositoryModelLoadRequest(model_name="identity", repository_name="r")
    ),
    "shm1": lambda s: s.SystemSharedMemoryStatus(service_pb2.SystemSharedMemoryStatusRequest(name="x")),
    "cshm": lambda s: s.CudaSharedMemoryStatus(service_pb2.CudaSharedMemoryStatusRequest()),
}

STREAMS: dict[str, list[service_pb2.ModelInferRequest]] = {
    "stream-plain-final": [infer_request(id="1")],
    "stream-unknown": [infer_request("nope"), infer_request(id="after")],
    "stream-err": [infer_request("failing", [1], id="e"), infer_request(id="after")],
}


@pytest.fixture(scope="module")
def server() -> Iterator[V2Server]:
    with serve_golden(MODELS, GeneralModel) as running:
        yield running


@pytest.fixture(scope="module")
def stub(server: V2Server) -> Iterator[Stub]:
    with grpc.insecure_channel(server.grpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


RECORDED = {
    call["name"]: call for call in map(json.loads, (GOLDEN / "grpc.jsonl").read_text(encoding="utf-8").splitlines())
}


def as_recorded(message: Any) -> dict[str, Any]:
    values: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return values


def without_numbers(value: Any) -> Any:
    """Statistics, the numbers of which float; a count of 0 is not written at all."""
    if isinstance(value, dict):
        return {key: without_numbers(item) for key, item in value.items() if not str(item).isdigit()}
    return [without_numbers(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", [name for name in RECORDED if not name.startswith("stream-")])
def test_answer_is_tritons(name: str, stub: Stub) -> None:
    recorded = RECORDED[name]
    try:
        code, answer = "OK", as_recorded(CALLS[name](stub))
        expected = recorded.get("resp")
    except grpc.RpcError as error:
        code, answer, expected = error.code().name, error.details(), recorded.get("details")
    if name == "mstats-identity-":  # recorded after some inferences
        stub.ModelInfer(infer_request())
        answer = as_recorded(CALLS[name](stub))
        assert without_numbers(answer) == without_numbers(expected)
    elif name in DEVIATIONS:
        assert answer != expected, "no longer differs; take it out of the table"
    else:
        assert (code, answer) == (recorded["code"], expected)


@pytest.mark.parametrize("name", STREAMS)
def test_stream_is_tritons(name: str, stub: Stub) -> None:
    answers = [as_recorded(message) for message in stub.ModelStreamInfer(iter(STREAMS[name]))]
    assert answers == RECORDED[name]["resps"]


def test_every_recorded_call_is_made() -> None:
    assert set(RECORDED) <= set(CALLS) | set(STREAMS)
