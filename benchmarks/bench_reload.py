"""The memory of a server whose language model is reloaded again and again, and what else could be left behind.

python -m benchmarks.bench_reload [--reloads 20]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks.chaos_server import MODEL, Server

SETTLED = 4  # reloads after which every allocator has what it needs
# Written down before the first run.
PREDICTED = "level after the first reloads: under 0.1 MiB a reload; nothing left"


async def reload(server: Server, client: httpx.AsyncClient) -> float:
    """Seconds until the new version serves and nothing is left of the old one."""
    begin_s = time.perf_counter()
    (await client.post(f"{server.url}/v2/repository/models/{MODEL}/load")).raise_for_status()
    took_s = time.perf_counter() - begin_s
    asked = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}
    (await client.post(f"{server.url}/v1/completions", json=asked)).raise_for_status()
    while len(server.engines()) != 1 or len(server.standbys()) != 1:  # noqa: ASYNC110  # other processes: no event
        await asyncio.sleep(0.1)
    return took_s


async def measure(num_reloads: int) -> None:
    print(f"predicted: {PREDICTED}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            await server.start()
            async with httpx.AsyncClient(timeout=300) as client:
                await reload(server, client)
                before = server.holdings()
                memory_mib, took_s = [], []
                for _ in range(num_reloads):
                    took_s.append(await reload(server, client))
                    memory_mib.append(server.memory_mib())
                    print(f"{took_s[-1]:.1f} s, {memory_mib[-1]:.1f} MiB", flush=True)
                after = server.holdings()
        finally:
            server.process.terminate()
            server.process.wait(60)
    settled = memory_mib[min(SETTLED, num_reloads - 1) :]
    growth = (settled[-1] - settled[0]) / max(len(settled) - 1, 1)
    print(f"{num_reloads} reloads of {statistics.median(took_s):.1f} s: {growth:+.2f} MiB each once settled")
    print(
        f"left behind: { {what: after[what] - count for what, count in before.items() if after[what] > count} or None }"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reloads", type=int, default=20)
    asyncio.run(measure(parser.parse_args().reloads))


if __name__ == "__main__":
    main()
