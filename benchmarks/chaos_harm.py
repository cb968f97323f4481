"""The harm that is done to a server, when, and which of it fell into a pause of a stream. Reads no stream itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import httpx

from benchmarks.chaos_server import MODEL, STALL_TIMEOUT_S, Server
from benchmarks.needs import psutil

HARM = {"killed": 5, "stopped": 2, "held up": 2, "starved": 3, "reloaded": 1, "standby killed": 1}  # how often each
RANDOM_SEED = 5932  # every kind of harm is among the first six, a kill first: so in a short run too
MIN_PAUSE_S = 0.5  # what is shorter is no pause, but a busy machine
_ON_THEIR_WAY_S = 0.5  # an engine is not replaced sooner
_DEADLY = ("killed", "stopped")
_SPARE_BYTES = 2**16  # that a starved engine may still take: soon it needs more


@dataclass
class Harm:
    """One thing that was done, from when to when: up to the death of the engine, where that is what comes of it."""

    kind: str
    pid: int  # of the engine, or of one of them
    begin_s: float
    end_s: float

    def falls_in(self, begin_s: float, end_s: float) -> bool:
        """Whether it went on in that time, or so shortly before that the last tokens were still on their way."""
        return self.begin_s <= end_s and self.end_s >= begin_s - _ON_THEIR_WAY_S


class Attacker:
    """Does harm at random, and notes it."""

    def __init__(self, server: Server, kinds: Sequence[str], pause_s: tuple[float, float]) -> None:
        self.done: list[Harm] = []
        self.counts: Counter[str] = Counter()
        self._server = server
        self._kinds = kinds
        self._pause_s = pause_s
        self._watching: set[asyncio.Task[None]] = set()

    async def run(self, seconds: float) -> None:
        """So long only: a version that is being replaced has a bounded time for its last streams."""
        source = random.Random(RANDOM_SEED)
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            await asyncio.sleep(source.uniform(*self._pause_s))
            kind = source.choices(self._kinds, [HARM[kind] for kind in self._kinds])[0]
            engines = self._server.engines()
            if not engines:
                continue
            engine = source.choice(engines)
            with contextlib.suppress(psutil.NoSuchProcess):
                await self._attack(kind, engine, source)
                self.counts[kind] += 1

    async def end(self) -> None:
        """Nothing goes on any more that it has begun."""
        for watching in self._watching:
            watching.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        for engine in self._server.engines():
            with contextlib.suppress(psutil.NoSuchProcess):
                engine.send_signal(signal.SIGCONT)
                hard_limit = engine.rlimit(psutil.RLIMIT_AS)[1]
                engine.rlimit(psutil.RLIMIT_AS, (hard_limit, hard_limit))

    async def _attack(self, kind: str, engine: psutil.Process, source: random.Random) -> None:
        begin_s = time.monotonic()
        if kind == "killed":
            engine.kill()
        elif kind == "stopped":
            engine.send_signal(signal.SIGSTOP)
            self._watch(Harm(kind, engine.pid, begin_s, float("inf")))
            return
        elif kind == "held up":
            engine.send_signal(signal.SIGSTOP)
            await asyncio.sleep(source.uniform(0.1, 0.7) * STALL_TIMEOUT_S)
            engine.send_signal(signal.SIGCONT)
        elif kind == "starved":
            limit = engine.memory_info().vms + _SPARE_BYTES
            engine.rlimit(psutil.RLIMIT_AS, (limit, engine.rlimit(psutil.RLIMIT_AS)[1]))
            self._watch(Harm(kind, engine.pid, float("inf"), float("inf")))  # none until memory is needed
            return
        elif kind == "standby killed":
            for standby in self._server.standbys():
                standby.kill()
        else:
            async with httpx.AsyncClient(timeout=60) as client:
                answer = await client.post(f"{self._server.url}/v2/repository/models/{MODEL}/load")
            if answer.status_code != 200:  # its new engine was killed while it loaded: the old one must serve on
                self.counts["reloads that failed"] += 1
        self.done.append(Harm(kind, engine.pid, begin_s, time.monotonic()))

    def _watch(self, harm: Harm) -> None:
        self.done.append(harm)
        task = asyncio.create_task(self._until_dead(harm))
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)

    async def _until_dead(self, harm: Harm) -> None:
        """The harm lasts until its engine is dead; one that has not begun by then is its death, if it has no other."""
        with contextlib.suppress(ProcessLookupError):  # it is dead already
            descriptor = os.pidfd_open(harm.pid)
            died, loop = asyncio.Event(), asyncio.get_running_loop()
            loop.add_reader(descriptor, died.set)
            try:
                await died.wait()
            finally:
                loop.remove_reader(descriptor)
                os.close(descriptor)
        now = time.monotonic()
        if not any(other.pid == harm.pid and other.begin_s <= now for other in self.done if other.kind in _DEADLY):
            harm.begin_s = now
        harm.end_s = max(now, harm.begin_s)


@dataclass
class Summary:
    """Of several times in seconds: how many, and how long they were."""

    num: int
    p50_s: float
    p99_s: float
    longest_s: float

    @classmethod
    def of(cls, lengths_s: Iterable[float]) -> Summary:
        """At least one."""
        ordered = sorted(lengths_s)
        at = [ordered[round(share * (len(ordered) - 1))] for share in (0.5, 0.99, 1.0)]
        return cls(len(ordered), *(round(length, 2) for length in at))


class Pauses:
    """The times in which a stream got nothing, though it waited."""

    def __init__(self) -> None:
        self._pauses: list[tuple[float, float]] = []  # begin, end

    def note(self, begin_s: float, end_s: float) -> None:
        """Two tokens of one stream came at these times, and none between them."""
        if end_s - begin_s >= MIN_PAUSE_S:
            self._pauses.append((begin_s, end_s))

    def clear(self) -> None:
        """Nothing has been noted."""
        self._pauses.clear()

    def by_harm(self, harms: Iterable[Harm]) -> dict[str, Summary]:
        """By what fell into them: one harm by its kind, several by their number; those of one first."""
        harms = list(harms)
        lengths_s: dict[tuple[int, str], list[float]] = {}
        for begin_s, end_s in self._pauses:
            kinds = [harm.kind for harm in harms if harm.falls_in(begin_s, end_s)]
            name = kinds[0] if len(kinds) == 1 else f"{len(kinds)} harms"
            lengths_s.setdefault((len(kinds), name), []).append(end_s - begin_s)
        return {name: Summary.of(lengths) for (_, name), lengths in sorted(lengths_s.items())}

    def longest(self, num: int, harms: Iterable[Harm]) -> list[str]:
        """The longest ones, one for each set of harms, told: their seconds, and what fell into them after how many;
        before them, if nothing did."""
        harms = sorted(harms, key=lambda harm: harm.begin_s)
        told: dict[tuple[int, ...], str] = {}
        for begin_s, end_s in sorted(self._pauses, key=lambda pause: pause[0] - pause[1]):
            fell = [harm for harm in harms if harm.falls_in(begin_s, end_s)]
            fell = fell or [harm for harm in harms if harm.end_s < begin_s][-1:]
            what = ", ".join(f"{harm.kind} at {harm.begin_s - begin_s:.1f}" for harm in fell)
            told.setdefault(tuple(map(id, fell)), f"{end_s - begin_s:.1f} s: {what or 'no harm'}")
        return list(told.values())[:num]
