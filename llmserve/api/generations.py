"""Generations made of generations: several prompts as one, and a prompt without its answer. Knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from types import TracebackType
from typing import Self

from llmserve.backends.generation import Generation, GenerationDelta
from llmserve.errors import LLMServeError
from llmserve.messages import FinishReason

_MAX_UNTAKEN = 64  # lists of deltas


class MergedGeneration:
    """The generations of several prompts, `n` sequences each, as one whose indices count through all of them.

    The first that fails fails all, once what came before it has been read. Starting happens on entering, so that a
    refusal of the tenth aborts the nine before.
    """

    def __init__(self, request_id: str, starts: Sequence[Callable[[], Generation]], n: int) -> None:
        self.request_id = request_id
        self._starts = starts
        self._n = n
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._room = asyncio.Semaphore(_MAX_UNTAKEN)  # who does not take this one's news takes none of theirs
        self._queue: asyncio.Queue[list[GenerationDelta] | asyncio.Task[None]] = asyncio.Queue()
        self._failed: asyncio.Task[None] | None = None  # what came before it has been read
        self._num_running = 0

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            generations = [await stack.enter_async_context(start()) for start in self._starts]
            self._stack = stack.pop_all()
        for position, generation in enumerate(generations):
            task = asyncio.create_task(self._forward(generation, position * self._n))
            task.add_done_callback(self._queue.put_nowait)  # behind all that it has brought, however it ends
            self._tasks.append(task)
        self._num_running = len(self._tasks)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        async with self._stack:
            await asyncio.gather(*self._tasks, return_exceptions=True)  # of several failures the reader heard the first

    def __aiter__(self) -> AsyncIterator[list[GenerationDelta]]:
        return self

    async def __anext__(self) -> list[GenerationDelta]:
        deltas: list[GenerationDelta] = []
        while self._num_running and (not deltas or not self._queue.empty()):
            news = self._failed or await self._queue.get()
            if not isinstance(news, asyncio.Task):
                self._room.release()
                deltas += news
            elif deltas and (news.cancelled() or news.exception()):
                self._failed = news
                break
            else:
                self._num_running -= 1
                news.result()
        if not deltas:
            raise StopAsyncIteration
        return deltas

    async def _forward(self, generation: Generation, offset: int) -> None:
        async for deltas in generation:
            for delta in deltas:
                delta.index += offset
            await self._room.acquire()
            self._queue.put_nowait(deltas)


class PromptOnlyGeneration:
    """A generation of one token that nobody asked for: what it says of the prompt stays, the token goes.

    An engine computes log-probabilities of a prompt on the way to a token, so `max_tokens: 0` costs one.
    """

    def __init__(self, inner: Generation) -> None:
        self.request_id = inner.request_id
        self._inner = inner

    async def __aenter__(self) -> Self:
        await self._inner.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._inner.__aexit__(exc_type, exc, tb)

    async def __aiter__(self) -> AsyncIterator[list[GenerationDelta]]:
        async for deltas in self._inner:
            yield [_without_tokens(delta) for delta in deltas]


def _without_tokens(delta: GenerationDelta) -> GenerationDelta:
    finish_reason = FinishReason.LENGTH if delta.finish_reason is FinishReason.STOP else delta.finish_reason
    return replace(
        delta,
        text="",
        token_ids=[],
        logprobs=None if delta.logprobs is None else [],
        finish_reason=finish_reason,
        stop_reason=None,
    )


async def collect(start: Callable[[], Generation], num_sequences: int) -> list[GenerationDelta]:
    """The whole of each sequence as one delta, in the order of their indices. Raises what the generation raises."""
    texts: list[list[str]] = [[] for _ in range(num_sequences)]
    whole = [GenerationDelta(index=index, text="", token_ids=[]) for index in range(num_sequences)]
    async with start() as generation:
        async for deltas in generation:
            for delta in deltas:
                sequence = whole[delta.index]
                texts[delta.index].append(delta.text)
                sequence.token_ids += delta.token_ids
                if delta.logprobs is not None:
                    sequence.logprobs = (sequence.logprobs or []) + delta.logprobs
                sequence.prompt_logprobs = delta.prompt_logprobs or sequence.prompt_logprobs
                sequence.finish_reason = delta.finish_reason or sequence.finish_reason
                sequence.stop_reason = delta.stop_reason if delta.stop_reason is not None else sequence.stop_reason
                sequence.num_cached_tokens = max(sequence.num_cached_tokens, delta.num_cached_tokens)
    for sequence, parts in zip(whole, texts, strict=True):
        sequence.text = "".join(parts)
        raise_if_failed(sequence)
    return whole


def raise_if_failed(delta: GenerationDelta) -> None:
    """A sequence that ended by the engine's fault has no answer. Raises LLMServeError."""
    if delta.finish_reason is FinishReason.ERROR:
        raise LLMServeError("The engine failed on this request. The log of the server says why.")
