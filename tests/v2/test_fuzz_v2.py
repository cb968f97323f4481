"""Damaged requests: no answer may be a 500 that is our fault, no connection may hang, and the server lives on."""

from __future__ import annotations

import asyncio
import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from llmserve.api.v2_grpc_codec import read_request
from llmserve.api.v2_http import V2Http
from llmserve.api.v2_settings import V2HttpSettings
from llmserve.errors import LLMServeError
from llmserve.repository.data_plane import DataPlane
from llmserve.repository.model_repository import ModelRepository
from llmserve.repository.settings import RepositorySettings
from tests.v2.conftest import WriteModel
from tests.v2.v2_fake_model import FakeModel

JSON_BODY = json.dumps(
    {
        "id": "x",
        "parameters": {"sequence_id": 1, "priority": 2, "a": "b", "binary_data_output": True},
        "inputs": [
            {"name": "INPUT0", "datatype": "FP32", "shape": [2, 2], "data": [[1, 2.5], [-3, 4e5]]},
            {"name": "INPUT1", "datatype": "BYTES", "shape": [1], "data": ["text"]},
        ],
        "outputs": [{"name": "OUTPUT0", "parameters": {"classification": 2, "binary_data": False}}],
    }
).encode()
HEADER = b'{"inputs":[{"name":"INPUT1","datatype":"BYTES","shape":[2],"parameters":{"binary_data_size":11}}]}'
BINARY_BODY = HEADER + struct.pack("<I", 2) + b"ab" + struct.pack("<I", 1) + b"c"
GENERATE_BODY = b'{"INPUT1":["a","b"],"id":"g","parameters":{"temperature":0.5,"stop":"x"},"other":true}'
SETTINGS = V2HttpSettings(max_body_bytes=1 << 20)


def mutate(body: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Replaces, at each (place, length), what stands there."""
    for place, length, piece in edits:
        start = place % (len(body) + 1)
        body = body[:start] + piece + body[start + length :]
    return body


WORDS = b'null -1 1e999 NaN [ ] { } " \\u0000 \\ud800 true 1.5 : , 18446744073709551616'.split()
PIECES = st.one_of(st.binary(max_size=4), st.sampled_from([*WORDS, b"INT8", b"BOOL", b"\xff\xfe", b"9" * 40]))
EDITS = st.lists(st.tuples(st.integers(0, 600), st.integers(0, 12), PIECES), max_size=6)


class Client:
    """Hands requests to the skin without a socket."""

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self.repository = ModelRepository(RepositorySettings(model_repository=(str(folder),)), FakeModel)
        self._loop.run_until_complete(self.repository.start())
        plane = DataPlane(self.repository, version="0")
        self._http = V2Http(None, plane=plane, settings=SETTINGS)  # type: ignore[arg-type]

    def close(self) -> None:
        self._loop.run_until_complete(self.repository.stop())
        self._loop.close()

    def post(self, path: str, body: bytes, headers: list[tuple[bytes, bytes]]) -> tuple[int, bytes]:
        """(status, body)"""
        sent: list[Any] = []
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        self._loop.run_until_complete(asyncio.wait_for(self._http(scope, receive, send), 10))
        assert sent[0]["type"] == "http.response.start"
        assert not sent[-1].get("more_body")
        return sent[0]["status"], b"".join(bytes(message.get("body", b"")) for message in sent[1:])


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")
    (folder / "echo/1").mkdir(parents=True)
    (folder / "echo/config.pbtxt").write_text(
        """backend: "python"
        input { name: "INPUT0" data_type: TYPE_FP32 dims: [ -1, -1 ] optional: true }
        input { name: "INPUT1" data_type: TYPE_STRING dims: [ -1 ] optional: true }
        output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1, -1 ] } ]
        output { name: "OUTPUT1" data_type: TYPE_STRING dims: -1 }"""
    )
    made = Client(folder)
    yield made
    made.close()


def check(status: int, body: bytes) -> None:
    """An answer, or an error of the request's own; never our failure."""
    if status != 200:
        text = json.loads(body.removeprefix(b"data: "))["error"]
        assert "The server failed" not in text
        tritons = ("Unable to parse", "Unable to set", "parse the request")  # that it answers with 500, so do we
        assert status in (400, 404, 501, 503) or any(words in text for words in tritons)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS)
