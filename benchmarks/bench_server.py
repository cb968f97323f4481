"""What a streamed token costs the server process: HTTP, SSE and JSON over loopback, with a model that says "token".

The model is a fake that hands every stream its next token at once, as an engine's step does; so the figure holds the
wake-up of the stream's task, the encoding, the ASGI layers, uvicorn and the system call. It leaves out what stands
below the API: the engine's message and the detokeniser. The client is another process that reads sockets and counts
afterwards. CPU is that of the server process, user and system, over everything from the first request to the last byte.

    python benchmarks/bench_server.py                 # free-running and paced
    python benchmarks/bench_server.py --responses     # one response class against the other, no sockets
"""

from __future__ import annotations

import argparse
import asyncio
import json
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Self

import psutil

from llmserve.api.app import create_app
from llmserve.api.chunks import ChunkEncoder, Usage
from llmserve.api.settings import ApiSettings
from llmserve.api.stream import EventStreamResponse
from llmserve.backends.generation import GenerationDelta, GenerationSpec, SamplingDefaults
from llmserve.errors import ModelNotFoundError
from llmserve.messages import FinishReason
from llmserve.metrics import Metrics

BUDGET_US = 20.0
# Written down before the first run, on a 2-core EPYC virtual machine with Python 3.11: waking a task 2, delta and
# encoding 2, ASGI layers 2, uvicorn and uvloop 3, the send system call 4; sleeping between steps adds cold caches.
# Measured there, other work beside it (load average 2.5 to 9): free 9.5 to 14.5, paced 20.0 to 26.2. Cold caches cost
# more than predicted: the same Python without any socket takes 3.3 us free-running and 12 us when it wakes every 20 ms.
PREDICTED_US = {"free": 13.0, "paced": 17.0}
TEXT = " token"


class FakeTokenizer:
    """As much as a chat request asks for."""

    vocab_size = 1000
    eos_token_ids = (2,)
    bos_token_id = 1
    special_token_ids = frozenset({1, 2})
    chat_template = "fake"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [3] * 32

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return "prompt"


class FakeGeneration:
    """Tokens come from the clock; delivery is a list and a future, as the real one's."""

    def __init__(self, request_id: str, spec: GenerationSpec, clock: Clock) -> None:
        self.request_id = request_id
        self.left = spec.sampling.max_tokens
        self._clock = clock
        self._ready: list[GenerationDelta] = []
        self._wakeup: asyncio.Future[None] | None = None

    def push(self, num_tokens: int) -> None:
        for _ in range(min(num_tokens, self.left)):
            self.left -= 1
            reason = None if self.left else FinishReason.LENGTH
            self._ready.append(GenerationDelta(index=0, text=TEXT, token_ids=[5], finish_reason=reason))
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._clock.leave(self)

    async def __aiter__(self) -> AsyncIterator[list[GenerationDelta]]:
        while True:
            if self._ready:
                ready, self._ready = self._ready, []
                yield ready
            elif not self.left:
                return
            else:
                self._wakeup = asyncio.get_running_loop().create_future()
                self._clock.wait(self)
                await self._wakeup


class Clock:
    """Gives every stream `tokens_per_step` tokens a step. `step_s` None: as soon as all have taken the last ones."""

    def __init__(self, num_streams: int, step_s: float | None, tokens_per_step: int) -> None:
        self._num_streams = num_streams
        self._step_s = step_s
        self._tokens_per_step = tokens_per_step
        self._waiting: set[FakeGeneration] = set()
        self._num_left = 0
        self._task: asyncio.Task[None] | None = None

    def wait(self, generation: FakeGeneration) -> None:
        self._waiting.add(generation)
        if len(self._waiting) + self._num_left < self._num_streams:
            return
        if self._step_s is None:
            asyncio.get_running_loop().call_soon(self._step)
        elif self._task is None:
            self._task = asyncio.create_task(self._run(self._step_s, list(self._waiting)))

    def leave(self, generation: FakeGeneration) -> None:
        self._waiting.discard(generation)
        self._num_left += 1

    def _step(self) -> None:
        waiting, self._waiting = self._waiting, set()
        for generation in waiting:
            generation.push(self._tokens_per_step)

    async def _run(self, step_s: float, generations: list[FakeGeneration]) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while self._num_left < self._num_streams:
            for generation in generations:
                generation.push(self._tokens_per_step)
            due_s += step_s
            await asyncio.sleep(due_s - loop.time())


