"""TLS over HTTP and gRPC, and a certificate that is replaced while the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import time
from pathlib import Path

import grpc
import httpx
import pytest
import trustme
from tritonclient.grpc import service_pb2, service_pb2_grpc

from llmserve.api.tls import TlsFiles
from llmserve.api.v2_grpc import GrpcServer
from llmserve.config import DoorConfig
from llmserve.errors import ConfigError
from llmserve.repository.data_plane import DataPlane
from llmserve.repository.model_repository import ModelRepository
from llmserve.repository.settings import RepositorySettings
from tests.door.conftest import ServeGuarded


class Certificates:
    """Two authorities, of which each can sign the server's certificate."""

    def __init__(self, folder: Path) -> None:
        self.authorities = [trustme.CA(), trustme.CA()]
        self.certificate, self.key = folder / "tls.crt", folder / "tls.key"
        self.install(0)

    def install(self, which: int) -> None:
        """Puts a certificate of that authority in the place of the other."""
        issued = self.authorities[which].issue_cert("localhost", "127.0.0.1")
        for path, blobs in ((self.key, [issued.private_key_pem]), (self.certificate, issued.cert_chain_pems)):
            fresh = path.with_suffix(".new")
            fresh.write_bytes(b"".join(blob.bytes() for blob in blobs))
            os.replace(fresh, path)

    def trust(self, which: int) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authorities[which].configure_trust(context)
        return context


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


def test_http_serves_the_new_certificate_to_new_connections(
    serve_guarded: ServeGuarded, certificates: Certificates
) -> None:
    door = DoorConfig(tls_certificate=str(certificates.certificate), tls_key=str(certificates.key))
    served = serve_guarded(door)
    with httpx.Client(verify=certificates.trust(0), base_url=served.url) as old:
        assert old.get("/health").status_code == 200
        certificates.install(1)
        with httpx.Client(verify=certificates.trust(1), base_url=served.url) as new:
            assert new.get("/health").status_code == 200
        assert old.get("/health").status_code == 200  # its connection stands
    with httpx.Client(verify=certificates.trust(0), base_url=served.url) as late, pytest.raises(httpx.ConnectError):
        late.get("/health")
    certificates.certificate.write_text("no certificate")
    with httpx.Client(verify=certificates.trust(1), base_url=served.url) as again:
        assert again.get("/health").status_code == 200  # the last good one


def test_who_shakes_no_hands_is_counted_meanwhile_and_let_go(
    serve_guarded: ServeGuarded, certificates: Certificates
) -> None:
    files = {"tls_certificate": str(certificates.certificate), "tls_key": str(certificates.key)}
    patient = serve_guarded(DoorConfig(max_connections=8, header_timeout_s=30.0, **files))  # type: ignore[arg-type]
    hasty = serve_guarded(DoorConfig(max_connections=8, header_timeout_s=0.5, **files))  # type: ignore[arg-type]
    with contextlib.ExitStack() as stack:

        def connect(port: int) -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))

        silent = [connect(patient.port) for _ in range(20)]
        assert [connection.recv(1) for connection in silent[8:]] == [b""] * 12  # not even asked for a name
        assert patient.metrics.http.num_connections == 8
        assert patient.metrics.http.refused == {"too_many_connections": 12}
        with httpx.Client(verify=certificates.trust(0), base_url=patient.url) as client:
            with pytest.raises(httpx.HTTPError):
                client.get("/health")
            for connection in silent[:8]:
                connection.close()
            until_s = time.monotonic() + 10
            while time.monotonic() < until_s:
                with contextlib.suppress(httpx.HTTPError):
                    assert client.get("/health").status_code == 200
                    break
            else:
                pytest.fail("the connections that were closed are still counted")
        for connection in [connect(hasty.port) for _ in range(8)]:
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        with httpx.Client(verify=certificates.trust(0), base_url=hasty.url) as client:
            assert "\nhttp_connections 1.0\n" in client.get("/metrics").text
        assert hasty.metrics.http.refused == {"handshake_timeout": 8}


async def live(port: int, authority: trustme.CA) -> bool:
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            return bool((await stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=5)).live)
        except grpc.aio.AioRpcError:
            return False


async def replace_over_grpc(certificates: Certificates) -> list[bool]:
    plane = DataPlane(ModelRepository(RepositorySettings(), lambda *_: None), version="1")  # type: ignore[arg-type]
    tls = TlsFiles(certificates.certificate, certificates.key)
    server = GrpcServer(plane, "127.0.0.1", 0, credentials=tls.grpc_credentials())
    await server.start()
    try:
        answers = [await live(server.port, certificates.authorities[0])]
        certificates.install(1)
        answers.append(await live(server.port, certificates.authorities[1]))
        return answers
    finally:
        await server.stop(0)


def test_grpc_serves_the_new_certificate(certificates: Certificates) -> None:
    assert asyncio.run(replace_over_grpc(certificates)) == [True, True]


def test_what_cannot_be_used_is_said_at_the_start(certificates: Certificates) -> None:
    with pytest.raises(ConfigError, match="belong together"):
        DoorConfig(tls_certificate="cert.pem")
    stranger = trustme.CA().issue_cert("localhost")
    certificates.key.write_bytes(stranger.private_key_pem.bytes())
    with pytest.raises(ConfigError, match="cannot be used"):
        TlsFiles(certificates.certificate, certificates.key)
