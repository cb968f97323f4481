"""Deadlines, slow clients, too many connections: each is answered, by its name, and none holds the others up."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Iterator

import pytest

from llmserve.api.settings import ApiSettings
from llmserve.config import DoorConfig
from tests.door.conftest import ASK, GuardedServer, ServeGuarded


@pytest.mark.parametrize("where", ["header", "body"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_a_request_and_its_generation(serve_guarded: ServeGuarded, where: str, stream: bool) -> None:
    served = serve_guarded()
    served.script.hold_after = 0
    headers = {"X-Request-Timeout": "0.05"} if where == "header" else {}
    body = ASK | {"stream": stream} | ({"timeout": 0.05} if where == "body" else {})
    with served.client() as client:
        late = client.post("/v1/chat/completions", json=body, headers=headers)
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "deadline_exceeded"
    assert "within its 0.05 s" in late.json()["error"]["message"]
    assert served.script.aborted.get(timeout=5) == served.script.request_ids[0]


def test_a_stream_that_has_begun_says_so_in_its_last_event(serve_guarded: ServeGuarded) -> None:
    served = serve_guarded()
    served.script.hold_after = 2
    with served.client() as client:
        text = client.post("/v1/chat/completions", json=ASK | {"stream": True, "timeout": 0.1}).text
    last = json.loads(text.strip().rpartition("data: ")[2])
    assert last["error"]["code"] == "deadline_exceeded"
    assert "[DONE]" not in text


def test_the_shorter_of_two_limits_counts(serve_guarded: ServeGuarded) -> None:
    served = serve_guarded(DoorConfig(request_timeout_s=0.05))
    served.script.hold_after = 0
    with served.client() as client:
        assert client.post("/v1/chat/completions", json=ASK | {"timeout": 60}).status_code == 504


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "1e9"])
def test_a_limit_that_is_none_is_refused(serve_guarded: ServeGuarded, value: str) -> None:
    with serve_guarded().client() as client:
        refused = client.get("/v1/models", headers={"X-Request-Timeout": value})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "X-Request-Timeout"
        assert client.post("/v1/chat/completions", json=ASK | {"timeout": -1}).status_code == 400


QUICK = DoorConfig(header_timeout_s=0.1, body_timeout_s=0.2, send_timeout_s=0.3, max_connections=20)


@pytest.fixture
def quick(serve_guarded: ServeGuarded) -> GuardedServer:
    return serve_guarded(QUICK, ApiSettings(max_body_bytes=10_000))


def answer_to(port: int, sent: bytes) -> bytes:
    """All that comes back before the connection is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(sent)
        received = b""
        while data := connection.recv(65536):
            received += data
    return received


POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"", b"408", b"request_timeout"),
        (b"GET / HT", b"408", b"request_timeout"),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nx-slow: ", b"408", b"request_timeout"),
        (POST + b"content-length: 100\r\n\r\n{", b"408", b"request_timeout"),
        (POST + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n", b"408", b"request_timeout"),
        (POST + b"content-length: 1000000000\r\n\r\n", b"413", b"request_too_large"),
        (b"\x16\x03\x01\x02\x00\x01\x00", b"400", b"bad_request"),
        (b"GET / HTTP/9.9\r\n\r\n", b"400", b"bad_request"),
    ],
    ids=["silent", "line", "headers", "body", "chunks", "declared", "TLS", "version"],
)
def test_who_does_not_send_a_request_is_answered_and_let_go(
    quick: GuardedServer, sent: bytes, status: bytes, code: bytes
) -> None:
    received = answer_to(quick.port, sent)
    assert received.startswith(b"HTTP/1.1 " + status)
    assert b'"code":"' + code + b'"' in received
    with quick.client() as client:
        assert client.get("/health").status_code == 200
    assert quick.metrics.http.refused == ({} if status == b"413" else {code.decode(): 1})  # that was a route's answer


def test_endless_headers_are_cut_off_at_the_limit(serve_guarded: ServeGuarded) -> None:
    received = answer_to(serve_guarded().port, b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 65_520)
    assert received.startswith(b"HTTP/1.1 431")
    assert b'"code":"headers_too_large"' in received


def test_a_second_request_on_a_connection_has_its_own_time(quick: GuardedServer) -> None:
    with socket.create_connection(("127.0.0.1", quick.port), timeout=10) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b"200 OK" in connection.recv(65536)
        connection.sendall(b"GET /version HT")
        received = b""
        while data := connection.recv(65536):
            received += data
    assert b"HTTP/1.1 408" in received


def test_an_endless_body_is_cut_off_at_the_limit(quick: GuardedServer) -> None:
    with socket.create_connection(("127.0.0.1", quick.port), timeout=10) as connection:
        connection.sendall(POST + b"transfer-encoding: chunked\r\n\r\n")
        received = b""
        with contextlib.suppress(OSError):
            for _ in range(10_000):
                connection.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
        with contextlib.suppress(OSError):
            received = connection.recv(65536)
    assert received.startswith(b"HTTP/1.1 413") or not received  # the reset may overtake the answer
    with quick.client() as client:
        assert client.get("/health").status_code == 200


@contextlib.contextmanager
def idle_connections(port: int, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10)) for _ in range(count)]