class FakeModel:
    """Implements TextGenerator and is its own directory."""

    name = default = "fake"
    names = ("fake",)
    root = "fake"
    created = 0
    max_model_len = 1 << 20
    max_logprobs = 0

    def __init__(self, clock: Clock) -> None:
        self.tokenizer = FakeTokenizer()
        self.sampling_defaults = SamplingDefaults()
        self._clock = clock

    def get(self, name: str) -> FakeModel:
        if name != self.name:
            raise ModelNotFoundError(name, [self.name])
        return self

    def is_ready(self) -> bool:
        return True

    def is_live(self) -> bool:
        return True

    def generate(self, request_id: str, spec: GenerationSpec) -> FakeGeneration:
        return FakeGeneration(request_id, spec, self._clock)


def run_server(streams: int, step_s: float | None, tokens_per_step: int) -> None:
    """The server process: prints its port and serves until it is ended."""
    import uvicorn

    model = FakeModel(Clock(streams, step_s, tokens_per_step))
    app = create_app(model, ApiSettings(), Metrics())  # type: ignore[arg-type]  # the tokenizer is a part of one
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        config = uvicorn.Config(app, loop="uvloop", http="httptools", log_level="warning", lifespan="off")
        uvicorn.Server(config).run(sockets=[listener])


def read_streams(port: int, streams: int, tokens: int) -> tuple[int, int]:
    """(events with text, body chunks received) over all streams."""
    body = json.dumps(
        {"messages": [{"role": "user", "content": "go"}], "stream": True, "max_tokens": tokens, "seed": 1}
    ).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"
    received: dict[socket.socket, bytearray] = {}
    with selectors.DefaultSelector() as selector:
        for _ in range(streams):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(head.encode() + body)
            received[connection] = bytearray()
            selector.register(connection, selectors.EVENT_READ)
        open_streams = streams
        while open_streams:
            for key, _ in selector.select(timeout=60):
                connection = key.fileobj  # type: ignore[assignment]
                data = connection.recv(1 << 16)
                received[connection] += data
                if not data or received[connection].endswith(b"0\r\n\r\n"):
                    selector.unregister(connection)
                    connection.close()
                    open_streams -= 1
    whole = b"".join(received.values())
    return whole.count(b'"content":"' + TEXT.encode()), whole.count(b"\r\ndata: ")


