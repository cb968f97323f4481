"""The HTTP client: framing cut at any byte with exact arrival times, connections kept, dropped, lost."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llmserve.errors import ConfigError
from llmserve.tools.http_client import ClientError, Connection, HttpClient, Piece, Url, read_all


class Wire:
    """A connection whose other end is the test: bytes and time are what it says."""

    class _Transport(asyncio.Transport):
        def __init__(self) -> None:
            super().__init__()
            self.written = b""
            self.aborted = False

        def write(self, data: Any) -> None:
            self.written += data

        def abort(self) -> None:
            self.aborted = True

    def __init__(self) -> None:
        self.now_s = 0.0
        self.transport = self._Transport()
        self.connection = Connection(lambda: self.now_s)
        self.connection.connection_made(self.transport)
        self.connection.send(b"GET / HTTP/1.1\r\n\r\n")

    def arrive(self, time_s: float, data: bytes) -> None:
        self.now_s = time_s
        self.connection.data_received(data)


RESPONSES = {
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n5;x=y\r\ndefgh\r\n0\r\n\r\n",
    "length": b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nabcdefgh",
    "continue": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nabcdefgh",
    "until the end": b"HTTP/1.1 200 OK\r\n\r\nabcdefgh",
}


@pytest.mark.parametrize("framing", RESPONSES)
def test_a_body_survives_every_cut(framing: str) -> None:
    raw = RESPONSES[framing]

    async def read(parts: list[bytes]) -> bytes:
        wire = Wire()
        for part in parts:
            wire.arrive(0.0, part)
        if framing == "until the end":
            assert not wire.connection.complete
            wire.connection.connection_lost(None)
        await wire.connection.wait_headers()
        assert wire.connection.status == 200
        body = await read_all(wire.connection)
        assert wire.connection.complete
        assert wire.connection.keep_alive == (framing != "until the end")
        return body

    async def main() -> None:
        for cut in range(1, len(raw)):
            assert await read([raw[:cut], raw[cut:]]) == b"abcdefgh"
        assert await read([bytes([byte]) for byte in raw]) == b"abcdefgh"

    asyncio.run(main())


def test_an_interim_response_is_not_the_answer() -> None:
    wire = Wire()
    wire.arrive(0.0, b"HTTP/1.1 100 Continue\r\n\r\n")
    assert not wire.connection.headers_complete
    assert not wire.connection.complete


def test_pieces_carry_the_time_they_arrived_not_the_time_they_were_read() -> None:
    async def main() -> None:
        wire = Wire()
        wire.arrive(1.0, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        wire.arrive(2.5, b"2\r\nbc\r\n")
        wire.now_s = 99.0  # the reader comes late
        assert await wire.connection.read() == [Piece(1.0, b"a"), Piece(2.5, b"bc")]
        wire.arrive(100.0, b"0\r\n\r\n")
        assert await wire.connection.read() == []

    asyncio.run(main())


def test_a_reader_that_waits_is_woken_by_data_and_by_the_end() -> None:
    async def main() -> None:
        wire = Wire()
        headers = asyncio.create_task(wire.connection.wait_headers())
        await asyncio.sleep(0)
        wire.arrive(0.0, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
        await headers
        read = asyncio.create_task(wire.connection.read())
        await asyncio.sleep(0)
        assert not read.done()
        wire.arrive(3.0, b"ok")
        assert await read == [Piece(3.0, b"ok")]
        assert await wire.connection.read() == []

    asyncio.run(main())


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b"", "disconnected"),
        (b"HTTP/1.1 200 OK\r\nContent-Len", "disconnected"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", "disconnected"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", "disconnected"),
        (b"SSH-2.0-OpenSSH\r\n", "protocol"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n", "protocol"),
    ],
)
def test_a_body_that_breaks_off_is_an_error_after_what_came_before(raw: bytes, kind: str) -> None:
    async def main() -> None:
        wire = Wire()
        wire.arrive(0.0, raw)
        wire.connection.connection_lost(None)
        if b"abc" in raw:
            assert await wire.connection.read() == [Piece(0.0, b"abc")]
        with pytest.raises(ClientError) as error:
            await wire.connection.read()
        assert error.value.kind == kind

    asyncio.run(main())


def test_a_reset_ends_even_a_body_that_ends_with_the_connection() -> None:
    async def main() -> None:
        wire = Wire()
        wire.arrive(0.0, RESPONSES["until the end"])
        wire.connection.connection_lost(ConnectionResetError("reset by peer"))
        assert await wire.connection.read() == [Piece(0.0, b"abcdefgh")]
        with pytest.raises(ClientError, match="reset by peer"):
            await wire.connection.read()

    asyncio.run(main())


def test_a_connection_is_used_again_and_a_busy_one_is_not(fake_server: Any) -> None:
    async def main() -> None:
        async with HttpClient(fake_server.url, {}) as client:
            for _ in range(5):
                assert (await client.fetch("GET", "/v1/models"))[0] == 200
            assert fake_server.num_connections == 1
            async with client.stream("GET", "/v1/models") as first, client.stream("GET", "/v1/models") as second:
                assert await read_all(first) == await read_all(second) != b""
            assert fake_server.num_connections == 2

    asyncio.run(main())


def test_a_connection_that_the_server_will_close_is_not_used_again(fake_server: Any) -> None:
    fake_server.push(fake_server.http(200, b"{}", "connection: close"))

    async def main() -> None:
        async with HttpClient(fake_server.url, {}) as client:
            for _ in range(2):
                assert (await client.fetch("POST", "/v1/completions", b'{"prompt": ""}'))[0] == 200
            assert fake_server.num_connections == 2

    asyncio.run(main())


def test_a_kept_connection_that_the_server_let_go_is_replaced(fake_server: Any) -> None:
    async def main() -> None:
        async with HttpClient(fake_server.url, {}) as client:
            async with client.stream("GET", "/v1/models") as connection:
                await read_all(connection)
            # The server hangs up on the kept connection as the next request is sent on it.
            fake_server.push(b"", then="close")
            status, _ = await client.fetch("POST", "/v1/completions", b'{"prompt": "a b"}')
            assert status == 200
            assert fake_server.num_connections == 2
            assert len(fake_server.completions) == 2

    asyncio.run(main())


def test_a_server_that_closes_a_fresh_connection_is_an_error_and_not_tried_again(fake_server: Any) -> None:
    fake_server.push(b"", then="close")

    async def main() -> None:
        async with HttpClient(fake_server.url, {}) as client:
            with pytest.raises(ClientError) as error:
                await client.fetch("POST", "/v1/completions", b"{}")
            assert error.value.kind == "disconnected"
            assert len(fake_server.completions) == 1

    asyncio.run(main())


def test_leaving_a_stream_early_closes_the_connection(fake_server: Any) -> None:
    fake_server.push_events([b"a"], then="hang", end=False)

    async def main() -> None:
        async with HttpClient(fake_server.url, {}) as client, client.stream("POST", "/v1/completions", b"{}") as body:
            assert [piece.data for piece in await body.read()] == [b"a"]

    asyncio.run(main())
    assert fake_server.client_left.wait(10)


def test_no_server_is_a_connect_error() -> None:
    async def main() -> None:
        listener = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        listener.close()
        await listener.wait_closed()
        with pytest.raises(ClientError) as error:
            await HttpClient(f"http://127.0.0.1:{port}", {}).fetch("GET", "/")
        assert error.value.kind == "connect"
        assert str(port) in error.value.message

    asyncio.run(main())


def test_url() -> None:
    url = Url("https://user@example.com/base/v1/")
    assert (url.host, url.port, url.tls, url.netloc, url.path) == ("example.com", 443, True, "example.com", "/base/v1")
    url = Url("localhost:8000")
    assert (url.host, url.port, url.tls, url.netloc, url.path) == ("localhost", 8000, False, "localhost:8000", "")
    assert Url("http://[::1]:80/v1").host == "::1"


@pytest.mark.parametrize("url", ["", "ftp://x/v1", "http://", "http://host:port/v1", "http://host:99999"])
def test_url_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        Url(url)


def test_a_key_cannot_add_headers() -> None:
    with pytest.raises(ConfigError, match="line break"):
        HttpClient("http://localhost", {"Authorization": "Bearer x\r\nEvil: 1"})
