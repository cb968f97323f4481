"""A real server: `llmserve serve` as a child process, over the embedded model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from llmserve.engine.launch import PROCESS_NAME

START_S = 120.0  # on a machine that does other things too; an idle one needs three


class Server:
    """`llmserve serve` on a free port, stopped and gone at the end."""

    def __init__(self, *args: str, prefix: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        """`prefix`: a command that runs it as somebody else; `environment`: theirs."""
        if "--embedding-model" not in args:
            args = (*args, "--embedding-model", "none")  # a process less to start
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "llmserve.cli", "serve", "--port", "0", *args],
            stderr=subprocess.PIPE,
            env={**(os.environ if environment is None else environment), "COLUMNS": "200"},
            text=True,
        )
        self.output = ""
        self.url = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready.wait(START_S)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.output += line
            if match := re.search(r"(?:Ready|Serving) in .*: (https?://\S+)/v1", line):
                self.url = match[1]
                self._ready.set()
        self._ready.set()  # it ended without

    def join(self) -> None:
        """After its end: all it has said is in `output`."""
        self._reader.join(10)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def engines(self) -> list[psutil.Process]:
        return [child for child in psutil.Process(self.process.pid).children() if _is_engine(child)]

    def model_processes(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        return [p for p in children if "llmserve.backends.model_process" in p.cmdline()]

    def metric(self, name: str) -> float:
        """The value of a series without buckets, of the only model."""
        text = httpx.get(f"{self.url}/metrics").text
        match = re.search(rf"^{re.escape(name)}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
        assert match is not None, name
        return float(match[1])

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()


def _is_engine(process: psutil.Process) -> bool:
    try:
        # a standby is none yet; it is called by the same name once it is
        return process.name() == PROCESS_NAME or "llmserve.engine.process" in process.cmdline()
    except psutil.Error:  # it has just ended
        return False


@contextmanager
def servers_started() -> Iterator[Callable[..., Server]]:
    """`Server`, of which all that still run are stopped at the end."""
    servers: list[Server] = []

    def start(*args: str, **options: Any) -> Server:
        servers.append(Server(*args, **options))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="session")
def start_server() -> Iterator[Callable[..., Server]]:
    with servers_started() as start:
        yield start


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Server], smollm2_path: Path) -> Server:
    """The default server, shared by tests that leave it as they found it."""
    server = start_server("--kv-cache-memory", "256MiB", "--embedding-model", "auto")
    assert server.url, server.output
    return server
