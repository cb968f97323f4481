"""Ten thousand connections that say nothing: what they cost, and what others notice of them.

    python -m benchmarks.bench_idle_connections [--connections 10000]

The server is a child with its defaults: 8,192 connections may be, whose headers may take 10 s. Needs as many open
files.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter

import uvloop

from benchmarks.door_load import Load, ask, quantile, running
from benchmarks.needs import psutil
from llmserve.api.http_server import raise_file_limit

BURST = 250
# Written down before the first run.
PREDICTED = "12 KiB a connection, all answered 408 or 503, others' first token p99 twice that without"


async def first_tokens(port: int, key: str, number: int) -> list[float]:
    """Milliseconds to the first token of so many requests, one after the other."""
    answers = [await ask(port, key, [1000 + index, 5], 2) for index in range(number)]
    assert all(answer.status == 200 for answer in answers), Counter(answer.status for answer in answers)
    return [answer.first_token_s * 1e3 for answer in answers]


async def measure(num_connections: int) -> None:
    print(f"predicted: {PREDICTED}", flush=True)
    with running(Load(step_s=0.001)) as (port, keys):
        key = keys["quiet"]
        server = next(child for child in psutil.Process().children() if "benchmarks.door_load" in child.cmdline())
        await first_tokens(port, key, 50)
        before, alone = server.memory_info().rss, await first_tokens(port, key, 100)
        begin_s = time.perf_counter()
        connections = []
        for begin in range(0, num_connections, BURST):
            burst = range(begin, min(begin + BURST, num_connections))
            connections += await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in burst))
        opened_s = time.perf_counter() - begin_s
        held = server.memory_info().rss
        beside = await first_tokens(port, key, 100) if num_connections <= 8000 else []
        told = Counter([(await reader.read())[9:12].decode() for reader, _ in connections])
        for _, writer in connections:
            writer.close()
        after = await first_tokens(port, key, 100)
        print(
            f"{num_connections} connections opened in {opened_s:.1f} s, answered {dict(told)}\n"
            f"memory of the server {before / 2**20:.0f} MiB before, {held / 2**20:.0f} with them "
            f"({(held - before) / 1024 / num_connections:.1f} KiB each), {server.memory_info().rss / 2**20:.0f} after; "
            f"descriptors left {server.num_fds()}"
        )
        for name, times in (("alone", alone), ("beside", beside), ("after", after)):
            p50, p99 = quantile(times, 0.5), quantile(times, 0.99)
            print(
                f"first token {name}: " + (f"p50 {p50:.1f}, p99 {p99:.1f} ms" if times else "all connections are taken")
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=10_000)
    raise_file_limit()
    uvloop.run(measure(parser.parse_args().connections))


if __name__ == "__main__":
    main()