def test_damaged_json(client: Client, edits: list[tuple[int, int, bytes]]) -> None:
    check(*client.post("/v2/models/echo/infer", mutate(JSON_BODY, edits), []))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS, length=st.one_of(st.just(str(len(HEADER)).encode()), st.binary(max_size=8)))
def test_damaged_binary(client: Client, edits: list[tuple[int, int, bytes]], length: bytes) -> None:
    body = mutate(BINARY_BODY, edits)
    check(*client.post("/v2/models/echo/infer", body, [(b"inference-header-content-length", length)]))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS, route=st.sampled_from(["generate", "generate_stream"]))
def test_damaged_generate(client: Client, edits: list[tuple[int, int, bytes]], route: str) -> None:
    check(*client.post(f"/v2/models/echo/{route}", mutate(GENERATE_BODY, edits), []))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    headers=st.lists(
        st.tuples(
            st.sampled_from([b"content-encoding", b"accept-encoding", b"content-length", b"content-type"]),
            st.one_of(st.binary(max_size=12), st.sampled_from([b"gzip", b"deflate", b"gzip;q=0.1,deflate", b"*"])),
        ),
        max_size=4,
    ),
    body=st.one_of(st.just(JSON_BODY), st.binary(max_size=60)),
)
def test_damaged_headers(client: Client, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    status, answer = client.post("/v2/models/echo/infer", body, headers)
    if status != 200:
        check(status, answer)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["logging", "trace/setting", "repository/index", "repository/models/echo/load"]),
    body=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["ready", "parameters", "config", "file:1/x", "trace_level", "log_info", "log_format"])
                | st.text(max_size=3),
                inner,
                max_size=3,
            )
        ),
        max_leaves=8,
    ),
)
def test_odd_settings(client: Client, path: str, body: Any) -> None:
    status, answer = client.post(f"/v2/{path}", json.dumps(body).encode(), [])
    assert status in (200, 400, 500, 501, 503)
    assert b"The server failed" not in answer


def grpc_message() -> service_pb2.ModelInferRequest:
    message = service_pb2.ModelInferRequest(model_name="echo", id="x")
    message.parameters["priority"].int64_param = 1
    message.parameters["a"].string_param = "b"
    tensor = message.inputs.add(name="INPUT0", datatype="FP32", shape=[1, 2])
    tensor.contents.fp32_contents.extend([1, 2])
    message.inputs.add(name="INPUT1", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"t")
    message.outputs.add(name="OUTPUT0").parameters["classification"].int64_param = 1
    return message


@settings(max_examples=300, deadline=None)
@given(edits=EDITS, raw=st.booleans())
def test_damaged_grpc_messages(edits: list[tuple[int, int, bytes]], raw: bool) -> None:
    message = grpc_message()
    if raw:
        for tensor in message.inputs:
            tensor.ClearField("contents")
        message.raw_input_contents.extend([b"\0" * 8, b"\1\0\0\0t"])
    damaged = service_pb2.ModelInferRequest()
    with suppress(DecodeError, LLMServeError):
        damaged.ParseFromString(mutate(message.SerializeToString(), edits))
        request, _ = read_request(damaged)
        assert len(request.inputs) == len(damaged.inputs)


def test_it_still_answers(client: Client, write_model: WriteModel) -> None:
    body = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1, 1], "data": [7]}]}
    status, answer = client.post("/v2/models/echo/infer", json.dumps(body).encode(), [])
    assert (status, json.loads(answer)["outputs"][0]["data"]) == (200, [7.0])
