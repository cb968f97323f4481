"""Connections that say nothing: others are answered meanwhile, they cost little, and in the end none is left."""

from __future__ import annotations

import asyncio
import gc
import resource

import httpx
import psutil

from llmserve.api.http_server import raise_file_limit
from llmserve.config import DoorConfig
from tests.door.conftest import ASK, GuardedServer, ServeGuarded

NUM_CONNECTIONS = 2000
BURST = 200
MAX_BYTES = 64 * 1024  # a connection, at both of its ends, which are in this process


async def keep_silent(served: GuardedServer) -> list[bytes]:
    """What each connection was told in the end."""
    connections = []
    for _ in range(NUM_CONNECTIONS // BURST):
        opened = (asyncio.open_connection("127.0.0.1", served.port) for _ in range(BURST))
        connections += await asyncio.gather(*opened)
    async with httpx.AsyncClient(base_url=served.url, timeout=10) as client:
        for _ in range(5):
            assert (await client.get("/health")).status_code == 200
            assert (await client.post("/v1/chat/completions", json=ASK)).status_code == 200
    told = await asyncio.gather(*(reader.read() for reader, _ in connections))
    for _, writer in connections:
        writer.close()
    return told


def test_thousands_of_silent_connections_cost_little_and_are_let_go(serve_guarded: ServeGuarded) -> None:
    raise_file_limit()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == resource.RLIM_INFINITY or soft > 2 * NUM_CONNECTIONS + 512, "raise the limit of open files"
    served = serve_guarded(DoorConfig(header_timeout_s=2.0))
    process = psutil.Process()
    before = process.memory_info().rss
    told = asyncio.run(keep_silent(served))
    assert process.memory_info().rss - before < NUM_CONNECTIONS * MAX_BYTES
    assert all(answer.startswith(b"HTTP/1.1 408 ") for answer in told)
    gc.collect()
    assert process.num_fds() < 512
    with served.client() as client:
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200


def test_with_few_open_files_there_are_few_connections(serve_guarded: ServeGuarded) -> None:
    """Twice as many as may be are not refused by the system in the middle of something, but by us, with a 503."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        served = serve_guarded(DoorConfig(header_timeout_s=0.5))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    async def crowd() -> list[bytes]:
        opened = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", served.port) for _ in range(400)))
        told = await asyncio.gather(*(reader.read() for reader, _ in opened))
        for _, writer in opened:
            writer.close()
        return told

    told = asyncio.run(crowd())
    refused = [answer for answer in told if answer.startswith(b"HTTP/1.1 503 ")]
    assert len(refused) >= 300 - 5  # half of what is allowed stays free for engines and files
    assert all(b"retry-after: 1" in answer and b"There are 100 connections already" in answer for answer in refused)
    with served.client() as client:
        assert client.get("/health").status_code == 200
