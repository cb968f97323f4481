"""Clients that vanish, engines that die, servers that are told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import psutil
import pytest

PROMPT: dict[str, Any] = {"model": "smollm2-135m-instruct", "prompt": "Count: 1, 2, 3,", "temperature": 0}


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


def test_two_hundred_clients_that_vanish_leave_nothing_behind(server: Any) -> None:
    source = random.Random(5)
    address = urlsplit(server.url)

    async def visit(number: int) -> None:
        body = json.dumps(
            PROMPT
            | {
                "prompt": [number] * source.randint(1, 300),
                "max_tokens": 400,
                "ignore_eos": True,
                "stream": number % 2 == 0,
            }
        ).encode()
        await asyncio.sleep(source.uniform(0, 4))
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        writer.write(head.encode() + b"\r\n\r\n" + body)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(200), source.uniform(0, 1.5))
        if number % 3:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # RST
        writer.close()

    async def crowd() -> None:
        await asyncio.gather(*(visit(number) for number in range(200)))

    asyncio.run(crowd())  # warms every allocator up
    wait_for(lambda: server.metric("llmserve:kv_cache_usage_perc") == 0, "all blocks free")
    engine = server.engines()[0]
    before = engine.memory_info().rss, psutil.Process(server.process.pid).memory_info().rss
    disconnects = server.metric("llmserve:client_disconnects_total")
    asyncio.run(crowd())
    wait_for(lambda: server.metric("llmserve:kv_cache_usage_perc") == 0, "all blocks free")
    assert server.metric("llmserve:num_requests_running") == 0
    assert server.metric("llmserve:num_requests_waiting") == 0
    assert server.metric("llmserve:client_disconnects_total") >= disconnects + 150
    after = engine.memory_info().rss, psutil.Process(server.process.pid).memory_info().rss
    assert after[0] - before[0] < 300 * 2**20  # the cache fills up to its 256 MiB, and no further
    assert after[1] - before[1] < 30 * 2**20
    answer = server.client().completions.create(**PROMPT, max_tokens=5)
    assert answer.usage.completion_tokens == 5


@pytest.mark.skipif(sys.platform != "linux", reason="sets the limits of another process")
def test_connections_beyond_the_open_files_allowed_are_turned_away_and_streams_go_on(server: Any) -> None:
    process, address = psutil.Process(server.process.pid), urlsplit(server.url)
    options: dict[str, Any] = {"stream_options": {"include_usage": True}, "extra_body": {"ignore_eos": True}}
    stream = server.client().completions.create(**PROMPT, max_tokens=150, stream=True, **options)
    next(stream)
    limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (process.num_fds() + 10, limits[1]))
        stack.callback(resource.prlimit, process.pid, resource.RLIMIT_NOFILE, limits)
        for _ in range(50):
            stack.enter_context(socket.create_connection((address.hostname, address.port), timeout=10))
        *_, last = stream
    assert last.usage.completion_tokens == 150
    answer = server.client().completions.create(**PROMPT, max_tokens=5)
    assert answer.usage.completion_tokens == 5


def test_sigterm_lets_a_stream_finish(start_server: Callable[..., Any], smollm2_path: Path) -> None:
    server = start_server("--kv-cache-memory", "64MiB")
    stream = server.client().completions.create(**PROMPT, max_tokens=400, stream=True, extra_body={"ignore_eos": True})
    received = [next(stream)]
    server.process.terminate()
    received.append(next(stream))
    for path in ("/ready", "/v2/health/ready"):  # asked for as long as a stream goes on, on new connections
        assert httpx.get(server.url + path).status_code in (400, 503)
    assert httpx.get(f"{server.url}/ready").json()["reasons"]["smollm2-135m-instruct"] == "draining"
    assert httpx.get(f"{server.url}/v2/health/ready").json()["reasons"]["server"] == "draining"
    assert httpx.get(f"{server.url}/health").status_code == 200
    refused = httpx.post(f"{server.url}/v1/completions", json=PROMPT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
    assert "draining" in refused.json()["error"]["message"]
    received += list(stream)
    assert received[-1].choices[0].finish_reason == "length"
    assert server.process.wait(30) == 0
    with socket.socket() as probe:
        assert probe.connect_ex((urlsplit(server.url).hostname, urlsplit(server.url).port)) != 0


def test_a_second_signal_ends_it_at_once(start_server: Callable[..., Any], smollm2_path: Path) -> None:
    server = start_server("--kv-cache-memory", "64MiB")
    stream = server.client().completions.create(**PROMPT, max_tokens=2000, stream=True, extra_body={"ignore_eos": True})
    next(stream)
    engine = server.engines()[0]
    server.process.terminate()
    for _ in range(5):
        next(stream)  # the first signal lets it go on
    server.process.terminate()
    with pytest.raises((httpx.HTTPError, openai.APIError)):
        list(stream)
    assert server.process.wait(10) == 0  # far below the 30 s that draining may take
    assert not engine.is_running()
    server.join()
    assert "Traceback" not in server.output


def test_the_engine_ends_with_a_server_that_is_killed(start_server: Callable[..., Any], smollm2_path: Path) -> None:
    server = start_server("--kv-cache-memory", "64MiB")
    engine = server.engines()[0]
    server.process.kill()
    wait_for(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, "the engine ends")


def test_an_idle_server_uses_no_cpu(server: Any) -> None:
    processes = [psutil.Process(server.process.pid), *server.engines()]

    def used_s() -> float:
        return sum(p.cpu_times().user + p.cpu_times().system for p in processes)

    wait_for(lambda: server.metric("llmserve:num_requests_running") == 0, "idle")
    before = used_s()
    time.sleep(3)
    assert used_s() - before < 0.15  # of three seconds of two processes; one that polls or spins uses all of them


def test_a_model_that_cannot_be_had_is_one_line_and_status_1(tmp_path: Path) -> None:
    damaged = tmp_path / "model"
    damaged.mkdir()
    (damaged / "config.json").write_text('{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}')
    (damaged / "tokenizer.json").write_text(
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
    )
    command = [sys.executable, "-m", "llmserve.cli", "serve", "--port", "0", str(damaged)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "MambaForCausalLM" in ended.stderr
    assert "LlamaForCausalLM" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_taken_port_is_said_at_once(server: Any) -> None:
    port = str(urlsplit(server.url).port)
    command = [sys.executable, "-m", "llmserve.cli", "serve", "--port", port]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert f"127.0.0.1:{port}" in ended.stderr
