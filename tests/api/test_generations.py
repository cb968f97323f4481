"""Several generations read as one: whatever ends one of them reaches the reader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from types import TracebackType
from typing import Self

import pytest

from llmserve.api.generations import MergedGeneration
from llmserve.backends.generation import GenerationDelta
from llmserve.errors import EngineDeadError


class Ending:
    """Says `num_deltas` tokens, then ends as `error` has it; with `hangs`, not at all."""

    def __init__(self, num_deltas: int, error: BaseException | None = None, *, hangs: bool = False) -> None:
        self.request_id = "a"
        self.num_said = 0
        self._num_deltas = num_deltas
        self._error = error
        self._hangs = hangs

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        pass

    async def __aiter__(self) -> AsyncIterator[list[GenerationDelta]]:
        for token in range(self._num_deltas):
            self.num_said += 1
            yield [GenerationDelta(index=0, text="", token_ids=[token])]
        if self._hangs:
            await asyncio.Event().wait()
        if self._error is not None:
            raise self._error


async def read(*sources: Ending, into: list[GenerationDelta] | None = None) -> list[GenerationDelta]:
    deltas = [] if into is None else into
    async with asyncio.timeout(30), MergedGeneration("a", [partial(lambda s: s, s) for s in sources], 1) as merged:
        async for news in merged:
            deltas += news
    return deltas


def test_all_is_read_and_numbered_through() -> None:
    deltas = asyncio.run(read(Ending(200), Ending(3), Ending(0)))
    by_index = {index: [d.token_ids[0] for d in deltas if d.index == index] for index in range(3)}
    assert by_index == {0: list(range(200)), 1: [0, 1, 2], 2: []}


@pytest.mark.parametrize("error", [RuntimeError("ours"), EngineDeadError("dead"), asyncio.CancelledError()], ids=type)
@pytest.mark.parametrize("num_deltas", [0, 5])
def test_whatever_ends_a_source_ends_the_whole(error: BaseException, num_deltas: int) -> None:
    with pytest.raises(type(error)):
        asyncio.run(read(Ending(1, hangs=True), Ending(num_deltas, error)))


@pytest.mark.parametrize("error", [EngineDeadError("dead"), asyncio.CancelledError()], ids=type)
def test_a_late_reader_gets_the_tokens_that_came_before_an_error(error: BaseException) -> None:
    async def run() -> None:
        async with MergedGeneration("a", [partial(Ending, 3, error), partial(Ending, 0, hangs=True)], 1) as merged:
            for _ in range(100):  # all has been said by then
                await asyncio.sleep(0)
            assert [delta.token_ids for delta in await anext(merged)] == [[0], [1], [2]]
            with pytest.raises(type(error)):
                await anext(merged)

    asyncio.run(asyncio.wait_for(run(), 30))


def test_of_sources_that_all_fail_the_reader_hears_the_first_and_nobody_the_rest() -> None:
    unheard: list[dict[str, object]] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
        with pytest.raises(RuntimeError, match="first"):
            await read(Ending(0, RuntimeError("first")), Ending(0, RuntimeError("second")))

    asyncio.run(run())
    assert unheard == []


def test_who_is_not_read_from_takes_no_more() -> None:
    source = Ending(1000)

    async def run() -> None:
        async with MergedGeneration("a", [lambda: source, lambda: Ending(0)], 1) as merged:
            await anext(merged)
            for _ in range(2000):
                await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(run(), 30))
    assert 65 <= source.num_said < 200
