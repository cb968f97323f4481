"""A server under load from keys of its own: the real server process and door over an engine whose model is nothing.

The server is a child process. The client is raw sockets in this one, a connection a request, so that a refusal is timed
without a client library's own work.
"""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
import uvloop

from llmserve.api.app import create_app
from llmserve.api.entrance import Entrance
from llmserve.api.settings import ApiSettings
from llmserve.api_keys import new_key
from llmserve.config import DoorConfig, EngineConfig, ModelConfigEntry, ServerConfig
from llmserve.engine.processes import ENGINE_COMMAND, EngineProcesses
from llmserve.metrics import Metrics
from llmserve.repository.embedded import DEFAULT_LLM
from llmserve.repository.served_models import ServedModels, open_llm
from llmserve.repository.sources import resolve_model

TENANTS = ("flood", "quiet")


@dataclass(frozen=True)
class Load:
    """What the server is started with. `step_s` 0 is the real engine over the embedded model."""

    step_s: float = 0.01
    max_num_seqs: int = 16
    policy: str = "fcfs"
    max_queue_time_s: float = 2.0


@dataclass
class Answer:
    """One request, as its client saw it. Times are seconds from sending; 0 is never."""

    status: int = 0
    first_token_s: float = 0.0
    end_s: float = 0.0
    num_tokens: int = 0
    retry_after: str = ""
    finished_at_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)  # between two arrivals of tokens


async def serve(load: Load, keys: Path) -> None:
    """The child: prints its port and serves until it is ended."""
    metrics = Metrics()
    engine = EngineConfig(
        max_num_seqs=load.max_num_seqs, scheduling_policy=load.policy, max_queue_time_s=load.max_queue_time_s
    )
    command = [sys.executable, "-m", "benchmarks.null_engine", str(load.step_s), str(load.max_num_seqs), load.policy]
    entry = ModelConfigEntry(model=DEFAULT_LLM, engine=engine)
    source = resolve_model(DEFAULT_LLM)
    processes = EngineProcesses(command if load.step_s else ENGINE_COMMAND)
    llm = open_llm(source, entry, ServerConfig(), metrics, processes)
    models = ServedModels()
    models.add(llm, [llm.name])
    await llm.start()
    entrance = Entrance(DoorConfig(api_keys=str(keys)), metrics)
    config = entrance.http_config(create_app(models, ApiSettings(), metrics, entrance=entrance), 1.0)
    config.host, config.port = "127.0.0.1", 0
    server = uvicorn.Server(config)
    settle()
    listener = config.bind_socket()
    print(listener.getsockname()[1], flush=True)
    await server.serve(sockets=[listener])
    await llm.shutdown(5.0)


def settle() -> None:
    """As `llmserve serve` does once its models are there: no collection goes through again what stays for good."""
    gc.collect()
    gc.freeze()


@contextmanager
def running(load: Load) -> Iterator[tuple[int, dict[str, str]]]:
    """(port, key by tenant) of a server process."""
    with tempfile.TemporaryDirectory() as folder:
        path, keys, text = Path(folder) / "keys.toml", {}, ""
        for tenant in TENANTS:
            keys[tenant], digest = new_key()
            text += f'[[keys]]\nname = "{tenant}"\nsha256 = "{digest}"\n'
        path.write_text(text)
        options = json.dumps([load.step_s, load.max_num_seqs, load.policy, load.max_queue_time_s])
        command = [sys.executable, "-m", "benchmarks.door_load", options, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                yield int(server.stdout.readline()), keys
            finally:
                server.terminate()


async def ask(port: int, key: str, prompt: list[int], num_tokens: int, timeout_s: float = 0.0) -> Answer:
    """One streamed completion, EOS ignored; with a `timeout_s` that the server is told."""
    wanted = {"prompt": prompt, "max_tokens": num_tokens, "stream": True, "ignore_eos": True, "temperature": 0}
    body = json.dumps(wanted).encode()
    limit = f"x-request-timeout: {timeout_s}\r\n" if timeout_s else ""
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\nconnection: close\r\n{limit}content-length: {len(body)}\r\n\r\n"
    )
    answer, begin_s, last_s = Answer(), time.perf_counter(), 0.0
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return answer
    try:
        writer.write(head.encode() + body)
        received = await reader.readuntil(b"\r\n\r\n")
        answer.status = int(received[9:12])
        if b"retry-after: " in received:
            answer.retry_after = received.partition(b"retry-after: ")[2].partition(b"\r\n")[0].decode()
        while data := await reader.read(65536):
            count, now_s = data.count(b'"text":'), time.perf_counter()
            if count and not answer.num_tokens:
                answer.first_token_s = now_s - begin_s
            elif count:
                answer.gaps_s.append(now_s - last_s)
            last_s = now_s
            answer.num_tokens += count
    except (OSError, asyncio.IncompleteReadError):
        answer.status = 0
    finally:
        writer.close()
    answer.finished_at_s = time.perf_counter()
    answer.end_s = answer.finished_at_s - begin_s
    return answer


def quantile(values: list[float], share: float) -> float:
    """0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


if __name__ == "__main__":
    uvloop.run(serve(Load(*json.loads(sys.argv[1])), Path(sys.argv[2])))
