"""Triton's own clients, unchanged: HTTP and gRPC, blocking and asyncio, JSON and binary, streams and cancels."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as grpcaio
import tritonclient.http as httpclient
import tritonclient.http.aio as httpaio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.utils import InferenceServerException

from llmserve.backends.general import GeneralModel
from tests.v2.v2_server import GOLDEN, V2Server, serve_golden

MODELS = ("identity", "identity_bytes", "simple", "repeat", "slow_nodyn", "params", "warm", "llm_stream", "failing")

A = np.arange(16, dtype=np.int32).reshape(1, 16)
B = np.ones((1, 16), np.int32)


@pytest.fixture(scope="module")
def server() -> Iterator[V2Server]:
    with serve_golden(MODELS, GeneralModel) as running:
        yield running


@pytest.fixture
def http(server: V2Server) -> Iterator[Any]:
    with httpclient.InferenceServerClient(server.http, concurrency=4) as client:
        yield client


@pytest.fixture
def grpc_client(server: V2Server) -> Iterator[Any]:
    with grpcclient.InferenceServerClient(server.grpc) as client:
        yield client


def http_inputs(binary: bool = True) -> list[Any]:
    first, second = httpclient.InferInput("INPUT0", [1, 16], "INT32"), httpclient.InferInput("INPUT1", [1, 16], "INT32")
    first.set_data_from_numpy(A, binary_data=binary)
    second.set_data_from_numpy(B, binary_data=binary)
    return [first, second]


def grpc_input(name: str, values: Any, datatype: str) -> Any:
    tensor = grpcclient.InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(values)
    return tensor


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_http_infer(http: Any, binary_in: bool, binary_out: bool, compression: str | None) -> None:
    outputs = [httpclient.InferRequestedOutput(name, binary_data=binary_out) for name in ("OUTPUT0", "OUTPUT1")]
    result = http.infer(
        "simple",
        http_inputs(binary_in),
        outputs=outputs,
        request_id="r1",
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    assert (result.as_numpy("OUTPUT0") == A + B).all()
    assert (result.as_numpy("OUTPUT1") == A - B).all()
    assert result.get_response()["id"] == "r1"


def test_http_without_listed_outputs_is_binary(http: Any) -> None:
    assert (http.infer("simple", http_inputs()).as_numpy("OUTPUT0") == A + B).all()


def test_http_large_tensors(http: Any) -> None:
    values = np.random.default_rng(0).random(3_000_000, np.float32)
    tensor = httpclient.InferInput("INPUT0", list(values.shape), "FP32")
    tensor.set_data_from_numpy(values)
    assert (http.infer("identity", [tensor]).as_numpy("OUTPUT0") == values).all()


def test_http_strings(http: Any) -> None:
    values = np.array([b"a", b"", "é".encode(), b"x" * 1000], dtype=object)
    for binary in (True, False):
        tensor = httpclient.InferInput("INPUT0", [4], "BYTES")
        tensor.set_data_from_numpy(values, binary_data=binary)
        output = httpclient.InferRequestedOutput("OUTPUT0", binary_data=binary)
        result = http.infer("identity_bytes", [tensor], outputs=[output]).as_numpy("OUTPUT0")
        assert [item.encode() if isinstance(item, str) else item for item in result] == values.tolist()


def test_http_classification(http: Any) -> None:
    output = httpclient.InferRequestedOutput("OUTPUT0", class_count=3)
    result = http.infer("simple", http_inputs(), outputs=[output]).as_numpy("OUTPUT0")
    assert result.tolist() == [[b"16:15:label15", b"15:14:label14", b"14:13:label13"]]


def test_http_async_infer(http: Any) -> None:
    pending = [http.async_infer("simple", http_inputs()) for _ in range(20)]
    assert all((item.get_result().as_numpy("OUTPUT0") == A + B).all() for item in pending)


def test_http_everything_else(http: Any) -> None:
    assert http.is_server_live()
    assert http.is_server_ready()
    assert http.is_model_ready("simple")
    assert not http.is_model_ready("nope")
    assert "binary_tensor_data" in http.get_server_metadata()["extensions"]
    assert http.get_model_metadata("simple", "1")["inputs"][0]["shape"] == [-1, 16]
    assert http.get_model_config("simple")["max_batch_size"] == 8
    assert http.get_inference_statistics("simple")["model_stats"][0]["name"] == "simple"
    states = {entry["name"]: entry.get("state") for entry in http.get_model_repository_index()}
    assert (states["simple"], states["bls"]) == ("READY", None)
    http.unload_model("warm", unload_dependents=True)
    assert not http.is_model_ready("warm")
    tensor = {"data_type": "TYPE_FP32", "dims": [2]}
    config = {"max_batch_size": 2, "input": [{"name": "INPUT0", **tensor}], "output": [{"name": "OUTPUT0", **tensor}]}
    http.load_model("warm", config=json.dumps(config))
    assert http.get_model_config("warm")["max_batch_size"] == 2
    http.load_model("warm")
    assert http.get_model_config("warm")["max_batch_size"] == 4
    assert http.update_trace_settings("simple", {"trace_rate": "7"})["trace_rate"] == "7"
    assert http.get_trace_settings("simple")["trace_rate"] == "7"
    assert http.get_trace_settings()["trace_rate"] == "1000"
    assert http.update_trace_settings("simple", {"trace_rate": None})["trace_rate"] == "1000"
    assert http.update_log_settings({"log_verbose_level": 0})["log_verbose_level"] == 0
    assert http.get_log_settings()["log_info"] is True
    assert http.get_system_shared_memory_status() == []
    http.unregister_system_shared_memory()
    http.unregister_cuda_shared_memory()
    with pytest.raises(InferenceServerException, match="not served yet"):
        http.register_system_shared_memory("r", "/k", 64)


def test_reloads_drop_no_request(server: V2Server) -> None:
    end = threading.Event()

    def ask() -> int:
        """How many answers it got while the model was reloaded under it."""
        count = 0
        with httpclient.InferenceServerClient(server.http) as client:
            while not end.is_set():
                assert (client.infer("simple", http_inputs()).as_numpy("OUTPUT0") == A + B).all()
                count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        with httpclient.InferenceServerClient(server.http) as client:
            for _ in range(5):
                client.load_model("simple")
        end.set()
        assert all(future.result() > 0 for future in asking)


def test_http_timeout(server: V2Server) -> None:
    with httpclient.InferenceServerClient(server.http, network_timeout=0.1, connection_timeout=1.0) as client:
        tensor = httpclient.InferInput("INPUT0", [1, 1], "FP32")
        tensor.set_data_from_numpy(np.zeros((1, 1), np.float32))
        with pytest.raises(TimeoutError):
            client.infer("slow_nodyn", [tensor])
    # the server noticed, and goes on
    with httpclient.InferenceServerClient(server.http) as client:
        assert (client.infer("simple", http_inputs()).as_numpy("OUTPUT0") == A + B).all()


def test_http_aio(server: V2Server) -> None:
    async def run() -> None:
        async with httpaio.InferenceServerClient(server.http) as client:
            assert await client.is_server_ready()
            results = await asyncio.gather(*(client.infer("simple", http_inputs()) for _ in range(32)))
            assert all((result.as_numpy("OUTPUT0") == A + B).all() for result in results)
            with pytest.raises(InferenceServerException, match="unknown model: 'nope' is not found"):
                await client.infer("nope", http_inputs())

    asyncio.run(run())


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_grpc_infer(grpc_client: Any, compression: str | None) -> None:
    inputs = [grpc_input("INPUT0", A, "INT32"), grpc_input("INPUT1", B, "INT32")]
    result = grpc_client.infer("simple", inputs, request_id="g1", compression_algorithm=compression)
    assert (result.as_numpy("OUTPUT0") == A + B).all()
    assert result.get_response().id == "g1"


def test_grpc_large_tensors(grpc_client: Any) -> None:
    values = np.random.default_rng(0).random(3_000_000, np.float32)
    result = grpc_client.infer("identity", [grpc_input("INPUT0", values, "FP32")])
    assert (result.as_numpy("OUTPUT0") == values).all()


def test_grpc_parameters_and_sequences(grpc_client: Any) -> None:
    result = grpc_client.infer(
        "params",
        [grpc_input("INPUT0", np.zeros(1, np.float32), "FP32")],
        request_id="p",
        sequence_id=5,
        sequence_start=True,
        priority=1,
        timeout=1000,
        parameters={"a": 1, "b": "s", "c": True, "d": 1.5},
    )
    assert result.as_numpy("OUTPUT0")[0] == (
        b'{"corr": 5, "flags": 1, "id": "p", "p": {"a": 1, "b": "s", "c": true, "d": 1.5}, "timeout": 1000}'
    )


def test_grpc_classification(grpc_client: Any) -> None:
    inputs = [grpc_input("INPUT0", A, "INT32"), grpc_input("INPUT1", B, "INT32")]
    output = grpcclient.InferRequestedOutput("OUTPUT0", class_count=1)
    result = grpc_client.infer("simple", inputs, outputs=[output])
    assert result.as_numpy("OUTPUT0").tolist() == [[b"16:15:label15"]]


def test_grpc_everything_else(grpc_client: Any) -> None:
    assert grpc_client.is_server_live()
    assert grpc_client.is_server_ready()
    assert grpc_client.is_model_ready("simple")
    assert not grpc_client.is_model_ready("nope")
    assert grpc_client.get_model_metadata("simple").inputs[0].shape == [-1, 16]
    assert grpc_client.get_model_config("simple").config.max_batch_size == 8
    assert grpc_client.get_inference_statistics("simple").model_stats[0].name == "simple"
    states = {entry.name: entry.state for entry in grpc_client.get_model_repository_index().models}
    assert states["simple"] == "READY"
    grpc_client.unload_model("warm")
    files = {"file:1/model.py": (GOLDEN / "model_repository/identity/1/model.py").read_bytes()}
    config = """{"backend": "python",
      "input": [{"name": "INPUT0", "data_type": "TYPE_FP32", "dims": [-1]}],
      "output": [{"name": "OUTPUT0", "data_type": "TYPE_FP32", "dims": [-1]}]}"""
    grpc_client.load_model("uploaded", config=config, files=files)
    values = np.array([1, 2], np.float32)
    assert (grpc_client.infer("uploaded", [grpc_input("INPUT0", values, "FP32")]).as_numpy("OUTPUT0") == values).all()
    grpc_client.unload_model("uploaded")
    grpc_client.load_model("warm")
    assert grpc_client.update_trace_settings("simple", {"trace_rate": "7"}).settings["trace_rate"].value == ["7"]
    cleared = grpc_client.update_trace_settings("simple", {"trace_rate": None})
    assert cleared.settings["trace_rate"].value == ["1000"]
    assert grpc_client.update_log_settings({"log_info": True}).settings["log_info"].bool_param
    assert list(grpc_client.get_system_shared_memory_status().regions) == []
    with pytest.raises(InferenceServerException, match="not served yet"):
        grpc_client.register_system_shared_memory("r", "/k", 64)


def test_grpc_deadline_cancels(grpc_client: Any, http: Any) -> None:
    before = http.get_inference_statistics("slow_nodyn")["model_stats"][0]["inference_stats"]["fail"]["count"]
    values = np.zeros((1, 1), np.float32)
    with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
        grpc_client.infer("slow_nodyn", [grpc_input("INPUT0", values, "FP32")], client_timeout=0.05)
    for _ in range(100):
        after = http.get_inference_statistics("slow_nodyn")["model_stats"][0]["inference_stats"]["fail"]["count"]
        if after > before:
            return
        asyncio.run(asyncio.sleep(0.02))
    pytest.fail("the server did not cancel the request")


def test_grpc_async_infer_can_be_cancelled(grpc_client: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    call = grpc_client.async_infer(
        "slow_nodyn",
        [grpc_input("INPUT0", np.zeros((1, 1), np.float32), "FP32")],
        callback=lambda result, error: answers.put(error),
    )
    call.cancel()
    assert "Locally cancelled" in str(answers.get(timeout=10))


def collect(client: Any, requests: list[tuple[str, list[Any], dict[str, Any]]], count: int) -> list[Any]:
    """Sends requests on one stream; the first `count` results."""
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put(error or result))
    try:
        for model, inputs, options in requests:
            client.async_stream_infer(model, inputs, **options)
        return [answers.get(timeout=20) for _ in range(count)]
    finally:
        client.stop_stream()


def test_grpc_stream_of_a_decoupled_model(grpc_client: Any) -> None:
    inputs = [grpc_input("IN", np.array([4, 5, 6], np.int32), "INT32")]
    results = collect(grpc_client, [("repeat", inputs, {"request_id": "1", "enable_empty_final_response": True})], 4)
    assert [result.as_numpy("OUT")[0] for result in results[:3]] == [4, 5, 6]
    assert [result.get_response().parameters["triton_final_response"].bool_param for result in results] == [
        False,
        False,
        False,
        True,
    ]
    assert not results[3].get_response().outputs
    assert {result.get_response().id for result in results} == {"1"}


def test_grpc_stream_keeps_order_and_survives_errors(grpc_client: Any) -> None:
    slow = grpc_input("INPUT0", np.zeros((1, 1), np.float32), "FP32")
    quick = grpc_input("INPUT0", np.ones(1, np.float32), "FP32")
    requests = [
        ("slow_nodyn", [slow], {"request_id": "slow"}),
        ("identity", [quick], {"request_id": "quick"}),
        ("nope", [quick], {"request_id": "bad"}),
        ("identity", [quick], {"request_id": "last"}),
    ]
    results = collect(grpc_client, requests, 4)
    assert [result.get_response().id for result in (results[0], results[1], results[3])] == ["slow", "quick", "last"]
    assert isinstance(results[2], InferenceServerException)
    assert "unknown model: 'nope'" in str(results[2])


def test_grpc_stream_can_be_cancelled(grpc_client: Any, server: V2Server) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    grpc_client.start_stream(callback=lambda result, error: answers.put(error or result))
    delays = grpc_input("DELAY", np.full(60, 20, np.uint32), "UINT32")
    values = grpc_input("IN", np.arange(60, dtype=np.int32), "INT32")
    grpc_client.async_stream_infer("repeat", [values, delays])
    assert answers.get(timeout=10).as_numpy("OUT")[0] == 0
    grpc_client.stop_stream(cancel_requests=True)
    (statistics,) = server.plane.statistics("repeat")
    for _ in range(100):
        if statistics.pending == 0:
            return
        asyncio.run(asyncio.sleep(0.02))
    pytest.fail("the request is still pending")


def test_grpc_aio(server: V2Server) -> None:
    async def run() -> None:
        async with grpcaio.InferenceServerClient(server.grpc) as client:
            inputs = [grpc_input("INPUT0", A, "INT32"), grpc_input("INPUT1", B, "INT32")]
            results = await asyncio.gather(*(client.infer("simple", inputs) for _ in range(32)))
            assert all((result.as_numpy("OUTPUT0") == A + B).all() for result in results)

            async def requests() -> Any:
                for number in range(5):
                    values = np.full(1, number, np.float32)
                    yield {"model_name": "identity", "inputs": [grpc_input("INPUT0", values, "FP32")]}

            values = [result.as_numpy("OUTPUT0")[0] async for result, _ in client.stream_infer(requests())]
            assert values == [0, 1, 2, 3, 4]

    asyncio.run(run())


def test_grpc_health_and_reflection(server: V2Server) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "inference.GRPCInferenceService", "whatever"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        (reply,) = stub.ServerReflectionInfo(iter([question]))
        names = {service.name for service in reply.list_services_response.service}
        assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= names
