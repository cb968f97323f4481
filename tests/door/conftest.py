"""A server over a scripted model, behind a door: real HTTP, real sockets, no engine."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop

from llmserve.api.app import create_app
from llmserve.api.entrance import Entrance
from llmserve.api.settings import ApiSettings
from llmserve.api.tls_server import HttpServer
from llmserve.api_keys import new_key
from llmserve.config import DoorConfig
from llmserve.metrics import Metrics
from llmserve.threads import start_executor
from tests.api.conftest import Directory, Script, ScriptedModel

ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


@dataclass
class GuardedServer:
    """A running server, its model and its metrics."""

    port: int
    scheme: str
    model: ScriptedModel
    metrics: Metrics
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def script(self) -> Script:
        return self.model.script

    def client(self, key: str = "", **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=10, **options)


@contextmanager
def run_guarded(door: DoorConfig, settings: ApiSettings, plane: Any = None) -> Iterator[GuardedServer]:
    """Serves until the end of the block."""
    model, metrics = ScriptedModel("scripted", Script()), Metrics()
    entrance = Entrance(door, metrics)
    app = create_app(Directory([model]), settings, metrics, plane, entrance=entrance)
    server = HttpServer(entrance.http_config(app, 5.0))
    loops: list[asyncio.AbstractEventLoop] = []
    started = threading.Event()

    async def main(listener: socket.socket) -> None:
        loops.append(asyncio.get_running_loop())
        loops[0].set_default_executor(start_executor())  # as `serve` does
        started.set()
        await server.serve(sockets=[listener])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=lambda: uvloop.run(main(listener)), daemon=True)
        thread.start()
        started.wait(10)
        yield GuardedServer(port, "https" if door.tls_certificate else "http", model, metrics, loops[0])
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive()


ServeGuarded = Callable[..., GuardedServer]


@pytest.fixture
def serve_guarded() -> Iterator[ServeGuarded]:
    """Starts servers that end with the test: `serve_guarded(DoorConfig(...), ApiSettings(...))`."""
    with ExitStack() as stack:

        def start(
            door: DoorConfig | None = None, settings: ApiSettings | None = None, plane: Any = None
        ) -> GuardedServer:
            return stack.enter_context(run_guarded(door or DoorConfig(), settings or ApiSettings(), plane))

        yield start


def write_keys(path: Path, **holders: str) -> dict[str, str]:
    """A key for each `name="fields of its table"`; the keys by name."""
    keys = {}
    text = ""
    for name, fields in holders.items():
        keys[name], digest = new_key()
        text += f'[[keys]]\nname = "{name}"\nsha256 = "{digest}"\n{fields}\n'
    path.write_text(text)
    return keys
