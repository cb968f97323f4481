"""The HTTP server's own configuration, uvicorn over TLS or not, and the limits of its connections and of gRPC's.

Knows no application.
"""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from llmserve.api.http_connection import ConnectionLimits, LimitedConnections
from llmserve.api.http_protocol import DirectHandler
from llmserve.api.tls import TlsFiles
from llmserve.api.v2_grpc import GrpcSettings
from llmserve.config import DoorConfig
from llmserve.http_metrics import HttpMetrics

_SPARE_FILES = 256  # descriptors for engines, models and files


def open_tls(door: DoorConfig) -> TlsFiles | None:
    """The certificate that the configuration names. Raises ConfigError."""
    return TlsFiles(Path(door.tls_certificate), Path(door.tls_key)) if door.tls_certificate else None


def http_config(
    app: ASGIApp,
    door: DoorConfig,
    tls: TlsFiles | None,
    drain_timeout_s: float,
    metrics: HttpMetrics,
    direct: DirectHandler | None,
) -> uvicorn.Config:
    """For `uvicorn.Server`. `direct` answers what need not go through `app`; connections are counted in `metrics`."""
    connections = LimitedConnections(connection_limits(door), metrics, direct)
    config = uvicorn.Config(
        app,
        http=connections,  # type: ignore[arg-type]  # it is called as a class would be
        loop="uvloop",
        lifespan="off",
        ws="none",
        access_log=False,
        log_config=None,
        log_level="warning",
        proxy_headers=False,  # who asks is decided by the door, and a header proves nothing
        timeout_graceful_shutdown=int(drain_timeout_s),
        server_header=False,
    )
    config.load()
    if tls is not None:
        config.ssl = tls.context
    return config


def raise_file_limit() -> None:
    """To what the process may have: the customary 1024 is for programs that use `select`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS calls more unlimited than it allows
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connection_limits(door: DoorConfig) -> ConnectionLimits:
    """Never more connections than the process may have open files for: half of those at least, and three quarters less
    what engines and models want where there are many. The last quarter is gRPC's."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = max(3 * soft // 4 - _SPARE_FILES, soft // 2) if soft != resource.RLIM_INFINITY else door.max_connections
    return ConnectionLimits(
        max_connections=min(door.max_connections, room),
        header_timeout_s=door.header_timeout_s,
        body_timeout_s=door.body_timeout_s,
        send_timeout_s=door.send_timeout_s,
    )


def grpc_settings(door: DoorConfig, max_body_bytes: int) -> GrpcSettings:
    """What bounds HTTP bounds gRPC."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = soft // 4 if soft != resource.RLIM_INFINITY else door.max_connections
    return GrpcSettings(
        max_message_bytes=max_body_bytes,
        max_connections=min(door.max_connections, room),
        max_concurrent_rpcs=door.max_connections,
        handshake_timeout_s=door.header_timeout_s,
    )
