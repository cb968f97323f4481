"""A version of an LLM that is replaced: it is freed as soon as it is done, and late requests go to the next.

The engine is the scripted one; tokenizer, LLM and their bookkeeping are the real ones.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import signal
import sys
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from llmserve.api.settings import ApiSettings
from llmserve.api.v2_llm import ServedLanguageModels
from llmserve.backends.generation import GenerationSpec
from llmserve.backends.llm import LLM
from llmserve.config import ModelConfigEntry, ServerConfig
from llmserve.engine.processes import EngineProcesses
from llmserve.engine.supervision import Phase
from llmserve.errors import EngineDeadError, NotReadyError
from llmserve.messages import SamplingParams
from llmserve.metrics import Metrics
from llmserve.repository import language_models
from llmserve.repository.language_models import LanguageModels
from llmserve.repository.served_models import ServedModels, open_llm
from llmserve.repository.sources import ModelSource
from tests.engine.scripted_engine import Script


def make_llm(path: Path, version: int = 1, script: Script | None = None) -> LLM:
    entry = ModelConfigEntry(model="m")
    source = ModelSource(kind="folder", name="m", root="m", path=path)
    script_json = msgspec.json.encode(script or Script()).decode()
    processes = EngineProcesses((sys.executable, "-m", "tests.engine.scripted_engine", script_json))
    return open_llm(source, entry, ServerConfig(log_level="error"), Metrics(), processes, version)


async def ask(llm: LLM, name: str, max_tokens: int = 20, leave_after: int = 1000) -> int:
    params = SamplingParams(max_tokens=max_tokens, seed=1)
    num_tokens = 0
    async with llm.generate(name, GenerationSpec(prompt_token_ids=[7, 8, 9], sampling=params, n=2)) as generation:
        async for deltas in generation:
            num_tokens += sum(len(delta.token_ids) for delta in deltas)
            if num_tokens >= leave_after:
                break
    return num_tokens


async def ask_and_kill(llm: LLM, name: str, max_tokens: int, mark: Path, num_deaths: int) -> asyncio.Task[int]:
    """A request of a model just started whose engine is then killed, and so many of those behind it as they load."""
    await llm.start()
    asked = asyncio.create_task(ask(llm, name, max_tokens))
    await ask(llm, "meanwhile", 5)
    assert llm.engine.pid is not None
    mark.write_bytes(bytes(num_deaths))  # noqa: ASYNC240 (a few bytes)
    os.kill(llm.engine.pid, signal.SIGKILL)
    return asked


async def until_ended(llm: LLM) -> None:
    for _ in range(1000):
        if llm.engine.pid is None:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("its engine never ends")


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def use_and_end(llm: LLM) -> None:
    """Everything a version may go through: answers, an abort, a death of its engine, requests that are cut off."""
    assert await ask(llm, "whole") == 40
    assert await ask(llm, "left", 4000, leave_after=5) < 100
    long = asyncio.create_task(ask(llm, "long", 400))
    cut = asyncio.create_task(ask(llm, "cut", 4000))
    await ask(llm, "meanwhile", 50)
    assert llm.engine.pid is not None
    os.kill(llm.engine.pid, signal.SIGKILL)
    assert await long == 800
    await llm.drain(0.05)
    await llm.shutdown(5)
    (error,) = await asyncio.gather(cut, return_exceptions=True)
    assert isinstance(error, EngineDeadError)


@pytest.mark.usefixtures("no_collector")
def test_a_version_is_freed_without_the_garbage_collector(smollm2_path: Path) -> None:
    async def scenario() -> None:
        llm = make_llm(smollm2_path)
        await llm.start()
        await use_and_end(llm)
        gone = [weakref.ref(part) for part in (llm, llm.engine, llm.tokenizer)]
        del llm
        await asyncio.sleep(0)
        assert [part() for part in gone] == [None, None, None]

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_version_that_retires_does_not_cut_off_whom_its_engine_has_kept_waiting(
    smollm2_path: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "die"

    async def scenario() -> None:
        llm = make_llm(smollm2_path, script=Script(die_in_load_if=str(mark)))
        # half a second of pause after each of four deaths: longer than the time to retire
        long = await ask_and_kill(llm, "long", 150, mark, num_deaths=4)
        assert not long.done()
        await llm.retire(1.5)
        await llm.shutdown(5)
        assert await long == 300

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_version_that_retires_without_any_time_waits_for_no_engine(smollm2_path: Path, tmp_path: Path) -> None:
    """Asked again at once, it would keep the event loop busy for as long as there is no engine."""
    mark = tmp_path / "die"

    async def scenario() -> None:
        llm = make_llm(smollm2_path, script=Script(die_in_load_if=str(mark)))
        cut = await ask_and_kill(llm, "cut", 4000, mark, num_deaths=2)
        for _ in range(10_000):
            if llm.engine.phase is Phase.RESTARTING:
                break
            await asyncio.sleep(0.001)
        await llm.retire(0)
        assert llm.engine.phase is Phase.RESTARTING
        await llm.shutdown(5)
        (error,) = await asyncio.gather(cut, return_exceptions=True)
        assert isinstance(error, EngineDeadError)

    asyncio.run(asyncio.wait_for(scenario(), 60))


def reload(
    paths: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    use: Callable[[ServedModels, LanguageModels], Awaitable[None]],
) -> None:
    """Runs `use` against a served model whose versions have those folders."""
    monkeypatch.setattr(language_models, "_LATE_S", 0.05)

    async def scenario() -> None:
        served = ServedModels()
        models = LanguageModels(served, lambda entry, version: make_llm(paths[version - 1], version), drain_s=5)
        first = make_llm(paths[0])
        models.add(first, ModelConfigEntry(model="m"))
        await first.start()
        del first
        try:
            await use(served, models)
        finally:
            await models.stop(5)

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.usefixtures("no_collector")
def test_a_late_request_goes_to_the_next_version_and_then_the_old_one_is_gone(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(served: ServedModels, models: LanguageModels) -> None:
        old = served.get("m")
        freed = asyncio.Event()
        weakref.finalize(old, freed.set)
        await models.load("m")
        await models.load("m")
        await until_ended(old)
        assert served.get("m").version == 3
        assert await ask(old, "late") == 40
        del old
        await asyncio.wait_for(freed.wait(), 10)

    reload([smollm2_path] * 3, monkeypatch, use)


@pytest.mark.usefixtures("no_collector")
def test_the_memory_of_a_version_is_given_back_once_it_is_gone(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(served: ServedModels, models: LanguageModels) -> None:
        tokenizer = weakref.ref(served.get("m").tokenizer)
        was_gone = asyncio.get_running_loop().create_future()
        monkeypatch.setattr(language_models, "give_back", lambda: was_gone.set_result(tokenizer() is None))
        await models.load("m")
        assert await asyncio.wait_for(was_gone, 20)

    reload([smollm2_path] * 2, monkeypatch, use)


@pytest.mark.usefixtures("no_collector")
def test_a_version_that_was_seen_over_v2_is_freed_though_nobody_looks_again(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(served: ServedModels, models: LanguageModels) -> None:
        over_v2 = ServedLanguageModels(served, ApiSettings())
        assert [model.version for model in over_v2()] == [1]
        freed = asyncio.Event()
        weakref.finalize(served.get("m"), freed.set)
        await models.load("m")
        await asyncio.wait_for(freed.wait(), 20)
        assert [model.version for model in over_v2()] == [2]
        await models.unload("m")
        assert over_v2() == []

    reload([smollm2_path] * 2, monkeypatch, use)


def test_a_late_request_is_refused_where_its_tokens_would_mean_something_else(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(smollm2_path, other, ignore=shutil.ignore_patterns("*.safetensors"))
    file = other / "tokenizer.json"
    values = json.loads(file.read_text())
    vocab = values["model"]["vocab"]
    vocab["Ġthe"], vocab["Ġof"] = vocab["Ġof"], vocab["Ġthe"]
    file.write_text(json.dumps(values))

    async def use(served: ServedModels, models: LanguageModels) -> None:
        old = served.get("m")
        await models.load("m")
        await until_ended(old)
        with pytest.raises(NotReadyError):
            await ask(old, "late")
        assert await ask(served.get("m"), "in time") == 40

    reload([smollm2_path, other], monkeypatch, use)
