"""Breaks a server under load, and compares every token that its clients get with those of an undisturbed run.

    python -m benchmarks.chaos --minutes 10

Clients stream with the `openai` package; some of them vanish. Meanwhile, every few seconds, the engine is killed,
stopped for good, held up for a while or denied any more memory, or the model is reloaded. At the end every stream that
stayed connected must have had exactly its tokens, and the server must hold no more than before. Exit status 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai

from benchmarks.needs import psutil
from llmserve.engine.launch import PROCESS_NAME

MODEL = "smollm2-135m-instruct"
STALL_TIMEOUT_S = 2.0
START_S = 120.0
RANDOM_SEED = 5932  # every kind of harm is among the first six, a kill first: so in a short run too
IGNORE_EOS = {"ignore_eos": True, "return_token_ids": True}
# Greedy and seeded, plain and with everything that looks back at what was said, one answer and several.
REQUESTS: tuple[dict[str, Any], ...] = (
    {"prompt": "Once upon a time", "temperature": 0, "extra_body": IGNORE_EOS},
    {"prompt": "The quick brown fox", "temperature": 1.0, "seed": 1, "extra_body": IGNORE_EOS},
    {"prompt": "My favourite number is", "temperature": 1.3, "seed": 2, "top_p": 0.9, "extra_body": IGNORE_EOS},
    {
        "prompt": "A list of animals:",
        "temperature": 0.8,
        "seed": 3,
        "frequency_penalty": 0.8,
        "presence_penalty": 0.3,
        "extra_body": IGNORE_EOS | {"repetition_penalty": 1.1},
    },
    {"prompt": "In the beginning", "temperature": 1.0, "seed": 4, "n": 3, "extra_body": IGNORE_EOS},
    {"prompt": "Count: 1, 2, 3,", "temperature": 0, "logprobs": 2, "extra_body": IGNORE_EOS},
    {"prompt": "She said:", "temperature": 1.0, "seed": 5, "stop": [" the end of it"], "extra_body": IGNORE_EOS},
    {"prompt": " ".join(["and so on"] * 60), "temperature": 0.9, "seed": 6, "extra_body": IGNORE_EOS},
)
_HARM = ("killed", "stopped", "held up", "starved", "reloaded", "standby killed")
_HARM_WEIGHTS = (5, 2, 2, 3, 1, 1)
_SPARE_BYTES = 2**16  # that a starved engine may still take: soon it needs more
Answer = dict[int, tuple[list[int], str, list[float], str | None]]  # by choice: tokens, text, log-probs, finish reason


@dataclass
class Report:
    """What was done, and what came of it."""

    harm: dict[str, int] = field(default_factory=dict)
    streams: int = 0
    vanished: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    longest_pause_s: float = 0.0
    recovery_s: float = 0.0  # mean
    restarts: int = 0
    rss_mib: list[float] = field(default_factory=list)  # of the server process: before, and at the end

    def count(self, harm: str) -> None:
        """Something was done to the server."""
        self.harm[harm] = self.harm.get(harm, 0) + 1

    @property
    def good(self) -> bool:
        """Whether the server kept its word."""
        return not (self.wrong or self.failed or self.left_behind)


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

    def is_ready(self) -> bool:
        """What it says of itself."""
        return httpx.get(f"{self.url}/ready").status_code == 200

    def holdings(self) -> dict[str, int]:
        """What could be left behind."""
        return {
            "descriptors": self.info.num_fds(),
            "threads": self.info.num_threads(),
            "processes": len(self.info.children(recursive=True)),
            "folders": len(list(self._folder.glob("llmserve-*"))),
            "shared memory": sum("memfd" in area.path for area in self.info.memory_maps()),
        }


def _is_engine(process: psutil.Process) -> bool:
    try:
        # a standby is none yet; it is called by the same name once it is
        return process.name() == PROCESS_NAME or "llmserve.engine.process" in process.cmdline()
    except psutil.Error:  # it has just ended
        return False


class Chaos:
    """One run."""

    def __init__(self, server: Server, num_clients: int, max_tokens: int, pause_s: tuple[float, float]) -> None:
        self.report = Report()
        self._server = server
        self._num_clients = num_clients
        self._max_tokens = max_tokens
        self._pause_s = pause_s
        self._expected: dict[int, Answer] = {}
        self._client = openai.AsyncOpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=120,
            http_client=httpx.AsyncClient(limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)),
        )

    async def run(self, seconds: float) -> Report:
        """Undisturbed first, then with harm, then a look at what is left."""
        server, report = self._server, self.report
        for number in range(len(REQUESTS)):
            self._expected[number] = await self._stream(number)
        await self._crowd(min(seconds / 6, 20.0))  # warms every allocator up
        await self._until_idle()
        before = server.holdings()
        report.rss_mib.append(server.info.memory_info().rss / 2**20)
        report.longest_pause_s = 0.0
        harm = asyncio.create_task(self._do_harm(time.monotonic() + seconds))
        await self._crowd(seconds)
        harm.cancel()
        await asyncio.gather(harm, return_exceptions=True)
        for engine in server.engines():
            engine.send_signal(signal.SIGCONT)
        await self._until_idle()
        report.rss_mib.append(server.info.memory_info().rss / 2**20)
        for what, count in server.holdings().items():
            if count > before[what]:
                report.left_behind.append(f"{count - before[what]} {what}")
        if server.metric("llmserve:kv_cache_usage_perc"):
            report.left_behind.append("blocks")
        report.restarts = int(server.metric("llmserve:engine_restarts_total"))
        if report.restarts:
            report.recovery_s = server.metric("llmserve:engine_recovery_seconds_sum") / report.restarts
        await self._client.close()
        return report

    async def _crowd(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        await asyncio.gather(*(self._visit(client, until_s) for client in range(self._num_clients)))

    async def _visit(self, client: int, until_s: float) -> None:
        source, report = random.Random(client), self.report
        while time.monotonic() < until_s:
            number = source.randrange(len(REQUESTS))
            vanish_after = source.randint(1, self._max_tokens // 2) if source.random() < 0.15 else None
            try:
                answer = await self._stream(number, vanish_after)
            except (openai.APIError, httpx.HTTPError) as error:
                report.failed.append(f"request {number}: {error!r}")
                continue
            if answer is None:
                report.vanished += 1
                continue
            report.streams += 1
            report.tokens += sum(len(choice[0]) for choice in answer.values())
            if answer != self._expected[number]:
                report.wrong.append(f"request {number}: {answer} instead of {self._expected[number]}")

    async def _stream(self, number: int, vanish_after: int | None = None) -> Any:
        """The whole answer; None if this client was to vanish after so many events, and did."""
        parts: dict[int, tuple[list[int], list[str], list[float], list[str]]] = {}
        num_events, last_s = 0, 0.0
        create = self._client.completions.create
        async with await create(model=MODEL, max_tokens=self._max_tokens, stream=True, **REQUESTS[number]) as stream:
            async for event in stream:
                now = time.monotonic()
                self.report.longest_pause_s = max(self.report.longest_pause_s, now - last_s if last_s else 0.0)
                num_events, last_s = num_events + 1, now
                for choice in event.choices:
                    token_ids, texts, scores, reasons = parts.setdefault(choice.index, ([], [], [], []))
                    token_ids += choice.token_ids
                    texts.append(choice.text)
                    scores += choice.logprobs.token_logprobs if choice.logprobs else []
                    reasons += [choice.finish_reason] if choice.finish_reason else []
                if num_events == vanish_after:
                    return None
        return {
            index: (token_ids, "".join(texts), scores, reasons[0] if len(reasons) == 1 else f"{reasons}")
            for index, (token_ids, texts, scores, reasons) in sorted(parts.items())
        }

    async def _do_harm(self, until_s: float) -> None:
        """Until then only: a version that is being replaced has a bounded time for its last streams."""
        source = random.Random(RANDOM_SEED)
        while time.monotonic() < until_s:
            await asyncio.sleep(source.uniform(*self._pause_s))
            what = source.choices(_HARM, _HARM_WEIGHTS)[0]
            engines = self._server.engines()
            if not engines:
                continue
            engine = source.choice(engines)
            with contextlib.suppress(psutil.NoSuchProcess):
                await self._harm(what, engine, source)
                self.report.count(what)

    async def _harm(self, what: str, engine: psutil.Process, source: random.Random) -> None:
        if what == "killed":
            engine.kill()
        elif what == "stopped":
            engine.send_signal(signal.SIGSTOP)
        elif what == "held up":
            engine.send_signal(signal.SIGSTOP)
            await asyncio.sleep(source.uniform(0.1, 0.7) * STALL_TIMEOUT_S)
            engine.send_signal(signal.SIGCONT)
        elif what == "starved":
            limit = engine.memory_info().vms + _SPARE_BYTES
            engine.rlimit(psutil.RLIMIT_AS, (limit, limit))
        elif what == "standby killed":
            for standby in self._server.standbys():
                standby.kill()
        else:
            async with httpx.AsyncClient(timeout=60) as client:
                answer = await client.post(f"{self._server.url}/v2/repository/models/{MODEL}/load")
            if answer.status_code != 200:  # its new engine was killed while it loaded: the old one must serve on
                self.report.count("reloads that failed")

    async def _until_idle(self) -> None:
        """Until everything is answered and the versions that were replaced have ended."""
        until_s = time.monotonic() + 90
        while time.monotonic() < until_s:
            num_left = sum(self._server.metric(f"llmserve:num_requests_{state}") for state in ("running", "waiting"))
            at_rest = len(self._server.engines()) == len(self._server.standbys()) == 1
            if not num_left and self._server.is_ready() and at_rest:
                await asyncio.sleep(1.5)  # a heartbeat
                return
            await asyncio.sleep(0.2)
        self.report.left_behind.append("requests, or engines, that never end")


async def run(minutes: float, num_clients: int, max_tokens: int, pause_s: tuple[float, float]) -> Report:
    """A server, a run, and the server's end, which must be clean too."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            await server.start()
            report = await Chaos(server, num_clients, max_tokens, pause_s).run(60 * minutes)
            server.process.terminate()
            status = await asyncio.to_thread(server.process.wait, 30)
            if status or "Traceback" in server.log.read_text():
                report.left_behind.append(f"exit status {status}, log:\n{server.log.read_text()}")
            return report
        finally:
            for process in (
                [*server.engines(), *server.standbys(), server.info] if server.process.poll() is None else []
            ):
                process.kill()


def main() -> int:
    """0 if every token was right and nothing was left behind."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--pause-s", type=float, nargs=2, default=(2.0, 8.0), help="least and most between two harms")
    arguments = parser.parse_args()
    report = asyncio.run(run(arguments.minutes, arguments.clients, arguments.max_tokens, tuple(arguments.pause_s)))
    print(json.dumps(asdict(report), indent=2))
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
