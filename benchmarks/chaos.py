"""Breaks a server under load, and compares every token that its clients get with those of an undisturbed run.

    python -m benchmarks.chaos --minutes 10

Clients stream with the `openai` package; some of them vanish. Meanwhile, every few seconds, the engine is killed,
stopped for good, held up for a while or denied any more memory, or the model is reloaded. At the end every stream that
stayed connected must have had exactly its tokens, and the server must hold no more than before. Exit status 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai

from benchmarks.chaos_harm import HARM, Attacker, Pauses, Summary
from benchmarks.chaos_server import MODEL, Server

NUM_PARTS = 10  # of the run, whose memory is told
POOL_THREADS = min(32, (os.cpu_count() or 1) + 4)  # that an event loop may start at any time, and keeps
MAX_GROWTH_MIB = 24.0  # two versions of the model; room that is free and not given back comes and goes
MIN_JUDGED_S = 240.0  # in less there is hardly a reload in each half
NUM_LONGEST = 10  # pauses that are told one by one
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
    pauses: dict[str, Summary] = field(default_factory=dict)  # of streams, by the harm that fell into them
    longest_pauses: list[str] = field(default_factory=list)
    restarts: Summary | None = None  # from a death until another engine takes requests
    memory_mib: list[float] = field(default_factory=list)  # of the server process: before, in each part, at rest
    memory_growth_mib: float = 0.0  # in the second half

    @property
    def good(self) -> bool:
        """Whether the server kept its word."""
        return not (self.wrong or self.failed or self.left_behind)


class Chaos:
    """One run."""

    def __init__(self, server: Server, attacker: Attacker, num_clients: int, max_tokens: int) -> None:
        self.report = Report()
        self._server = server
        self._attacker = attacker
        self._num_clients = num_clients
        self._max_tokens = max_tokens
        self._pauses = Pauses()
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
        report.memory_mib.append(round(server.memory_mib(), 1))
        self._pauses.clear()
        harm = asyncio.create_task(self._attacker.run(seconds))
        memory = asyncio.create_task(server.memory_over(seconds, NUM_PARTS))
        await self._crowd(seconds)
        await harm
        await self._attacker.end()
        await self._until_idle()
        self._judge_memory(await memory, seconds)
        report.harm = dict(self._attacker.counts)
        report.pauses = self._pauses.by_harm(self._attacker.done)
        report.longest_pauses = self._pauses.longest(NUM_LONGEST, self._attacker.done)
        before["threads"] += POOL_THREADS
        for what, count in server.holdings().items():
            if count > before[what]:
                report.left_behind.append(f"{count - before[what]} {what}")
        if server.metric("llmserve:kv_cache_usage_perc"):
            report.left_behind.append("blocks")
        if recoveries_s := server.recoveries_s():
            report.restarts = Summary.of(recoveries_s)
        await self._client.close()
        return report

    def _judge_memory(self, parts_mib: list[float], seconds: float) -> None:
        """Level is what does not grow in the second half; the least of several parts, because of reloads."""
        report, half, quarter = self.report, NUM_PARTS // 2, NUM_PARTS // 4
        report.memory_mib += [*parts_mib, round(self._server.memory_mib(), 1)]
        growth = min(parts_mib[-quarter:]) - min(parts_mib[half - quarter : half])
        report.memory_growth_mib = round(growth, 1)
        if seconds >= MIN_JUDGED_S and growth > MAX_GROWTH_MIB:
            report.left_behind.append(f"{growth:.0f} MiB")

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
        last_s: dict[int, float] = {}
        num_events = 0
        create = self._client.completions.create
        async with await create(model=MODEL, max_tokens=self._max_tokens, stream=True, **REQUESTS[number]) as stream:
            async for event in stream:
                now = time.monotonic()
                num_events += 1
                for choice in event.choices:
                    self._pauses.note(last_s.get(choice.index, now), now)
                    last_s[choice.index] = now
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


async def run(
    minutes: float, num_clients: int, max_tokens: int, pause_s: tuple[float, float], kinds: list[str]
) -> Report:
    """A server, a run, and the server's end, which must be clean too."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            await server.start()
            attacker = Attacker(server, kinds, pause_s)
            report = await Chaos(server, attacker, num_clients, max_tokens).run(60 * minutes)
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
    parser.add_argument("--harm", nargs="+", choices=HARM, default=list(HARM), help="only these kinds")
    options = parser.parse_args()
    report = asyncio.run(
        run(options.minutes, options.clients, options.max_tokens, tuple(options.pause_s), options.harm)
    )
    print(json.dumps(asdict(report), indent=2))
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
