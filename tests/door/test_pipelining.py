"""Requests that come before those before them are answered: a few wait their turn, and nobody may pile them up."""

from __future__ import annotations

import json
import socket

import pytest

from tests.door.conftest import ASK, ServeGuarded

HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
PROBE = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"


def test_requests_that_wait_are_answered_in_order(serve_guarded: ServeGuarded) -> None:
    port = serve_guarded().port
    body = json.dumps(ASK)
    asked = (f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}").encode()
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall((asked + PROBE) * 50)
        while received.count(b"HTTP/1.1 200 OK") < 100 or not received.endswith(b"]}"):
            received += connection.recv(65536)
    kinds = [b'"chat.completion"' in answer for answer in received.split(b"HTTP/1.1 200 OK")[1:]]
    assert kinds == [True, False] * 50


def test_who_piles_them_up_and_reads_no_answer_is_let_go(serve_guarded: ServeGuarded) -> None:
    """Each request took some 2 KiB until it was answered, and none of them was."""
    served = serve_guarded()
    flood = PROBE * 200_000
    with (
        socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection,
        pytest.raises((BrokenPipeError, ConnectionResetError)),
    ):
        connection.sendall(flood)
    with served.client() as client:
        assert client.get("/health").status_code == 200
    assert served.metrics.http.refused == {"too_many_pipelined": 1}


def test_a_client_that_goes_leaves_the_request_that_is_answered_too(serve_guarded: ServeGuarded) -> None:
    """Not only the last that it has sent."""
    served = serve_guarded()
    served.script.hold_after = 1
    body = json.dumps(ASK)
    asked = (f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}").encode()
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(asked + PROBE)
        held = served.script.held.get(timeout=10)
    assert served.script.aborted.get(timeout=10) == held.request_id
