"""What clients, known or not, may take of the gRPC server: bytes, connections, time. And of the open files."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from llmserve.api.http_server import connection_limits, grpc_settings
from llmserve.api.v2_grpc import GrpcServer, GrpcSettings
from llmserve.config import DoorConfig
from llmserve.repository.data_plane import DataPlane
from llmserve.repository.model_repository import ModelRepository
from llmserve.repository.settings import RepositorySettings

UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


@asynccontextmanager
async def serving(settings: GrpcSettings) -> AsyncIterator[int]:
    """The port of a server without models."""
    plane = DataPlane(ModelRepository(RepositorySettings(), lambda *_: None), version="1")  # type: ignore[arg-type]
    server = GrpcServer(plane, "127.0.0.1", 0, settings)
    await server.start()
    try:
        yield server.port
    finally:
        await server.stop(0)


async def infer(port: int, num_bytes: int, compression: grpc.Compression | None = None) -> tuple[grpc.StatusCode, str]:
    """What a request with so many bytes is told."""
    request = service_pb2.ModelInferRequest(model_name="nobody", raw_input_contents=[bytes(num_bytes)])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=UNLIMITED) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            await stub.ModelInfer(request, timeout=20, compression=compression)
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
    raise AssertionError("there is no such model")


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_a_message_has_a_limit_packed_or_not(compression: grpc.Compression | None) -> None:
    """It is received, and unpacked, before anybody asks who sent it."""

    async def ask() -> None:
        async with serving(GrpcSettings(max_message_bytes=1 << 20)) as port:
            code, _ = await infer(port, (1 << 20) - 4096, compression)
            assert code is grpc.StatusCode.NOT_FOUND
            code, details = await infer(port, 64 << 20, compression)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "larger than max" in details

    asyncio.run(ask())


def test_a_body_of_http_may_be_larger_than_a_message_can_be() -> None:
    """gRPC's limit is a C int, `--max-body-bytes` is not."""

    async def ask() -> None:
        async with serving(grpc_settings(DoorConfig(), 4 << 30)) as port:
            code, _ = await infer(port, 64 << 20)
            assert code is grpc.StatusCode.NOT_FOUND

    asyncio.run(ask())


def test_connections_have_a_limit_and_must_say_something() -> None:
    async def crowd() -> None:
        async with serving(GrpcSettings(max_connections=4, handshake_timeout_s=0.5)) as port:
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
            told = [await asyncio.wait_for(reader.read(65536), 20) for reader, _ in silent[4:]]
            assert told == [b""] * 16  # closed at once
            for reader, _ in silent[:4]:  # and these when their time is over
                while await asyncio.wait_for(reader.read(65536), 20):
                    pass
            code, _ = await infer(port, 8)
            assert code is grpc.StatusCode.NOT_FOUND
            for _, writer in silent:
                writer.close()

    asyncio.run(crowd())


def test_calls_at_the_same_time_have_a_limit() -> None:
    async def flood() -> None:
        async with (
            serving(GrpcSettings(max_concurrent_rpcs=2)) as port,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            streams = [stub.ModelStreamInfer() for _ in range(2)]
            for stream in streams:
                await stream.write(service_pb2.ModelInferRequest(model_name="nobody"))
                await stream.read()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=10)
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            await streams[0].done_writing()
            await streams[0].code()
            assert (await stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=10)).live
            streams[1].cancel()

    asyncio.run(flood())


@pytest.mark.parametrize("num_files", [64, 200, 1024, 4096, 20_000, 1_048_576])
def test_both_doors_together_leave_files_for_engines(monkeypatch: pytest.MonkeyPatch, num_files: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (num_files, num_files))
    door = DoorConfig()
    http, rpc = connection_limits(door), grpc_settings(door, 1 << 20)
    assert 0 < rpc.max_connections < http.max_connections or http.max_connections == door.max_connections
    assert num_files - http.max_connections - rpc.max_connections >= min(num_files // 4, 256)
    assert rpc.max_message_bytes == 1 << 20
    assert rpc.handshake_timeout_s == door.header_timeout_s
