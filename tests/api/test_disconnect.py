"""A client that goes away is aborted at once, whatever its request was waiting for. Real sockets, closed hard."""

from __future__ import annotations

import json
import socket
import struct

import httpx
import pytest


def open_request(port: int, path: str, body: dict) -> socket.socket:
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return connection


def reset(connection: socket.socket) -> None:
    """Closes with RST, as a killed process or a failed network would."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
STREAM = {**CHAT, "stream": True}
REQUESTS = [  # (path, body, generations it starts, tokens that come before the client goes)
    ("/v1/chat/completions", CHAT, 1, 0),
    ("/v1/chat/completions", CHAT, 1, 5),
    ("/v1/chat/completions", STREAM, 1, 0),
    ("/v1/chat/completions", STREAM, 1, 5),
    ("/v1/chat/completions", {**STREAM, "n": 3}, 1, 5),
    ("/v1/completions", {"prompt": ["a", "b", "c"]}, 3, 0),
    ("/v1/completions", {"prompt": ["a", "b", "c"]}, 3, 5),
    ("/v1/completions", {"prompt": ["a", "b", "c"], "stream": True}, 3, 0),
    ("/v1/completions", {"prompt": ["a", "b", "c"], "stream": True}, 3, 5),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0, "echo": True}, 1, 0),
]


@pytest.mark.parametrize(("path", "body", "num_generations", "hold_after"), REQUESTS)
@pytest.mark.parametrize("close", [reset, socket.socket.close])
def test_generation_ends_with_its_client(served, path, body, num_generations, hold_after, close):
    served.script.hold_after = hold_after
    metrics = served.metrics.model("scripted")
    before = metrics.client_disconnects
    connection = open_request(served.port, path, body)
    for _ in range(num_generations):
        served.script.held.get(timeout=5)
    close(connection)
    aborted = {served.script.aborted.get(timeout=5) for _ in range(num_generations)}
    assert aborted == set(served.script.request_ids)
    served.script.hold_after = None
    with httpx.Client(base_url=served.url) as client:  # one that stays is answered, and by then the counter has moved
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert metrics.client_disconnects == before + 1


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
def test_a_client_that_closes_its_sending_side_counts_as_gone(served, body):
    """See `HttpProtocol.eof_received`: its FIN is that of a client that has closed."""
    served.script.hold_after = 3
    connection = open_request(served.port, "/v1/chat/completions", body)
    served.script.held.get(timeout=5)
    connection.shutdown(socket.SHUT_WR)
    assert served.script.aborted.get(timeout=5) == served.script.request_ids[0]
    while connection.recv(65536):  # what had been sent before; then the end
        pass
    connection.close()


def test_client_that_goes_in_the_middle_of_a_stream(served):
    """It has read a part, and there is more to come at full speed: the send side notices."""
    served.script.answer = "x" * 400
    served.script.hold_after = 300
    connection = open_request(served.port, "/v1/chat/completions", {**CHAT, "stream": True})
    assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    held = served.script.held.get(timeout=5)
    reset(connection)
    held.release()
    assert served.script.aborted.get(timeout=5) == served.script.request_ids[0]


def test_many_that_vanish_leave_nothing_behind(served):
    served.script.hold_after = 3
    connections = [
        open_request(served.port, "/v1/chat/completions", {**CHAT, "stream": bool(number % 2)}) for number in range(50)
    ]
    for connection in connections[:25]:
        reset(connection)
    for connection in connections[25:]:
        connection.close()
    # a request whose client went before it was read may never have started
    served.script.hold_after = None
    with httpx.Client(base_url=served.url) as client:
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    started = set(served.script.request_ids[:-1])
    assert {served.script.aborted.get(timeout=5) for _ in started} == started


def test_client_that_goes_while_it_sends_its_body(served):
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=10)
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: 1000\r\n\r\n{"
    )
    reset(connection)
    with httpx.Client(base_url=served.url) as client:
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert len(served.script.specs) == 1
