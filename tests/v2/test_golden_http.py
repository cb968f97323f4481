"""Replays what the real Triton answered over HTTP. Every answer that differs stands in DEVIATIONS with its reason."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

import pytest

from llmserve.backends.general import GeneralModel
from tests.v2.v2_server import GOLDEN, V2Server, serve_golden

SHARED_MEMORY = "shared memory is not served yet: registering answers 501 and says so"
SEQUENCES = "sequence batching is not served yet: the model is unavailable and says why"
ENSEMBLES = "ensembles are not served yet: the model is unavailable and says why"
CACHE = "the response cache is not served yet: the model is unavailable and says why"
HEALTH_BODY = "the body that the protocol's specification asks for, where Triton sends none"
REASON = "why the model is not ready is said as well"
OTHER_APP = "the route belongs to the application that stands behind the v2 skin"

# exchange -> why our answer is not Triton's
DEVIATIONS: dict[str, str] = {
    "GET /v2": "our own name, version, and the extensions that are served",
    "GET /v2/health/live": HEALTH_BODY,
    "simple-ready-after-dep": HEALTH_BODY,
    "simple-ready-after-ensload": HEALTH_BODY,
    "GET /v2/models/identity/versions/9/ready": REASON,
    "GET /v2/models/nope/ready": REASON,
    "GET /v2/models/broken_load/ready": REASON,
    "GET /": OTHER_APP,
    "GET /v1/models": OTHER_APP,
    "GET /metrics": OTHER_APP,
    "dtype-UINT8-[256]": "400: a value out of range is an error, where Triton wraps it to 0",
    "dtype-FP16-[1.0]": "FP16 is taken in JSON",
    "bin-fp16-jsonout": "FP16 is sent in JSON",
    "bin-no-ihcl": "400: an empty Inference-Header-Content-Length is no number, where Triton reads it as raw mode",
    "bin-ihcl-text": "400: a header that is no number is refused, as by newer Tritons; 2.51 reads it as raw mode",
    "bin-bytes-nonutf8-jsonout": "bytes that are no UTF-8 are escaped, where Triton's answer is not valid JSON",
    "infer-extra-input": "an empty list of missing inputs is written as [], where Triton writes a lone bracket",
    "gen-missing": "the missing input is named, where Triton hands the request to the model, which fails",
    "generate-llm_stream": "400 in place of 200 with an error in it",
    "gen-decoupled-zero": "400 in place of 200 with an error in it",
    "GET /v2/models/seq_direct/config": SEQUENCES,
    "seq-seq_direct-42-1": SEQUENCES,
    "seq-seq_oldest-42-2": SEQUENCES,
    "seq-seq_oldest-42-3": SEQUENCES,
    "seq-seq_string-a-b-c-1": SEQUENCES,
    "seq-seq_direct-string-on-u64-str-id-1": SEQUENCES,
    "seq-seq_string-int-on-string-9-1": SEQUENCES,
    "seq-batch2": SEQUENCES,
    "GET /v2/models/ens": ENSEMBLES,
    "ens": ENSEMBLES,
    "ens-id-params": ENSEMBLES,
    "reload-ens": ENSEMBLES,
    "cache-0": CACHE,
    "GET /v2/models/stats": "the models that are not served yet are not listed",
    "shm-register": SHARED_MEMORY,
    "shm-register-bad": SHARED_MEMORY,
    "shm-register-toolarge": SHARED_MEMORY,
    "shm-register-nokey": SHARED_MEMORY,
    "shm-status": SHARED_MEMORY,
    "shm-status1": SHARED_MEMORY,
    "shm-infer-oob": SHARED_MEMORY,
    "shm-infer-size-mismatch": SHARED_MEMORY,
    "shm-out-too-small": SHARED_MEMORY,
    "cuda-register": SHARED_MEMORY,
}

# Recorded state that nothing recorded brings about: what was asked for just before the exchange named.
BEFORE: dict[str, list[tuple[str, Any]]] = {
    "cfg-after": [
        (
            "/v2/repository/models/warm/load",
            {
                "parameters": {
                    "config": json.dumps(
                        {
                            "backend": "python",
                            "max_batch_size": 2,
                            "input": [{"name": "INPUT0", "data_type": "TYPE_FP32", "dims": [2]}],
                            "output": [{"name": "OUTPUT0", "data_type": "TYPE_FP32", "dims": [2]}],
                            "instance_group": [{"kind": "KIND_CPU"}],
                        }
                    )
                }
            },
        )
    ],
    "infer-uploaded": [
        (
            "/v2/repository/models/uploaded/load",
            {
                "parameters": {
                    "config": json.dumps(
                        {
                            "backend": "python",
                            "input": [{"name": "INPUT0", "data_type": "TYPE_FP32", "dims": [-1]}],
                            "output": [{"name": "OUTPUT0", "data_type": "TYPE_FP32", "dims": [-1]}],
                        }
                    ),
                    "file:1/model.py": base64.b64encode(
                        (GOLDEN / "model_repository/identity/1/model.py").read_bytes()
                    ).decode(),
                }
            },
        )
    ],
}


@dataclass
class Answer:
    """What came back, in the terms the recording has."""

    status: int
    content_type: str
    headers: dict[str, str]
    body: bytes


def load_exchanges() -> list[dict[str, Any]]:
    """In the order they were sent."""
    return [json.loads(line) for line in (GOLDEN / "http.jsonl").read_text(encoding="utf-8").splitlines()]


def send(server: V2Server, method: str, path: str, headers: dict[str, str], body: bytes | None) -> Answer:
    """One exchange on a connection of its own."""
    connection = HTTPConnection(server.http, timeout=30)
    try:
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        received = {key.lower(): value for key, value in response.getheaders()}
        return Answer(response.status, received.get("content-type", ""), received, response.read())
    finally:
        connection.close()


def differences(exchange: dict[str, Any], answer: Answer) -> list[str]:
    """What is not as recorded; numbers that are times and counts float."""
    found = []
    if answer.status != exchange["status"]:
        found.append(f"status {answer.status}, recorded {exchange['status']}")
    recorded_type = exchange["headers"].get("content-type", "")
    if exchange["status"] >= 400 or not exchange["body"]:
        recorded_type = recorded_type if "event-stream" in recorded_type else answer.content_type
    if answer.content_type != recorded_type:
        found.append(f"content type {answer.content_type}, recorded {recorded_type}")
    for header in ("inference-header-content-length", "content-encoding"):
        if answer.headers.get(header) != exchange["headers"].get(header):
            found.append(f"{header} {answer.headers.get(header)}, recorded {exchange['headers'].get(header)}")
    body = exchange["body"]
    recorded = base64.b64decode(body["b64"]) if isinstance(body, dict) else body.encode()
    ours = answer.body
    if exchange["headers"].get("content-encoding") == answer.headers.get("content-encoding") == "deflate":
        recorded, ours = zlib.decompress(recorded), zlib.decompress(ours)
    if not same_body(exchange["path"], ours, recorded):
        found.append(f"body {ours!r}, recorded {recorded!r}")
    return found


def same_body(path: str, ours: bytes, recorded: bytes) -> bool:
    """Equal as JSON where both are, event by event where they are streams, byte for byte otherwise."""
    if ours == recorded:
        return True
    try:
        if path.endswith("/stats"):
            return bool(shape_of(json.loads(ours)) == shape_of(json.loads(recorded)))
        if recorded.startswith(b"data: "):
            return [json.loads(event[6:]) for event in ours.split(b"\n\n") if event] == [
                json.loads(event[6:]) for event in recorded.split(b"\n\n") if event
            ]
        return bool(comparable(json.loads(ours)) == comparable(json.loads(recorded)))
    except ValueError:
        return False


def comparable(value: Any) -> Any:
    """Without the path of the file in which a model failed."""
    return json.loads(re.sub(r"[^ \"\\]*model_repository/", "model_repository/", json.dumps(value)))


def shape_of(value: Any) -> Any:
    """Statistics without their numbers."""
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items() if key not in ("response_stats", "batch_stats")}
    if isinstance(value, list):
        return [shape_of(item) for item in value]
    return 0 if isinstance(value, int) else value


@pytest.fixture(scope="module")
def server() -> Iterator[V2Server]:
    with serve_golden(["*"], open_model) as running:
        yield running


def open_model(name: str, *where: Any) -> GeneralModel:
    """Forty processes would cost more than all that is asked of them: only models that must not hold the server up have
    their own, as all have in other tests."""
    return GeneralModel(name, *where, inline=not name.startswith("slow"))


@pytest.fixture(scope="module")
def replayed(server: V2Server) -> dict[int, list[str]]:
    """position -> differences, for every exchange, all sent in the recorded order."""
    results: dict[int, list[str]] = {}
    exchanges = load_exchanges()
    for position, exchange in enumerate(exchanges):
        if exchange["name"].startswith("burst-"):
            continue  # sent together, below
        for path, body in BEFORE.get(exchange["name"], ()):
            assert send(server, "POST", path, {}, json.dumps(body).encode()).status == 200
        body = exchange["req"]
        encoded = None if body is None else body.encode("latin-1")
        answer = send(server, exchange["method"], exchange["path"], exchange["req_headers"], encoded)
        results[position] = differences(exchange, answer)
    return results


EXCHANGES = [
    pytest.param(position, exchange, id=f"{position}-{exchange['name']}")
    for position, exchange in enumerate(load_exchanges())
    if not exchange["name"].startswith("burst-")
]


@pytest.mark.parametrize(("position", "exchange"), EXCHANGES)
def test_answer_is_tritons(position: int, exchange: dict[str, Any], replayed: dict[int, list[str]]) -> None:
    found = replayed[position]
    if exchange["name"] in DEVIATIONS:
        assert found, f"no longer differs; take it out of the table: {DEVIATIONS[exchange['name']]}"
    else:
        assert not found


def burst(server: V2Server, model: str) -> list[Answer]:
    """Eight requests at once."""

    def one(number: int) -> Answer:
        body = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1, 1], "data": [number]}]}
        return send(server, "POST", f"/v2/models/{model}/infer", {}, json.dumps(body).encode())

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, range(8)))


RECORDED_BURSTS = sorted(
    {(e["path"], e["status"], e["body"]) for e in load_exchanges() if e["name"].startswith("burst-")}
)


def test_recorded_errors_of_a_full_queue(server: V2Server, replayed: dict[int, list[str]]) -> None:
    answers = burst(server, "slow_reject")
    recorded = {(status, body) for path, status, body in RECORDED_BURSTS if "slow_reject" in path and status == 503}
    refused = {(answer.status, answer.body.decode()) for answer in answers if answer.status == 503}
    assert (
        refused
        == recorded
        == {
            (503, '{"error":"[request id: <id_unknown>] Exceeds maximum queue size"}'),
            (503, '{"error":"Request timeout expired"}'),
        }
    )
    assert any(answer.status == 200 for answer in answers)


@pytest.mark.parametrize("model", ["slow_prio", "slow_default", "slow_delay", "slow_nodyn"])
def test_bursts_that_wait_are_answered_as_recorded(
    server: V2Server, replayed: dict[int, list[str]], model: str
) -> None:
    exchanges = [e for e in load_exchanges() if e["name"].startswith(f"burst-{model}")]

    def one(exchange: dict[str, Any]) -> list[str]:
        return differences(exchange, send(server, "POST", exchange["path"], {}, exchange["req"].encode()))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, exchanges))
    assert len(found) >= 3
    assert not any(found)


def test_the_table_names_recorded_exchanges() -> None:
    assert set(DEVIATIONS) <= {exchange["name"] for exchange in load_exchanges()}