def test_one_connection_too_many_is_told_so(quick: GuardedServer) -> None:
    with idle_connections(quick.port, 20) as connections:
        for connection in connections:
            connection.sendall(b"G")
        received = answer_to(quick.port, b"")
    assert received.startswith(b"HTTP/1.1 503")
    assert b"too_many_connections" in received
    assert b"retry-after: 1" in received
    assert 'http_connections_refused_total{reason="too_many_connections"} 1.0' in quick.metrics.render().decode()


def test_idle_connections_are_let_go_and_others_are_served(serve_guarded: ServeGuarded) -> None:
    served = serve_guarded(DoorConfig(header_timeout_s=0.5))
    with idle_connections(served.port, 300) as connections, served.client() as client:
        assert client.get("/health").status_code == 200
        for connection in connections:
            received = b""
            while data := connection.recv(4096):
                received += data
            assert received.startswith(b"HTTP/1.1 408")
    assert served.metrics.http.refused == {"request_timeout": 300}


def test_open_connections_are_counted(serve_guarded: ServeGuarded) -> None:
    served = serve_guarded()
    with idle_connections(served.port, 5), served.client() as client:
        assert "\nhttp_connections 6.0\n" in client.get("/metrics").text


def test_a_client_that_does_not_read_is_not_buffered_for(serve_guarded: ServeGuarded) -> None:
    """Its stream stops at the socket's buffers, and is aborted when it has not read for the configured time."""
    served = serve_guarded(DoorConfig(send_timeout_s=0.3), ApiSettings(max_body_bytes=1 << 20))
    served.script.answer = "x" * 500_000
    served.model.max_model_len = 10**6
    body = json.dumps(ASK | {"stream": True, "max_tokens": 500_000}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(body) + body
        )
        assert served.script.aborted.get(timeout=20) == served.script.request_ids[0]
    with served.client() as client:  # by the time it is answered, the counter has moved
        assert client.get("/health").status_code == 200
    assert served.metrics.model("scripted").client_disconnects == 1
    assert served.metrics.http.refused == {"slow_reader": 1}


def test_a_large_body_is_checked_beside_the_streams(serve_guarded: ServeGuarded) -> None:
    """A stream goes on while two megabytes of messages are validated: the loop is not held up by them."""
    served = serve_guarded(settings=ApiSettings(max_body_bytes=8 << 20))
    many = {"messages": [{"role": "user", "content": "x"}] * 50_000}
    with served.client() as client:
        refused = client.post("/v1/chat/completions", json=many)
    assert refused.status_code == 400
    assert "more than 4096 messages" in refused.json()["error"]["message"]


def test_the_bodies_of_all_requests_are_bounded_together(serve_guarded: ServeGuarded) -> None:
    """Two that are being sent find no room: one of them is told. Small ones always do, and large ones later."""
    served = serve_guarded(DoorConfig(max_body_memory=1 << 20), ApiSettings(max_body_bytes=8 << 20))
    address, part = ("127.0.0.1", served.port), POST + b"content-length: 2000000\r\n\r\n" + b" " * 600_000
    with served.client() as client:
        with socket.create_connection(address) as one, socket.create_connection(address) as other:
            for connection in (one, other):
                connection.sendall(part)
            (refused, *_), _, _ = select.select([one, other], [], [], 20)
            answer = refused.recv(65536)
            assert answer.startswith(b"HTTP/1.1 429 ")
            assert b"retry-after: 1" in answer
            assert b"max_body_memory" in answer
            assert client.post("/v1/chat/completions", json=ASK).status_code == 200
        large, until_s = ASK | {"messages": [{"role": "user", "content": "x" * 600_000}]}, time.monotonic() + 20
        while (last := client.post("/v1/chat/completions", json=large)).status_code == 429:
            assert time.monotonic() < until_s
        assert "context" in last.json()["error"]["message"]


@pytest.mark.parametrize("line", [b"x-more: " + b"y" * 1000 + b"\r\n", b"y" * 1000])
@pytest.mark.parametrize("head", [POST, b"POST /nowhere HTTP/1.1\r\nhost: a\r\n"], ids=["read", "answered"])
def test_trailers_without_end_are_not_kept(serve_guarded: ServeGuarded, head: bytes, line: bytes) -> None:
    served = serve_guarded()
    start = head + b"transfer-encoding: chunked\r\n\r\n0\r\nx: "
    received, num_sent = b"", 0
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(start)
        with contextlib.suppress(OSError):
            for num_sent in range(20_000):  # noqa: B007  # read below
                connection.sendall(line)
        with contextlib.suppress(OSError):
            received = connection.recv(65536)
    assert num_sent < 15_000  # what the sockets hold, and no more
    assert received == b"" or received.startswith(b"HTTP/1.1 4")


def test_a_trailer_is_no_header(serve_guarded: ServeGuarded) -> None:
    body = json.dumps(ASK).encode()
    sent = (
        POST.replace(b"/v1/", b"/v1/chat/")
        + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
        + b"".join(b"1\r\n%c\r\n" % byte for byte in body)
        + b"0\r\nx-request-timeout: soon\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", serve_guarded().port), timeout=10) as connection:
        connection.sendall(sent)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
