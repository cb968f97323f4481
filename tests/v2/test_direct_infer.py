"""Inference on the short way past ASGI: what it answers, writes down and counts is what the long way does."""

from __future__ import annotations

import gc
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from llmserve.api.journal import Journal
from llmserve.api.v2_http_direct import DirectInfer
from llmserve.backends.general import GeneralModel
from llmserve.config import DoorConfig
from llmserve.repository.settings import RepositorySettings
from llmserve.request_context import RequestContext
from tests.door.conftest import write_keys
from tests.v2.v2_fake_model import FakeModel
from tests.v2.v2_server import V2Server, serve_v2

LONG = {"Origin": "http://localhost"}  # needs CORS looked at, so it goes the way of ASGI
CONFIG = """
backend: "python"
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]
"""
# waits as many seconds as its input says, and writes down what becomes of the request
MODEL = """
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            array = pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy()
            until = time.monotonic() + float(array[0])
            while time.monotonic() < until and not request.is_cancelled():
                time.sleep(0.005)
            if request.is_cancelled():
                open(FILE, "a").write("cancelled\\n")
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", array)]))
        return responses
"""


def body(*values: float, **fields: Any) -> bytes:
    tensor = {"name": "INPUT0", "datatype": "FP32", "shape": [len(values)], "data": list(values)}
    return json.dumps({"inputs": [tensor], **fields}).encode()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The URLs that went the short way."""
    urls: list[bytes] = []
    serve = DirectInfer.serve

    def spy(self: DirectInfer, exchange: Any) -> None:
        urls.append(exchange.url)
        serve(self, exchange)

    monkeypatch.setattr(DirectInfer, "serve", spy)
    return urls


@contextmanager
def serving(folder: Path, opener: Any = GeneralModel, door: DoorConfig | None = None) -> Iterator[V2Server]:
    gate = 'parameters { key: "gate" value { string_value: "x" } }' if opener is FakeModel else ""
    for name, more in (("m", gate), ("many", "model_transaction_policy { decoupled: true }")):
        version = folder / "models" / name / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(MODEL.replace("FILE", repr(str(folder / "cancelled"))))
        (version.parent / "config.pbtxt").write_text(CONFIG + more)
    with serve_v2(RepositorySettings(model_repository=(str(folder / "models"),)), opener, door=door) as server:
        yield server


def ask(
    server: V2Server, content: bytes | Iterator[bytes], headers: dict[str, str], path: str = "/v2/models/m/infer"
) -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection(server.http, timeout=20)
    connection.request("POST", path, body=content, headers=headers)
    response = connection.getresponse()
    read = response.read()
    connection.close()
    return response, read


def wait_for(condition: Callable[[], bool]) -> None:
    """What the server does after its client has been answered, or has gone."""
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


REQUESTS: list[tuple[str, bytes, dict[str, str]]] = [
    ("/v2/models/m/infer", body(0.0, 2.5), {}),
    ("/v2/models/m/versions/1/infer", body(0.0, id="mine", parameters={"binary_data_output": True}), {}),
    ("/v2/models/m/infer", body(0.0), {"X-Request-Id": "of-the-client"}),
    ("/v2/models/m/infer", body(0.0), {"X-Request-Id": "not\tprintable"}),
    ("/v2/models/m/infer", body(0.0), {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}),
    ("/v2/models/m/infer", body(0.0, outputs=[{"name": "OUTPUT0", "parameters": {"classification": 1}}]), {}),
    ("/v2/models/m/infer", b"\0\0\0\0", {"Inference-Header-Content-Length": "0"}),
    ("/v2/models/m/infer", b"\0\0\0\0", {"Inference-Header-Content-Length": "x"}),
    ("/v2/models/m/infer", b"{", {}),
    ("/v2/models/m/infer", b"", {}),
    ("/v2/models/m/infer", json.dumps({"inputs": []}).encode(), {}),
    ("/v2/models/nobody/infer", body(0.0), {}),
    ("/v2/models/m/versions/7/infer", body(0.0), {}),
    ("/v2/models/many/infer", body(0.0), {}),
]


def told(response: HTTPResponse, content: bytes) -> tuple[Any, ...]:
    """What a client sees, without what is another for each request."""
    headers = {name.lower(): value for name, value in response.getheaders() if name.lower() != "date"}
    headers["x-request-id"] = re.sub(r"^req-[0-9a-f]{32}$", "new", headers["x-request-id"])
    headers["traceparent"] = headers.get("traceparent", "")[:35]
    return response.status, headers, content


def test_both_ways_answer_alike(tmp_path: Path, taken: list[bytes]) -> None:
    log = tmp_path / "log"
    with serving(tmp_path, door=DoorConfig(request_log=str(log))) as server:
        short = [told(*ask(server, content, headers, path)) for path, content, headers in REQUESTS]
        assert len(taken) == len(REQUESTS)
        long = [told(*ask(server, content, headers | LONG, path)) for path, content, headers in REQUESTS]
        assert len(taken) == len(REQUESTS)
        assert short == long
        assert {status for status, _, _ in short} == {200, 400, 404, 500, 501}
        wait_for(lambda: sum(server.metrics.requests.values()) == 2 * len(REQUESTS))
        assert {key: count % 2 for key, count in server.metrics.requests.items() if count % 2} == {}
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    kept = [(line["route"], line["status"], line["error"], line["trace"]) for line in lines]
    assert kept[: len(REQUESTS)] == kept[len(REQUESTS) :]
    assert [line["id"] for line in lines].count("of-the-client") == 2


def test_the_door_is_the_same(tmp_path: Path, taken: list[bytes]) -> None:
    keys = write_keys(
        tmp_path / "keys.toml",
        user="",
        ops='scopes = ["admin"]',
        few="requests_per_minute = 2",
        more="requests_per_minute = 2",
    )
    headers: list[dict[str, str]] = [{}, {"Authorization": "Bearer sk-llmserve-guess"}]
    headers += [{"Authorization": f"Bearer {keys['ops']}"}, {"x-api-key": keys["user"]}]
    with serving(tmp_path, door=DoorConfig(api_keys=str(tmp_path / "keys.toml"))) as server:
        short = [told(*ask(server, body(0.0), header)) for header in headers]
        long = [told(*ask(server, body(0.0), header | LONG)) for header in headers]
        assert short == long
        assert [status for status, _, _ in short] == [401, 401, 403, 200]
        few = [told(*ask(server, body(0.0), {"api-key": keys["few"]})) for _ in range(3)]
        more = [told(*ask(server, body(0.0), {"api-key": keys["more"]} | LONG)) for _ in range(3)]
        assert len(taken) == len(headers) + 3
    for one, other in zip(few, more, strict=True):
        assert one[0] == other[0]
        assert one[1].keys() == other[1].keys()
    assert [status for status, _, _ in few] == [200, 200, 429]
    assert few[0][1]["x-ratelimit-limit-requests"] == "2"
    assert "retry-after" in few[2][1]


@pytest.mark.parametrize(
    "headers",
    [
        {"Accept-Encoding": "gzip"},
        {"Content-Encoding": "identity"},
        {"Expect": "100-continue"},
        {"X-Request-Timeout": "5"},
        {},
    ],
    ids=str,
)
def test_what_needs_more_goes_the_long_way(tmp_path: Path, taken: list[bytes], headers: dict[str, str]) -> None:
    with serving(tmp_path) as server:
        response, _ = ask(server, body(0.0) if headers else iter([body(0.0)]), headers)  # an iterator: in chunks
        assert response.status == 200
        assert ask(server, body(*[0.0] * 20_000), {})[0].status == 200  # too large to be held
        assert taken == []


def test_a_time_limit_for_all_goes_the_long_way(tmp_path: Path, taken: list[bytes]) -> None:
    with serving(tmp_path, door=DoorConfig(request_timeout_s=0.2)) as server:
        response, _ = ask(server, body(5.0), {})
        assert response.status == 504
        assert taken == []


def raw(content: bytes, version: str = "1.1", more: str = "") -> bytes:
    head = f"POST /v2/models/m/infer HTTP/{version}\r\nHost: x\r\n{more}Content-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def read_answers(connection: socket.socket, count: int) -> list[dict[str, Any]]:
    """The bodies of the next answers on a connection."""
    file = connection.makefile("rb")
    answers = []
    for _ in range(count):
        lines = list(iter(file.readline, b"\r\n"))
        (length,) = (int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:"))
        answers.append(json.loads(file.read(length)))
    return answers


def test_one_connection_mixes_both_ways(tmp_path: Path, taken: list[bytes]) -> None:
    """In pieces, pipelined, by HTTP/1.0: all are answered, in order, each by the way that can."""
    with serving(tmp_path) as server, socket.create_connection(("127.0.0.1", server.http_port), 20) as connection:
        connection.sendall(raw(body(0.0, 1.0)))
        (first,) = read_answers(connection, 1)
        whole = raw(body(0.0, 2.0))
        connection.sendall(whole[:-9])
        time.sleep(0.05)
        connection.sendall(whole[-9:])
        (second,) = read_answers(connection, 1)
        assert len(taken) == 2
        connection.sendall(b"".join(raw(body(0.0, float(number))) for number in range(3, 8)))
        many = read_answers(connection, 5)
        connection.sendall(raw(body(0.0, 8.0)))
        (last,) = read_answers(connection, 1)
        assert [answer["outputs"][0]["data"][1] for answer in (first, second, *many, last)] == list(range(1, 9))
        assert len(taken) >= 4  # those that came alone, and the first of the pipelined
        for more in ("", "Origin: http://localhost\r\n"):
            connection.sendall(raw(body(0.2, 1.0), more=more) + raw(b"{"))  # the second could be answered at once
            assert [next(iter(answer)) for answer in read_answers(connection, 2)] == ["model_name", "error"]
        connection.sendall(raw(body(0.0, 9.0), version="1.0"))
        assert read_answers(connection, 1)[0]["outputs"][0]["data"][1] == 9
        assert connection.recv(1) == b""


def test_who_goes_before_all_is_sent_is_written_down(tmp_path: Path, taken: list[bytes]) -> None:
    log = tmp_path / "log"
    with serving(tmp_path, door=DoorConfig(request_log=str(log))) as server:
        for count, more in enumerate(("", "Origin: http://localhost\r\n"), 1):
            with socket.create_connection(("127.0.0.1", server.http_port), 20) as connection:
                connection.sendall(raw(body(0.0), more=more)[:-5])
            wait_for(lambda: sum(server.metrics.requests.values()) == count)  # noqa: B023 (called here)
        assert server.metrics.requests == {("/v2/models/{model}/infer", "POST", "4xx"): 2}
    short, long = (json.loads(line) for line in log.read_text().splitlines())
    assert {key for key in short if short[key] != long[key]} <= {"id", "time", "duration_s"}


@pytest.mark.parametrize("more", ["", "Origin: http://localhost\r\n"], ids=["short", "long"])
def test_a_body_is_no_request_whatever_protocol_its_own_asks_for(tmp_path: Path, taken: list[bytes], more: str) -> None:
    """Java's client asks for HTTP/2 with every request; a proxy that lets that pass must not be made to let more."""
    upgrade = more + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    whole, answers = raw(body(0.0, 1.0), more=upgrade), []
    hidden = raw(b"POST /v2/repository/models/m/unload HTTP/1.1\r\nHost: localhost\r\n\r\n", more=upgrade)
    with serving(tmp_path) as server, socket.create_connection(("127.0.0.1", server.http_port), 20) as connection:
        for first, second in (
            (whole, b""),
            (whole[:-9], whole[-9:]),
            (whole.partition(b"{")[0], b"{" + body(0.0, 1.0)[1:]),
        ):
            connection.sendall(first)
            time.sleep(0.05)
            connection.sendall(second)
            answers += read_answers(connection, 1)
        connection.sendall(whole * 3)
        answers += read_answers(connection, 3)
        assert [answer["outputs"][0]["data"] for answer in answers] == [[0.0, 1.0]] * 6
        assert bool(taken) == (not more)
        head, _, content = hidden.partition(b"\r\n\r\n")
        connection.sendall(head + b"\r\n\r\n")
        time.sleep(0.05)
        connection.sendall(content + raw(body(0.0, 2.0)))
        (error, last) = read_answers(connection, 2)
        assert "error" in error
        assert last["outputs"][0]["data"] == [0.0, 2.0]
        assert sum(server.metrics.requests.values()) == 8
    with serving(tmp_path / "again") as server:
        for connect in (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", b"CONNECT / HTTP/1.1\r\nHost: x\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", server.http_port), 20) as connection:
                connection.sendall(connect)
                assert connection.makefile("rb").read().startswith(b"HTTP/1.1 400")


def test_an_idle_time_ends_with_the_next_request(
    tmp_path: Path, taken: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if that came in the packet of the one before, which was answered from there."""
    monkeypatch.setattr("llmserve.api.http_server.uvicorn.Config", partial(uvicorn.Config, timeout_keep_alive=1))
    refused = raw(body(0.0)).replace(b"/m/", b"/nobody/")
    for more in ("", "Origin: http://localhost\r\n"):
        with (
            serving(tmp_path / str(len(more))) as server,
            socket.create_connection(("127.0.0.1", server.http_port), 20) as connection,
        ):
            connection.sendall(refused + raw(body(1.5), more=more))
            error, answer = read_answers(connection, 2)
            assert "error" in error
            assert answer["outputs"][0]["data"] == [1.5]
            assert connection.recv(1) == b""


def test_absurd_lengths_and_paths(tmp_path: Path, taken: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A length of thousands of zeros is one; a long path is forgotten."""
    remembered: list[DirectInfer] = []
    monkeypatch.setattr(DirectInfer, "accepts", _spy_on_self(DirectInfer.accepts, remembered))
    zeros = raw(body(0.0)).replace(b"Content-Length: ", b"Content-Length: " + b"0" * 5000)
    with serving(tmp_path) as server, socket.create_connection(("127.0.0.1", server.http_port), 20) as connection:
        for request in (zeros, zeros * 2, raw(body(0.0)).replace(b"/m/", b"/" + b"m" * 20_000 + b"/")):
            connection.sendall(request)
            for answer in read_answers(connection, request.count(b"POST")):
                assert ("outputs" in answer) == (b"mm" not in request)
        assert len(taken) == 1
        assert [url for url in remembered[0]._routes if len(url) > 512] == []


def _spy_on_self(accepts: Callable[..., bool], seen: list[DirectInfer]) -> Callable[..., bool]:
    def spy(self: DirectInfer, *args: Any) -> bool:
        seen.append(self)
        return accepts(self, *args)

    return spy


def test_connection_close_closes(tmp_path: Path, taken: list[bytes]) -> None:
    with serving(tmp_path) as server, socket.create_connection(("127.0.0.1", server.http_port), 20) as connection:
        connection.sendall(raw(body(0.0), more="Connection: close\r\n"))
        file = connection.makefile("rb")
        assert b"connection: close\r\n" in file.read()
        assert len(taken) == 1


@pytest.mark.parametrize("opener", [GeneralModel, FakeModel])
def test_a_client_that_goes_cancels_its_request(tmp_path: Path, taken: list[bytes], opener: Any) -> None:
    with serving(tmp_path, opener) as server:
        connection = socket.create_connection(("127.0.0.1", server.http_port), 20)
        connection.sendall(raw(body(30.0)))
        wait_for(lambda: bool(taken))
        time.sleep(0.1)  # until the model has it
        connection.close()
        wait_for(lambda: bool(server.metrics.requests))
        assert server.metrics.requests == {("/v2/models/{model}/infer", "POST", "4xx"): 1}
        if opener is GeneralModel:
            wait_for((tmp_path / "cancelled").exists)
            assert (tmp_path / "cancelled").read_text() == "cancelled\n"
            assert ask(server, body(0.0), {})[0].status == 200
        else:
            fake = next(model for model in reversed(FakeModel.opened) if model.name == "m")
            wait_for(lambda: fake.cancelled == 1)


def test_a_server_that_ends_answers_first(tmp_path: Path, taken: list[bytes]) -> None:
    answers: list[tuple[HTTPResponse, bytes]] = []
    with serving(tmp_path) as server:
        asking = threading.Thread(target=lambda: answers.append(ask(server, body(0.5), {})))
        asking.start()
        wait_for(lambda: bool(taken))
    asking.join()
    ((response, _),) = answers
    assert response.status == 200
    assert response.getheader("connection") == "close"


def test_nothing_of_a_request_waits_for_the_garbage_collector(tmp_path: Path, taken: list[bytes]) -> None:
    """Objects in a cycle would be memory that is cold each time, and grow by all that a request brings."""
    kinds = {"_Call", "InferStream", "Answering", "InferRequest"}

    def count() -> int:
        return sum(type(item).__name__ in kinds for item in gc.get_objects())

    with serving(tmp_path) as server:
        gc.collect()
        gc.disable()
        before = count()
        try:
            for content in (body(0.0), b"{", json.dumps({"inputs": []}).encode()):
                assert ask(server, content, {})[0].status in (200, 400, 500)
            wait_for(lambda: sum(server.metrics.requests.values()) == 3)
            wait_for(lambda: count() == before)
        finally:
            gc.enable()
    assert len(taken) == 3


def test_a_bug_of_ours_is_answered_and_costs_no_other_request(
    tmp_path: Path, taken: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a secret")

    with serving(tmp_path) as server:
        with monkeypatch.context() as patch:
            patch.setattr("llmserve.api.v2_http_direct.write_infer", broken)
            response, content = ask(server, body(0.0), {})
        assert (response.status, b"secret" in content) == (500, False)
        assert ask(server, body(0.0), {})[0].status == 200


def test_books_that_cannot_be_kept_cost_no_answer(
    tmp_path: Path, taken: list[bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def record(self: Journal, context: RequestContext) -> None:
        raise ValueError("I/O operation on closed file")

    monkeypatch.setattr(Journal, "record", record)
    with serving(tmp_path) as server:
        for headers in ({}, LONG):
            for _ in range(2):
                response, _ = ask(server, body(0.0), headers)
                assert response.status == 200
    assert len(taken) == 2
    assert len([line for line in caplog.messages if "could not be written down" in line]) == 4
