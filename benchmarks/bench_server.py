"""What a streamed token costs the server process, all in: the engine's message, detokenising, JSON, SSE, HTTP, sockets.

The server process is the real one, over the embedded model's tokenizer; only the engine's model is null
(`null_engine.py`): it has a token for every stream in every step. The client is a third process that reads sockets and
counts afterwards. CPU is the server process's, user and system, from the first request to the last byte.

* free: steps as fast as they go. Tokens that are ready together are written together.
* paced: every stream gets a token every 20 ms, which is never written together with the next.

    python -m benchmarks.bench_server [--streams 64] [--repeat 5]
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

import uvicorn
import uvloop

from benchmarks.needs import psutil
from llmserve.api.app import create_app
from llmserve.api.settings import ApiSettings
from llmserve.config import EngineConfig, ModelConfigEntry, ServerConfig
from llmserve.engine.processes import EngineProcesses
from llmserve.metrics import Metrics
from llmserve.repository.embedded import DEFAULT_LLM
from llmserve.repository.served_models import ServedModels, open_llm
from llmserve.repository.sources import resolve_model

BUDGET_US = 20.0
STEP_S = {"free": 0.0, "paced": 0.02}
# Written down before the first run: the engine's message 1, detokenising and bookkeeping 3, waking a task 2, encoding
# 1, ASGI layers 2, uvicorn and uvloop 3, the send system call 4; asleep between steps, cold caches double the Python.
PREDICTED_US = {"free": 12.0, "paced": 24.0}


async def serve(step_s: float) -> None:
    """The server process: prints its port and serves until it is ended."""
    metrics = Metrics()
    entry = ModelConfigEntry(model=DEFAULT_LLM, engine=EngineConfig())
    command = (sys.executable, "-m", "benchmarks.null_engine", str(step_s))
    llm = open_llm(resolve_model(DEFAULT_LLM), entry, ServerConfig(), metrics, EngineProcesses(command))
    models = ServedModels()
    models.add(llm, [llm.name])
    await llm.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        config = uvicorn.Config(
            create_app(models, ApiSettings(), metrics), http="httptools", log_level="warning", lifespan="off"
        )
        await uvicorn.Server(config).serve(sockets=[listener])
    await llm.shutdown(5.0)


def read_streams(port: int, streams: int, tokens: int) -> int:
    """Reads all streams to their ends; the number of events with text."""
    ask = {"messages": [{"role": "user", "content": "go"}], "stream": True, "max_tokens": tokens, "seed": 1}
    body = json.dumps(ask).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    received: dict[socket.socket, bytearray] = {}
    with selectors.DefaultSelector() as selector:
        for _ in range(streams):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
            received[connection] = bytearray()
            selector.register(connection, selectors.EVENT_READ, received[connection])
        open_streams = streams
        while open_streams:
            for key, _ in selector.select(timeout=60):
                connection = key.fileobj  # type: ignore[assignment]
                data = connection.recv(1 << 16)
                key.data.extend(data)
                if not data or key.data.endswith(b"0\r\n\r\n"):
                    selector.unregister(connection)
                    connection.close()
                    open_streams -= 1
    return b"".join(received.values()).count(b'"content":" in"')


def measure(mode: str, streams: int, tokens: int) -> dict[str, float]:
    """One run against a fresh server process."""
    command = [sys.executable, "-m", "benchmarks.bench_server", "--serve", str(STEP_S[mode])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        process = psutil.Process(server.pid)
        try:
            read_streams(port, streams, 50)  # first touches: caches, lazy imports
            before, begin_s = process.cpu_times(), time.perf_counter()
            num_events = read_streams(port, streams, tokens)
            wall_s, after = time.perf_counter() - begin_s, process.cpu_times()
        finally:
            server.terminate()
    assert num_events == streams * tokens, (num_events, streams * tokens)
    cpu_s = after.user - before.user + after.system - before.system
    return {"us": cpu_s / num_events * 1e6, "tokens_per_s": num_events / wall_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", type=float, metavar="STEP_S", help=argparse.SUPPRESS)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    if options.serve is not None:
        uvloop.run(serve(options.serve))
        return
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in STEP_S}
    for _ in range(options.repeat):
        for mode, results in runs.items():
            results.append(measure(mode, options.streams, options.tokens))
    print(f"CPU of the server process at {options.streams} streams of {options.tokens} tokens; budget {BUDGET_US} us")
    for mode, results in runs.items():
        costs = sorted(result["us"] for result in results)
        rate = statistics.median(result["tokens_per_s"] for result in results)
        print(
            f"{mode:6} predicted {PREDICTED_US[mode]:5.1f} us   median {statistics.median(costs):5.1f} us "
            f"(min {costs[0]:.1f}, max {costs[-1]:.1f})   {rate:.0f} tokens/s"
        )


if __name__ == "__main__":
    main()
