"""A server under attack as its attacker sees it: its processes, what it holds, what it says. Does no harm itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

from benchmarks.needs import psutil
from llmserve.engine.launch import PROCESS_NAME

MODEL = "smollm2-135m-instruct"
STALL_TIMEOUT_S = 2.0
START_S = 120.0
MEMORY_SAMPLE_S = 0.5


class Server:
    """`llmserve serve` as a child process, its log in a file."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "server.log"
        self._folder = folder
        flags = ("--port", "0", "--no-grpc", "--model-control-mode", "explicit", "--kv-cache-memory", "128MiB")
        command = [sys.executable, "-m", "llmserve.cli", "serve", MODEL, *flags]
        command += ["--stall-timeout-s", str(STALL_TIMEOUT_S)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stderr=log, env=os.environ | {"TMPDIR": str(folder)})
        self.url = ""
        self.info = psutil.Process(self.process.pid)

    async def start(self) -> None:
        """Waits until it serves."""
        until_s = time.monotonic() + START_S
        while not (match := re.search(r"(http://\S+)/v1 +serves", self.log.read_text())):
            if self.process.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError(f"The server did not start:\n{self.log.read_text()}")
            await asyncio.sleep(0.1)
        self.url = match[1]

    def engines(self) -> list[psutil.Process]:
        """Its engine processes now."""
        return [child for child in self.info.children() if _is_engine(child)]

    def standbys(self) -> list[psutil.Process]:
        """Its processes that wait to become engines."""
        found = []
        for child in self.info.children():
            with contextlib.suppress(psutil.Error):
                if "llmserve.engine.standby_process" in child.cmdline() and not _is_engine(child):
                    found.append(child)
        return found

    def metric(self, name: str) -> float:
        """The sum of a series without buckets."""
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(value) for value in re.findall(rf"^{re.escape(name)}{{[^}}]*}} (\S+)$", text, re.MULTILINE))

    def recoveries_s(self) -> list[float]:
        """How long it has taken to replace each engine that died."""
        return [float(took_s) for took_s in re.findall(r"the engine is back after (\S+) s", self.log.read_text())]

    def is_ready(self) -> bool:
        """What it says of itself."""
        return httpx.get(f"{self.url}/ready").status_code == 200

    def memory_mib(self) -> float:
        """Resident, of the server process alone."""
        return float(self.info.memory_info().rss) / 2**20

    async def memory_over(self, seconds: float, num_parts: int) -> list[float]:
        """MiB in each of so many parts of that time: the median, because a reload needs room for two for a while."""
        parts = []
        begin_s = time.monotonic()
        for part in range(1, num_parts + 1):
            samples = [self.memory_mib()]
            while time.monotonic() < begin_s + seconds * part / num_parts:
                await asyncio.sleep(MEMORY_SAMPLE_S)
                samples.append(self.memory_mib())
            parts.append(round(statistics.median(samples), 1))
        return parts

    def holdings(self) -> dict[str, int]:
        """What could be left behind."""
        return {
            "descriptors": self.info.num_fds(),
            "threads": self.info.num_threads(),
            "processes": len(self.info.children(recursive=True)),
            "folders": len(list(self._folder.rglob("llmserve-*"))),
            "shared memory": sum("memfd" in area.path for area in self.info.memory_maps()),
        }


def _is_engine(process: psutil.Process) -> bool:
    try:
        # a standby is none yet; it is called by the same name once it is
        return process.name() == PROCESS_NAME or "llmserve.engine.process" in process.cmdline()
    except psutil.Error:  # it has just ended
        return False
