"""The engine's process and the server's side of it: life, death, heartbeats, draining. A tiny model, real sockets."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from llmserve.config import EngineConfig
from llmserve.engine.client import EngineClient, EngineState
from llmserve.errors import EngineDeadError, InsufficientMemoryError, ModelLoadError
from llmserve.messages import AbortRequests, EngineRequest, EngineStats, FinishReason, SamplingParams, StepOutputs


class Listener:
    """Collects what a client reports."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, FinishReason] = {}
        self.errors: dict[str, tuple[str, str]] = {}
        self.idle: list[EngineStats] = []
        self.deaths: list[Exception] = []
        self.changed = asyncio.Event()

    def on_step(self, step: StepOutputs) -> None:
        for output in step.outputs:
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.finished[output.request_id] = output.finish_reason
            if output.error is not None:
                self.errors[output.request_id] = output.error
        self.changed.set()

    def on_idle(self, stats: EngineStats) -> None:
        self.idle.append(stats)
        self.changed.set()

    def on_dead(self, error: Exception) -> None:
        self.deaths.append(error)
        self.changed.set()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


def ask(request_id: str, max_tokens: int, prompt_len: int = 8) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens, seed=1, temperature=0.0)
    prompt = [5 + i % 300 for i in range(prompt_len)]
    return EngineRequest(request_id=request_id, prompt_token_ids=prompt, params=params, arrival_s=time.monotonic())


def with_engine(path: Path, use: Callable[[EngineClient, Listener], Awaitable[None]], **settings: Any) -> None:
    """Runs `use` against a ready engine, and ends the engine."""

    async def scenario() -> None:
        listener = Listener()
        config = EngineConfig(model=str(path), device="cpu", kv_cache_memory=2**22, num_threads=1, **settings)
        client = EngineClient(config, listener.on_step, listener.on_idle, listener.on_dead)
        try:
            await client.start()
            await use(client, listener)
        finally:
            await client.shutdown(drain=False, timeout_s=10)
            assert client.pid is not None
            with pytest.raises(ProcessLookupError):
                os.kill(client.pid, 0)

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_tokens_come_back_and_idle_says_that_all_is_free(tiny_llama: Path) -> None:
    async def use(client: EngineClient, listener: Listener) -> None:
        client.send(ask("a", 5))
        client.send(ask("b", 9))
        await listener.until(lambda: len(listener.finished) == 2)
        assert {name: len(tokens) for name, tokens in listener.tokens.items()} == {"a": 5, "b": 9}
        listener.idle.clear()
        await listener.until(lambda: listener.idle)
        assert listener.idle[0].num_free_blocks == listener.idle[0].num_blocks

    with_engine(tiny_llama, use)


def test_an_abort_frees_at_once_and_unknown_ids_are_ignored(tiny_llama: Path) -> None:
    async def use(client: EngineClient, listener: Listener) -> None:
        client.send(ask("a", 400))
        await listener.until(lambda: len(listener.tokens.get("a", [])) > 3)
        listener.idle.clear()
        client.send(AbortRequests(["a", "never"]))
        await listener.until(lambda: listener.idle)
        assert listener.idle[0].num_free_blocks == listener.idle[0].num_blocks
        assert "a" not in listener.finished

    with_engine(tiny_llama, use)


def test_a_request_that_could_never_run_is_refused_and_the_engine_lives(tiny_llama: Path) -> None:
    async def use(client: EngineClient, listener: Listener) -> None:
        client.send(ask("long", 5, prompt_len=600))
        await listener.until(lambda: listener.errors)
        assert listener.errors["long"][0] == "invalid_request"
        client.send(ask("next", 3))
        await listener.until(lambda: "next" in listener.finished)

    with_engine(tiny_llama, use)


def test_a_killed_engine_is_dead_at_once(tiny_llama: Path) -> None:
    async def use(client: EngineClient, listener: Listener) -> None:
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await listener.until(lambda: listener.deaths)
        assert client.state is EngineState.DEAD
        with pytest.raises(EngineDeadError, match="signal 9"):
            client.send(ask("a", 1))

    with_engine(tiny_llama, use)


def test_sigterm_drains(tiny_llama: Path) -> None:
    async def use(client: EngineClient, listener: Listener) -> None:
        client.send(ask("a", 200))
        await listener.until(lambda: listener.tokens)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGTERM)
        await listener.until(lambda: listener.deaths)
        assert len(listener.tokens["a"]) == 200

    with_engine(tiny_llama, use)


def test_shutdown_waits_for_what_is_in_flight(tiny_llama: Path) -> None:
    async def use(client: EngineClient, listener: Listener) -> None:
        client.send(ask("a", 200))
        await listener.until(lambda: listener.tokens)
        client.send(ask("b", 20))
        await client.shutdown(drain=True, timeout_s=30)
        assert not listener.deaths

    with_engine(tiny_llama, use)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"max_model_len": 100_000}, Exception, "512 positions"),
        ({"kv_cache_memory": 2**60}, InsufficientMemoryError, "kv_cache_memory"),
    ],
)
def test_what_cannot_start_says_why(
    tiny_llama: Path, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    async def scenario() -> None:
        client = EngineClient(
            EngineConfig(model=str(tiny_llama), device="cpu", **settings),
            lambda _: None,
            lambda _: None,
            lambda _: None,
        )
        with pytest.raises(error, match=words):
            await client.start()
        await client.shutdown(drain=False, timeout_s=5)

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_damaged_model_says_which_file(tiny_llama: Path, tmp_path: Path) -> None:
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])

    async def scenario() -> None:
        client = EngineClient(
            EngineConfig(model=str(tmp_path), device="cpu"), lambda _: None, lambda _: None, lambda _: None
        )
        with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
            await client.start()
        await client.shutdown(drain=False, timeout_s=5)

    asyncio.run(asyncio.wait_for(scenario(), 60))