def measure(mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """One run against a fresh server process."""
    step = ["--step-s", str(options.tokens_per_step / options.rate)] if mode == "paced" else []
    command = [sys.executable, __file__, "--serve", "--streams", str(options.streams), *step]
    command += ["--tokens-per-step", str(options.tokens_per_step)]
    tokens = options.tokens if mode == "free" else min(options.tokens, int(options.rate * options.seconds))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        process = psutil.Process(server.pid)
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            wait_until_idle(process)
            before, begin_s = process.cpu_times(), time.perf_counter()
            num_events, num_chunks = read_streams(port, options.streams, tokens)
            wall_s, after = time.perf_counter() - begin_s, process.cpu_times()
        finally:
            server.terminate()
    assert num_events == options.streams * tokens, (num_events, options.streams * tokens)
    user_s, system_s = after.user - before.user, after.system - before.system
    return {
        "mode": mode,
        "tokens": num_events,
        "tokens_per_send": round(num_events / num_chunks, 2),
        "tokens_per_s": round(num_events / wall_s),
        "user_us_per_token": round(user_s / num_events * 1e6, 2),
        "system_us_per_token": round(system_s / num_events * 1e6, 2),
        "cpu_us_per_token": round((user_s + system_s) / num_events * 1e6, 2),
        "predicted_us": PREDICTED_US[mode] if options.tokens_per_step == 1 else None,
        "budget_us": BUDGET_US,
    }


def wait_until_idle(process: psutil.Process) -> None:
    """Imports and start-up are not what is measured."""
    last = -1.0
    while (now := sum(process.cpu_times()[:2])) != last:
        last = now
        time.sleep(0.3)


class ConstantChunks:
    """An encoder whose events are ready made: what is left is the response's own cost."""

    def opening(self) -> bytes:
        return b""

    def encode(self, deltas: list[GenerationDelta]) -> bytes:
        return b"data: {}\n\n"

    def closing(self) -> bytes:
        return b"data: [DONE]\n\n"


class ReadyMade:
    """A generation with all its deltas at hand."""

    request_id = "x"

    def __init__(self, num_deltas: int) -> None:
        self._deltas = [[GenerationDelta(index=0, text=TEXT, token_ids=[5])]] * num_deltas

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        return

    async def __aiter__(self) -> AsyncIterator[list[GenerationDelta]]:
        for deltas in self._deltas:
            yield deltas


async def _never() -> dict[str, Any]:
    await asyncio.Event().wait()
    return {}


async def _nowhere(message: Any) -> None:
    return


def compare_responses(num_sends: int) -> None:
    """CPU a send of our response, of sse-starlette's, and of encoding a chunk, in microseconds."""
    from sse_starlette import EventSourceResponse

    async def events() -> AsyncIterator[bytes]:
        encoder = ConstantChunks()
        async for deltas in ReadyMade(num_sends):
            yield encoder.encode(deltas)

    async def cost(run: Callable[[], Awaitable[None]]) -> float:
        begin_s = time.process_time()
        await run()
        return (time.process_time() - begin_s) / num_sends * 1e6

    scope: dict[str, Any] = {"type": "http", "method": "POST"}
    ours = EventStreamResponse(
        lambda: ReadyMade(num_sends), ConstantChunks(), keep_alive_s=15.0, on_disconnect=lambda: None, headers={}
    )
    theirs = EventSourceResponse(events())
    print(
        f"EventStreamResponse               {asyncio.run(cost(lambda: ours(scope, _never, _nowhere))):6.2f} us a send"
    )
    print(
        f"sse-starlette EventSourceResponse {asyncio.run(cost(lambda: theirs(scope, _never, _nowhere))):6.2f} us a send"
    )
    print(f"ChunkEncoder.encode               {encode_cost(num_sends):6.2f} us a token")


def encode_cost(num_tokens: int) -> float:
    """Microseconds of CPU to encode one delta of a chat stream."""
    from llmserve.api.chat import ChatShape
    from llmserve.api.protocol import ChatCompletionRequest

    request = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "go"}]})
    shape = ChatShape(FakeTokenizer(), request, [])  # type: ignore[arg-type]
    envelope = {"id": "chatcmpl-" + "0" * 32, "created": 1, "model": "fake"}
    usage = Usage(prompt_tokens=1, n=1)
    encoder = ChunkEncoder(envelope, shape, usage, 1, include_usage=True, continuous_usage=False)
    deltas = [GenerationDelta(index=0, text=TEXT, token_ids=[5])]
    begin_s = time.process_time()
    for _ in range(num_tokens):
        encoder.encode(deltas)
    return (time.process_time() - begin_s) / num_tokens * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2000, help="of each stream, free-running")
    parser.add_argument("--rate", type=float, default=50.0, help="tokens a second and stream, paced")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the paced run")
    parser.add_argument("--tokens-per-step", type=int, default=1)
    parser.add_argument("--responses", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--step-s", type=float, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        run_server(options.streams, options.step_s, options.tokens_per_step)
    elif options.responses:
        compare_responses(100_000)
    else:
        for mode in ("free", "paced"):
            print(json.dumps(measure(mode, options)))


if __name__ == "__main__":
    main()
