"""A server of the v2 skins on ports of its own, in a thread of its own, for as long as a test needs it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
import uvloop
from starlette.applications import Starlette

from llmserve.api.entrance import Entrance
from llmserve.api.v2_grpc import GrpcServer
from llmserve.api.v2_http import V2Http
from llmserve.api.v2_http_direct import DirectInfer
from llmserve.api.v2_settings import V2HttpSettings
from llmserve.config import DoorConfig
from llmserve.http_metrics import HttpMetrics
from llmserve.repository.data_plane import DataPlane
from llmserve.repository.model_repository import ModelRepository
from llmserve.repository.model_version import OpenVersion
from llmserve.repository.settings import ModelControlMode, RepositorySettings

T = TypeVar("T")
GOLDEN = Path(__file__).parent / "golden"


class V2Server:
    """Both skins over one repository."""

    def __init__(self, repository: ModelRepository, plane: DataPlane, loop: asyncio.AbstractEventLoop) -> None:
        self.repository = repository
        self.plane = plane
        self.http_port = 0
        self.grpc_port = 0
        self.metrics = HttpMetrics()
        self._loop = loop

    @property
    def http(self) -> str:
        """host:port"""
        return f"127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        """host:port"""
        return f"127.0.0.1:{self.grpc_port}"

    def call(self, coroutine: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        """Runs something on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)


@contextmanager
def serve_v2(
    settings: RepositorySettings,
    opener: OpenVersion,
    http_settings: V2HttpSettings | None = None,
    door: DoorConfig | None = None,
) -> Iterator[V2Server]:
    """Loads the repository, then serves it."""
    limits = http_settings or V2HttpSettings()
    listener = socket.create_server(("127.0.0.1", 0))
    started: list[V2Server | BaseException] = []
    ready, end = threading.Event(), threading.Event()

    async def run() -> None:
        repository = ModelRepository(settings, opener)
        plane = DataPlane(repository, version="0.0")
        server = V2Server(repository, plane, asyncio.get_running_loop())
        entrance = Entrance(door)
        app = entrance.wrap(
            V2Http(Starlette(), plane=plane, settings=limits, metrics=server.metrics),
            make_direct=partial(DirectInfer, plane=plane, settings=limits, metrics=server.metrics),
        )
        http = uvicorn.Server(entrance.http_config(app, 1.0))
        grpc_server = GrpcServer(plane, "127.0.0.1", 0)
        await grpc_server.start()
        await repository.start()
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        server.http_port, server.grpc_port = listener.getsockname()[1], grpc_server.port
        started.append(server)
        ready.set()
        await asyncio.to_thread(end.wait)
        http.should_exit = True
        await serving
        await grpc_server.stop(0.2)
        await repository.stop()

    def main() -> None:
        try:
            uvloop.run(run())
        except BaseException as error:  # noqa: BLE001  # the test's thread raises it again
            started.append(error)
            ready.set()

    thread = threading.Thread(target=main, name="v2 server")
    thread.start()
    ready.wait(120)
    try:
        first = started[0]
        if isinstance(first, BaseException):
            raise first
        yield first
    finally:
        end.set()
        thread.join(60)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"
        failed = [item for item in started[1:] if isinstance(item, BaseException)]
        assert not failed, failed


@contextmanager
def serve_golden(models: Sequence[str], opener: OpenVersion) -> Iterator[V2Server]:
    """Of the models of which Triton's own answers were recorded, these."""
    settings = RepositorySettings(
        model_repository=(str(GOLDEN / "model_repository"),),
        model_control_mode=ModelControlMode.EXPLICIT,
        load_model=tuple(models),
    )
    with serve_v2(settings, opener) as running:
        yield running
