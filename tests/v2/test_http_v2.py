"""The HTTP skin over models without a process: routes, limits, compression, disconnects, metrics."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from llmserve.api.triton_metrics import GeneralModelMetrics
from llmserve.api.v2_http import V2Http
from llmserve.api.v2_openapi import v2_paths
from llmserve.api.v2_settings import V2HttpSettings
from llmserve.backends.model_messages import MetricSample
from llmserve.general_metrics import FailureReason
from llmserve.http_metrics import HttpMetrics
from llmserve.repository.data_plane import DataPlane
from llmserve.repository.model_repository import ModelRepository
from llmserve.repository.settings import RepositorySettings
from tests.v2.conftest import WriteModel, model_writer
from tests.v2.v2_fake_model import FakeModel
from tests.v2.v2_server import V2Server, serve_v2

BODY = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [2], "data": [1, 2]}]}
SETTINGS = V2HttpSettings(max_body_bytes=100_000, max_inputs=8, max_parameters=8)
Ask = Callable[..., tuple[int, Any, HTTPResponse]]


@contextmanager
def serve(folder: Path) -> Iterator[V2Server]:
    write = model_writer(folder)
    write("echo", more='metric_tags { key: "team-a" value: "x\\"y" }\n')
    write("slow", gate="1")
    write("crash", crash="1")
    write("stream", stream="3", more="model_transaction_policy { decoupled: true }\n")
    with serve_v2(RepositorySettings(model_repository=(str(folder),)), FakeModel, SETTINGS) as running:
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[V2Server]:
    """For tests that leave it as it is."""
    with serve(tmp_path_factory.mktemp("models")) as running:
        yield running


@pytest.fixture
def fresh_server(tmp_path: Path) -> Iterator[V2Server]:
    """For tests that change it; its fakes are those of FakeModel.opened."""
    with serve(tmp_path) as running:
        yield running


def ask_of(server: V2Server) -> Ask:
    """Sends one request on a connection of its own: (status, JSON or bytes, response)."""

    def ask(method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, HTTPResponse]:
        connection = HTTPConnection(server.http, timeout=20)
        encoded = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, encoded, {key.replace("_", "-"): value for key, value in headers.items()})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        kind = response.getheader("content-type", "")
        return response.status, json.loads(content) if kind == "application/json" and content else content, response

    return ask


@pytest.fixture
def ask(server: V2Server) -> Ask:
    return ask_of(server)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2", 200),
        ("GET", "/v2/", 200),
        ("GET", "/v2/health/live", 200),
        ("GET", "/v2/health/live/", 404),
        ("HEAD", "/v2/health/live", 405),
        ("OPTIONS", "/v2/models/echo/infer", 405),
        ("GET", "/v2/models/echo/infer", 405),
        ("POST", "/v2/models/echo", 405),
        ("GET", "/v2/models/echo/versions/1", 200),
        ("GET", "/v2/models/echo/versions/0", 404),
        ("GET", "/v2/models/echo/versions/01/config", 200),
        ("GET", "/v2/models/echo/versions/x", 404),
        ("GET", "/v2/models/echo/versions/99999999999999999999999", 400),
        ("GET", "/v2/models/echo/explain", 200),
        ("GET", "/v2/models/nope/explain", 404),
        ("GET", "/v2/models//infer", 404),
        ("GET", "/v2/models/stats", 200),
        ("GET", "/v2/models/%2e%2e/config", 404),
        ("GET", "/v2/cudasharedmemory/status", 200),
        ("POST", "/v2/systemsharedmemory/region/x/register", 501),
        ("POST", "/v2/repository/x/index", 501),
        ("POST", "/v2/repository/x/models/echo/load", 501),
        ("POST", "/v2/repository/models/echo/load", 503),
        ("GET", "/elsewhere", 404),
    ],
)
def test_routes(ask: Ask, method: str, path: str, status: int) -> None:
    assert ask(method, path)[0] == status


def test_every_documented_route_is_there(ask: Ask) -> None:
    for path, methods in v2_paths().items():
        for method in methods:
            body: Any = {} if method == "post" else None
            status, answer, _ = ask(method.upper(), path.format(model="echo", version=1), body)
            assert status != 405
            assert answer != {"error": "Not Found"}


def test_log_settings(ask: Ask) -> None:
    ours = logging.getLogger("llmserve")
    before = ours.level
    try:
        assert ask("POST", "/v2/logging", {"log_verbose_level": 1})[1]["log_verbose_level"] == 1
        assert ours.level == logging.DEBUG
        assert ask("POST", "/v2/logging", {"log_verbose_level": 0, "log_info": False})[0] == 200
        assert ours.level == logging.WARNING
        status, answer, _ = ask("POST", "/v2/logging", {"log_format": "xml"})
        assert (status, answer) == (400, {"error": "invalid argument for --log_format, got: xml"})
        assert ask("GET", "/v2/logging")[1]["log_info"] is False
    finally:
        ours.setLevel(before)


def test_health_bodies(fresh_server: V2Server) -> None:
    ask = ask_of(fresh_server)
    assert ask("GET", "/v2/health/ready")[1] == {"ready": True}
    assert ask("GET", "/v2/models/echo/ready")[1] == {"name": "echo", "ready": True}
    FakeModel.opened[0].die()
    name, reason = FakeModel.opened[0].name, "its process ended"
    assert ask("GET", "/v2/health/ready")[:2] == (400, {"ready": False, "reasons": {name: reason}})
    assert ask("GET", f"/v2/models/{name}/ready")[:2] == (400, {"error": "Model version not ready", "reason": reason})


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", ""])
def test_json_whatever_the_content_type(ask: Ask, content_type: str) -> None:
    status, body, _ = ask("POST", "/v2/models/echo/infer", BODY, Content_Type=content_type)
    assert (status, body["outputs"][0]["data"]) == (200, [1.0, 2.0])


def test_bodies_over_the_limit(ask: Ask) -> None:
    big = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [60000], "data": [1] * 60000}]}
    for body, headers in (
        (json.dumps(big).encode(), {}),
        (gzip.compress(json.dumps(big).encode()), {"Content_Encoding": "gzip"}),
        (gzip.compress(bytes(50_000_000)), {"Content_Encoding": "gzip"}),
    ):
        status, answer, _ = ask("POST", "/v2/models/echo/infer", body, **headers)
        assert status == 400
        assert "exceeds the maximum allowed input size of 100000 bytes" in answer["error"]


def test_a_body_without_a_length_is_counted(server: V2Server) -> None:
    connection = HTTPConnection(server.http, timeout=20)
    connection.request("POST", "/v2/models/echo/infer", iter([b" " * 60_000, b" " * 60_000]), encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 400
    assert b"exceeds the maximum allowed input size" in response.read()
    connection.close()


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"inputs": BODY["inputs"] * 9}, "at most 8 inputs"),
        ({**BODY, "outputs": [{"name": str(n)} for n in range(9)]}, "at most 8 inputs and outputs"),
        ({**BODY, "parameters": {str(n): n for n in range(9)}}, "at most 8 parameters"),
        ({**BODY, "outputs": [{"name": "OUTPUT0"}] * 2}, "requested more than once"),
        ({**BODY, "parameters": {"big": 2**70}}, "range of 64-bit integers"),
    ],
)
def test_counts_have_limits(ask: Ask, body: Any, complaint: str) -> None:
    status, answer, _ = ask("POST", "/v2/models/echo/infer", body)
    assert status == 400
    assert complaint in answer["error"]


@pytest.mark.parametrize("depth", [200, 5000, 40_000])
def test_depth_has_a_limit(ask: Ask, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    for text in (
        f'{{"inputs":[{{"name":"INPUT0","datatype":"FP32","shape":[1],"data":{nested}}}]}}',
        f'{{"parameters":{{"x":{nested}}},"inputs":[]}}',
        nested,
    ):
        status, answer, _ = ask("POST", "/v2/models/echo/infer", text.encode())
        assert status in (400, 500)
        assert "The server failed" not in answer["error"]


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate", "gzip"),
        ("deflate;q=0.9, gzip;q=0.5", "deflate"),
        ("gzip;q=0", None),
        ("gzip;q=x", None),
        ("br, zstd", None),
        ("identity", None),
    ],
)
def test_compressed_answers(ask: Ask, accepted: str, encoding: str | None) -> None:
    connection = ask("POST", "/v2/models/echo/infer", BODY)  # uncompressed, to compare with
    assert connection[2].getheader("content-encoding") is None
    body = {**BODY, "parameters": {"binary_data_output": True}}
    raw = raw_answer(ask, body, accepted)
    assert raw[1] == encoding
    content = raw[0]
    if encoding is not None:
        content = gzip.decompress(content) if encoding == "gzip" else zlib.decompress(content)
    head = int(raw[2])
    assert json.loads(content[:head])["outputs"][0]["parameters"] == {"binary_data_size": 8}
    assert len(content) == head + 8


def raw_answer(ask: Ask, body: Any, accepted: str) -> tuple[bytes, str | None, str]:
    status, content, response = ask("POST", "/v2/models/echo/infer", body, Accept_Encoding=accepted)
    assert status == 200
    return content, response.getheader("content-encoding"), response.getheader("inference-header-content-length") or ""


@pytest.mark.parametrize("encoded", [b"junk", gzip.compress(b"{}")[:-4], zlib.compress(b"{}")[:-1], b""])
def test_damaged_compression(ask: Ask, encoded: bytes) -> None:
    status, answer, _ = ask("POST", "/v2/models/echo/infer", encoded, Content_Encoding="gzip")
    assert status == 400
    assert "compressed body" in answer["error"]


def test_streams(ask: Ask) -> None:
    status, content, response = ask("POST", "/v2/models/stream/generate_stream", {"INPUT0": 5, "id": "s"})
    assert (status, response.getheader("content-type")) == (200, "text/event-stream; charset=utf-8")
    events = [json.loads(event.removeprefix(b"data: ")) for event in content.split(b"\n\n") if event]
    assert events == [{"OUTPUT0": 5.0, "id": "s", "model_name": "stream", "model_version": "1"}] * 3
    status, answer, _ = ask("POST", "/v2/models/stream/generate", {"INPUT0": 5})
    assert status == 400
    assert "exactly 1 response" in answer["error"]


def test_a_client_that_leaves_cancels_its_request(fresh_server: V2Server) -> None:
    slow = next(model for model in FakeModel.opened if model.name == "slow")
    for path, body in (("infer", BODY), ("generate", {"INPUT0": 1}), ("generate_stream", {"INPUT0": 1})):
        before = slow.cancelled
        connection = HTTPConnection(fresh_server.http, timeout=20)
        connection.request("POST", f"/v2/models/slow/{path}", json.dumps(body).encode())
        time.sleep(0.1)
        connection.close()
        deadline = time.monotonic() + 10
        while slow.cancelled == before:
            assert time.monotonic() < deadline, path
            time.sleep(0.01)


def test_a_slow_answer_is_not_taken_for_a_gone_client(fresh_server: V2Server) -> None:
    slow = next(model for model in FakeModel.opened if model.name == "slow")
    connection = HTTPConnection(fresh_server.http, timeout=20)
    connection.request("POST", "/v2/models/slow/infer", json.dumps(BODY).encode())
    time.sleep(0.2)

    async def open_gate() -> None:
        slow.open()

    fresh_server.call(open_gate())
    assert connection.getresponse().status == 200
    connection.close()


def test_our_own_failures_stay_in_the_log(server: V2Server, ask: Ask) -> None:
    said = "The server failed on this request. The log of the server says why."
    assert ask("POST", "/v2/models/crash/infer", BODY)[:2] == (500, {"error": said})
    request = service_pb2.ModelInferRequest(model_name="crash", id="c")
    request.inputs.add(name="INPUT0", datatype="FP32", shape=[1]).contents.fp32_contents.append(1)
    after = service_pb2.ModelInferRequest()
    after.CopyFrom(request)
    after.model_name = "echo"
    with grpc.insecure_channel(server.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(request)
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INTERNAL, said)
        (answer,) = stub.ModelStreamInfer(iter([after]))
        assert answer.infer_response.model_name == "echo"
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ModelStreamInfer(iter([after, request, after])))
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INTERNAL, said)


def test_triton_metrics(fresh_server: V2Server) -> None:
    server, ask = fresh_server, ask_of(fresh_server)
    ask("POST", "/v2/models/echo/infer", BODY)
    server.plane.statistics("stream")[0].record_failure(FailureReason.REJECTED, 5)
    own = {
        1: MetricSample("my_count", "Mine.", "counter", {}, 2.0),
        2: MetricSample("my_latency", "Mine.", "histogram", {"kind": "a"}, 7.5, [1.0, 5.0], [1, 1, 1]),
    }
    next(model for model in FakeModel.opened if model.name == "echo").custom_metrics.update(own)
    metrics = GeneralModelMetrics(server.plane)
    text = metrics.render().decode()
    lines = text.splitlines()
    tags = 'model="echo",team_a="x\\"y",version="1"'
    assert f"nv_inference_request_success{{{tags}}} 1" in lines
    assert f"nv_inference_request_duration_us{{{tags}}} 10" in lines
    assert f"nv_inference_compute_infer_duration_us{{{tags}}} 2" in lines
    assert f"nv_inference_pending_request_count{{{tags}}} 0" in lines
    assert 'nv_inference_request_failure{model="stream",reason="REJECTED",version="1"} 1' in lines
    assert "# TYPE nv_inference_count counter" in lines
    assert "_total" not in text
    families = {family.name: family for family in metrics.collect()}
    assert "# TYPE my_latency histogram" in lines
    assert 'my_latency_bucket{kind="a",le="+Inf"} 3' in lines
    assert 'my_latency_sum{kind="a"} 7.5' in lines
    assert "my_count 2" in lines
    server.plane.statistics("echo")[0].queued_by_priority = [2, 0, 1]
    depth = {f.name: f for f in metrics.collect()}["llmserve:inference_queue_depth"].samples
    assert [(s.labels["priority"], s.value) for s in depth] == [("1", 2), ("2", 0), ("3", 1)]
    batch_sizes = families["llmserve:inference_batch_size"].samples
    assert [s.value for s in batch_sizes if s.labels["model"] == "echo" and s.name.endswith("_count")] == [1]


def test_requests_are_counted_by_route(tmp_path: Path, write_model: WriteModel) -> None:
    write_model("echo")
    metrics = HttpMetrics()
    sent: list[dict[str, Any]] = []

    async def run() -> None:
        repository = ModelRepository(RepositorySettings(model_repository=(str(tmp_path / "models"),)), FakeModel)
        await repository.start()
        plane = DataPlane(repository, version="0")
        http = V2Http(None, plane=plane, settings=SETTINGS, metrics=metrics)  # type: ignore[arg-type]

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        for method, path in (("POST", "models/echo/versions/1/infer"), ("GET", "models/nope"), ("GET", "x")):
            scope = {"type": "http", "method": method, "path": f"/v2/{path}", "headers": []}
            await http(scope, receive, send)  # type: ignore[arg-type]
        await repository.stop()

    asyncio.run(run())
    assert metrics.requests == {
        ("/v2/models/{model}/versions/{version}/infer", "POST", "2xx"): 1,
        ("/v2/models/{model}", "GET", "4xx"): 1,
        ("none", "GET", "4xx"): 1,
    }
