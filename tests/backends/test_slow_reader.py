"""A client that does not read, over real sockets: the engine goes on with others, and no token is lost or said twice.

The engine is the scripted one; HTTP, tokenizer, LLM and their bookkeeping are the real ones.
"""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import uvicorn

from llmserve.api.app import create_app
from llmserve.api.entrance import Entrance
from llmserve.api.settings import ApiSettings
from llmserve.backends.sequence import MAX_UNREAD
from llmserve.metrics import Metrics
from llmserve.repository.served_models import ServedModels
from tests.backends.test_reload import make_llm
from tests.engine.scripted_engine import answer

NUM_TOKENS = 2000
PROMPT = [7, 8, 9]
ASK = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "seed": 5, "stream": True, "ignore_eos": True}


def ask(port: int) -> socket.socket:
    """A client with a small window, that has asked and reads nothing yet."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    body = json.dumps(ASK | {"return_token_ids": True}).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    )
    client.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
    client.setblocking(False)
    return client


async def read_all(client: socket.socket) -> list[int]:
    """The token ids of the whole answer."""
    received = b""
    while data := await asyncio.get_running_loop().sock_recv(client, 65536):
        received += data
    lines = received.replace(b"\r\n", b"\n").split(b"\n")
    events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    return [token for event in events for choice in event["choices"] for token in choice["token_ids"]]


async def until_paused(num_pauses: int, llm: object) -> None:
    async with asyncio.timeout(60):
        while llm.metrics.request_pauses < num_pauses:  # type: ignore[attr-defined]  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def scenario(path: Path) -> None:
    llm, models = make_llm(path), ServedModels()
    models.add(llm, ["m"])
    await llm.start()
    metrics = Metrics()
    config = Entrance().http_config(create_app(models, ApiSettings(), metrics), 1.0)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        slow = await asyncio.to_thread(ask, listener.getsockname()[1])
        await until_paused(1, llm)
        (generation,) = {sequence.generation for sequence in llm._sequences.values()}
        assert len(generation._ready) <= MAX_UNREAD + 1
        quick = await asyncio.to_thread(ask, listener.getsockname()[1])
        expected = answer(PROMPT, 5, NUM_TOKENS)
        assert await read_all(quick) == expected  # while the other stands still
        assert len(generation._ready) <= MAX_UNREAD + 1
        assert llm.metrics.num_requests_running == 0
        assert await read_all(slow) == expected
        slow.close()
        quick.close()
        server.should_exit = True
        await serving
    await llm.shutdown(5.0)


def test_who_does_not_read_is_held_back_and_hears_everything(smollm2_path: Path) -> None:
    asyncio.run(asyncio.wait_for(scenario(smollm2_path), 100))
