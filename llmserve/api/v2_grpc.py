"""The gRPC server: its port, its options, its services. Knows no method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from tritonclient.grpc import service_pb2, service_pb2_grpc

from llmserve.api.v2_grpc_service import ErrorInterceptor, HealthService, InferenceService
from llmserve.errors import ConfigError
from llmserve.repository.data_plane import DataPlane

_LARGEST_OPTION = 2**31 - 1  # gRPC keeps its options in a C int


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcSettings:
    """Triton's flags `--grpc-...`. Answers have no limit: clients choose their own."""

    max_message_bytes: int = 32 * 2**20  # of a request, unpacked too; it is received before anybody asks who sent it
    max_connections: int = 8192  # one more is closed at once
    max_concurrent_rpcs: int = 8192  # one more is told RESOURCE_EXHAUSTED
    handshake_timeout_s: float = 10.0  # a connection must have begun to speak HTTP/2 by then
    response_compression: str = "none"  # none, deflate or gzip


class GrpcServer:
    """Serves `plane` on its own port, on the running event loop."""

    def __init__(
        self,
        plane: DataPlane,
        host: str,
        port: int,
        settings: GrpcSettings | None = None,
        *,
        interceptors: Sequence[Any] = (),
        credentials: Any = None,
    ) -> None:
        """`interceptors` stand before all methods; `credentials` make it TLS."""
        settings = settings or GrpcSettings()
        self._credentials = credentials
        compressions = {
            "none": grpc.Compression.NoCompression,
            "deflate": grpc.Compression.Deflate,
            "gzip": grpc.Compression.Gzip,
        }
        self._host = host
        self.port = port  # the one bound, once started
        self._server = grpc.aio.server(
            interceptors=(*interceptors, ErrorInterceptor()),
            options=(
                ("grpc.max_receive_message_length", min(settings.max_message_bytes, _LARGEST_OPTION)),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_allowed_incoming_connections", settings.max_connections),
                ("grpc.server_handshake_timeout_ms", int(settings.handshake_timeout_s * 1000)),
                ("grpc.so_reuseport", 0),  # a taken port is an error, not a second server behind it
            ),
            maximum_concurrent_rpcs=settings.max_concurrent_rpcs,
            compression=compressions[settings.response_compression],
        )
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(InferenceService(plane), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(HealthService(plane), self._server)
        names = (
            service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> None:
        """Listens. Raises ConfigError if the port is not to be had."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            if self._credentials is None:
                self.port = self._server.add_insecure_port(f"{host}:{self.port}")
            else:
                self.port = self._server.add_secure_port(f"{host}:{self.port}", self._credentials)
        except RuntimeError as error:
            raise ConfigError(
                f"Cannot listen on {host}:{self.port} for gRPC: the port is taken, or not this machine's. Choose "
                "another --grpc-port; 0 takes any."
            ) from error
        await self._server.start()

    async def stop(self, drain_s: float) -> None:
        """Takes no new calls; those in flight may finish within `drain_s` seconds, then they are cancelled."""
        await self._server.stop(drain_s)
