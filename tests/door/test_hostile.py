"""Requests that mean harm, or nothing: every answer names the cause, and the server goes on.

Bounded: some thousand inputs. Deterministic, so that what fails once fails always.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from llmserve.api.app import create_routes
from llmserve.api.settings import ApiSettings
from llmserve.chat_template import ChatTemplate
from llmserve.config import DoorConfig
from llmserve.metrics import Metrics
from tests.api.conftest import Directory
from tests.door.conftest import ASK, GuardedServer, run_guarded

CHAT = "/v1/chat/completions"
ROUTES = [CHAT, "/v1/completions", "/tokenize", "/detokenize"]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def target() -> Iterator[GuardedServer]:
    door = DoorConfig(header_timeout_s=0.3, body_timeout_s=0.3)
    with run_guarded(door, ApiSettings(max_body_bytes=4 << 20)) as served:
        yield served


@pytest.fixture
def client(target: GuardedServer) -> Iterator[httpx.Client]:
    """Whatever a test did, the server answers afterwards."""
    with target.client() as client:
        yield client
        assert client.get("/health").status_code == 200
        assert client.post(CHAT, json=ASK).status_code == 200


def assert_explained(answer: httpx.Response) -> None:
    """A 4xx in the protocol's shape."""
    assert 400 <= answer.status_code < 500, answer.text[:300]
    error = answer.json()["error"]
    assert error["message"]
    assert error["code"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("depth", [1000, 200_000])
@pytest.mark.parametrize("shape", ["list", "object", "inside"])
def test_json_that_is_nested_too_deeply(client: httpx.Client, route: str, depth: int, shape: str) -> None:
    body = {
        "list": "[" * depth + "]" * depth,
        "object": '{"a":' * depth + "1" + "}" * depth,
        "inside": '{"messages":' + "[" * depth + "]" * depth + "}",
    }[shape]
    assert_explained(client.post(route, content=body, headers=JSON))


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"\xef\xbb\xbf{}",
        b'{"a": 1',
        b"",
        b"null",
        b"[]",
        b'{"messages": NaN}',
        b'{"messages": 1e999}',
        b"\x00" * 1000,
    ],
)
def test_bytes_that_are_no_json_object(client: httpx.Client, body: bytes) -> None:
    for route in ROUTES:
        assert_explained(client.post(route, content=body, headers=JSON))


ABSURD: list[Any] = [-1, 2**31, 2**63, 10**400, -1e308, 5e-324, True, "1", {}]


@pytest.mark.parametrize(
    "field",
    [
        *("n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "logit_bias"),
        *("seed", "repetition_penalty", "stop", "stop_token_ids", "bad_words", "allowed_token_ids", "priority"),
        *("prompt_logprobs", "top_logprobs", "stream_options", "cache_salt", "messages"),
    ],
)
def test_absurd_values(client: httpx.Client, field: str) -> None:
    for value in ABSURD:
        text = json.dumps(ASK | {field: "@@"}).replace('"@@"', str(value) if value == 10**400 else json.dumps(value))
        answer = client.post(CHAT, content=text, headers=JSON)
        if answer.status_code != 200:
            assert_explained(answer)
            message = answer.json()["error"]["message"]
            assert field in message or "JSON" in message, (value, message)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"n": 129}, "n"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ["x" * 2000]}, "stop"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"bad_words": ["x"] * 300}, "bad_words"),
        ({"messages": [{"role": "user", "content": "x"}] * 5000}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        ({"x" * 10_000: 1}, "x" * 10),
        ({f"field {i}": i for i in range(10_000)}, "field 0"),
    ],
    ids=["n", "stops", "long stop", "biases", "bad words", "messages", "prompt", "name", "names"],
)
def test_each_limit_has_its_own_words(client: httpx.Client, fields: dict[str, Any], named: str) -> None:
    answer = client.post(CHAT, json=ASK | fields)
    assert_explained(answer)
    assert named in answer.json()["error"]["message"]
    assert len(answer.text) < 1000


def test_mutated_requests(target: GuardedServer, client: httpx.Client) -> None:
    """Bytes changed, dropped, doubled and moved, in the request line, the headers and the body."""
    random_ = random.Random(0)
    body = json.dumps(ASK | {"stream": True, "stop": ["a"], "logit_bias": {"5": 1}}).encode()
    whole = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body
    )
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(partial(exchange, target.port), [mutate(whole, random_) for _ in range(400)]))
    statuses = Counter(answer[9:10] for answer in answers)
    assert set(statuses) <= {b"", b"2", b"4"}, [answer[:300] for answer in answers if answer[9:10] == b"5"]
    assert statuses[b"4"] > 50
    assert statuses[b"2"] >= 3


def mutate(whole: bytes, random_: random.Random) -> bytes:
    mutated = bytearray(whole)
    for _ in range(random_.randint(1, 4)):
        begin = random_.randrange(len(mutated))
        piece = mutated[begin : begin + random_.randint(1, 12)]
        match random_.randrange(4):
            case 0:
                mutated[begin] = random_.randrange(256)
            case 1:
                del mutated[begin : begin + len(piece)]
            case 2:
                mutated[begin:begin] = piece * random_.randint(1, 5)
            case _:
                place = random_.randrange(len(mutated))
                mutated[place:place] = piece
    return bytes(mutated)


def exchange(port: int, sent: bytes) -> bytes:
    """All that comes back before the server closes the connection."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection, contextlib.suppress(OSError):
        connection.sendall(sent)
        while data := connection.recv(65536):
            received += data
    return received


schema = schemathesis.openapi.from_dict(create_routes(Directory([]), ApiSettings(), Metrics()).openapi())


@pytest.mark.parametrize("route", ROUTES)
def test_whatever_the_schema_allows_is_answered(target: GuardedServer, client: httpx.Client, route: str) -> None:
    """Never a 5xx: what the schema allows and the server does not is a 4xx that says why."""
    operation = schema[route]["POST"]
    counted: Counter[int] = Counter()

    @given(case=operation.as_strategy())
    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def ask(case: Any) -> None:
        answer = client.post(route, json=case.body) if not isinstance(case.body, bytes) else client.post(route)
        counted[answer.status_code] += 1
        if answer.status_code != 200 and not (answer.status_code == 504 and "timeout" in case.body):
            assert_explained(answer)

    target.model.script.answer = "Hi"
    ask()
    assert sum(counted.values()) >= 10


def test_a_template_that_loops_is_the_requests_error(target: GuardedServer, client: httpx.Client) -> None:
    looping = ChatTemplate("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", {})
    tokenizer = target.model.tokenizer
    apply = tokenizer.apply_chat_template

    def loop(messages: Any, **options: Any) -> str:
        return looping.render(
            messages, add_generation_prompt=False, continue_final_message=False, tools=None, variables={}
        )

    tokenizer.apply_chat_template = loop  # type: ignore[method-assign,assignment]
    try:
        answer = client.post(CHAT, json=ASK)
    finally:
        tokenizer.apply_chat_template = apply  # type: ignore[method-assign]
    assert_explained(answer)
    assert "too many steps" in answer.json()["error"]["message"] or "loops over" in answer.json()["error"]["message"]
