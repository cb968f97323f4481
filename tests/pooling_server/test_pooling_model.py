"""A pooling model in its process: batches, shared texts, clients that go, queues that are full, processes that die."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmserve.backends.pooling_model import PoolingModel
from llmserve.backends.pooling_tokenizer import TextPair, Truncation
from llmserve.errors import DeadlineExceededError, InvalidRequestError, NotReadyError, QueueFullError

Running = Callable[..., AbstractAsyncContextManager[PoolingModel]]
TEXTS = ["the cat sat", "dog", "stocks fell today on the mat!", "a b c d e f g h", "the cat sat on the mat."]


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs an asynchronous test."""

    @functools.wraps(test)
    def run(*args: Any, **fixtures: Any) -> None:
        asyncio.run(test(*args, **fixtures))

    return run


async def held(model: PoolingModel) -> None:
    """Stops the model's process, so that what is sent to it waits."""
    os.kill(model.pids[0], signal.SIGSTOP)


def release(model: PoolingModel) -> None:
    os.kill(model.pids[0], signal.SIGCONT)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 (there is no event to wait on)
            await asyncio.sleep(0.01)


@in_loop
async def test_a_text_has_the_same_bits_alone_and_in_any_batch(running: Running) -> None:
    async with running() as model:
        alone = [(await model.pool([text], "embed")).rows[0] for text in TEXTS]
        together = (await model.pool(TEXTS, "embed")).rows
        crowd = await asyncio.gather(*(model.pool([text] * 2, "embed") for text in reversed(TEXTS)))
        for position, vector in enumerate(alone):
            assert np.array_equal(vector, together[position])
            assert all(np.array_equal(vector, row) for row in crowd[-1 - position].rows)
    async with running(max_batch_tokens="1") as model:  # each text a batch of its own
        single = (await model.pool(TEXTS, "embed")).rows
        assert all(np.array_equal(a, b) for a, b in zip(alone, single, strict=True))


@in_loop
async def test_equal_texts_in_flight_are_computed_once(running: Running) -> None:
    async with running() as model:
        await held(model)
        asked = [asyncio.create_task(model.pool(["the cat", "dog"], "embed")) for _ in range(10)]
        await until(lambda: model.metrics.texts == 20)
        release(model)
        answers = await asyncio.gather(*asked)
        assert model.metrics.shared_texts == 18
        assert model.metrics.batch_tokens == 7  # [CLS] the cat [SEP], [CLS] dog [SEP]
        assert all(np.array_equal(answer.rows[0], answers[0].rows[0]) for answer in answers)
        assert [answer.num_tokens for answer in answers] == [[4, 3]] * 10  # each pays for what it sent
        await model.pool(["dog"], "embed")  # no longer in flight: computed again
        assert model.metrics.batch_tokens == 10


@in_loop
async def test_the_texts_of_a_client_that_goes_leave_the_queue(running: Running) -> None:
    async with running(max_batch_tokens="4") as model:
        await held(model)
        first = asyncio.create_task(model.pool(["dog"], "embed"))
        gone = asyncio.create_task(model.pool(["the cat", "cat", "mat"], "embed"))
        stays = asyncio.create_task(model.pool(["mat"], "embed"))
        await until(lambda: model.metrics.texts == 5)
        assert model.metrics.queued_texts == 3
        gone.cancel()
        await asyncio.wait([gone])
        assert model.metrics.queued_texts == 1  # "mat", which another wants
        release(model)
        await asyncio.gather(first, stays)
        assert model.metrics.batch_tokens == 6
        assert model.statistics().failures["CANCELED"] == 1
        assert model.statistics().pending == 0


@in_loop
async def test_a_full_queue_refuses_a_request_whole_and_says_so(running: Running) -> None:
    async with running(max_queue_size=4, max_batch_tokens="3") as model:
        await held(model)
        first = asyncio.create_task(model.pool(["dog"], "embed"))
        await until(lambda: model.metrics.texts == 1)
        others = asyncio.create_task(model.pool(["a", "b", "c"], "embed"))
        await until(lambda: model.metrics.queued_texts == 3)
        with pytest.raises(QueueFullError, match="3 texts wait"):
            await model.pool(["d", "e"], "embed")
        assert model.metrics.queued_texts == 3
        release(model)
        assert len((await others).rows) == 3
        await first


@in_loop
async def test_texts_that_are_being_tokenised_have_their_room_in_the_queue(running: Running) -> None:
    async with running(max_queue_size=4) as model:
        texts, cut = ["dog " * 1000] * 3, Truncation(allowed=True)  # long: another thread has them for a while
        asked = [model.pool(texts, "embed", cut) for _ in range(3)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(answer) for answer in answers[1:]] == [QueueFullError, QueueFullError]
        with pytest.raises(InvalidRequestError):
            await model.pool(["dog " * 1000], "embed")
        for _ in range(3):  # nothing is left in the books
            assert len((await model.pool(["a", "b", "c", "d"], "embed")).rows) == 4


@in_loop
async def test_a_deadline_ends_the_wait(running: Running) -> None:
    async with running(allow_timeout_override=True) as model:
        await held(model)
        with pytest.raises(DeadlineExceededError):
            await model.pool(["dog"], "embed", timeout_s=0.05)
        release(model)
        assert len((await model.pool(["dog"], "embed")).rows) == 1


@in_loop
async def test_a_process_killed_in_mid_batch_costs_nobody_an_answer(running: Running) -> None:
    async with running(max_batch_tokens="8") as model:
        expected = (await model.pool(TEXTS, "embed")).rows
        pid = model.pids[0]
        await held(model)
        asked = asyncio.create_task(model.pool(TEXTS, "embed"))
        await until(lambda: model.metrics.texts == 2 * len(TEXTS))
        os.kill(pid, signal.SIGKILL)
        answer = await asked
        assert model.pids != [pid]
        assert all(np.array_equal(a, b) for a, b in zip(expected, answer.rows, strict=True))


@in_loop
async def test_a_text_that_kills_its_process_twice_is_not_tried_again(running: Running) -> None:
    async with running() as model:
        await held(model)
        asked = asyncio.create_task(model.pool(["dog"], "embed"))
        await until(lambda: model.metrics.texts == 1)
        first = model.pids[0]
        os.kill(first, signal.SIGKILL)
        await until(lambda: model.pids != [first])
        await asyncio.sleep(0)
        os.kill(model.pids[0], signal.SIGKILL)
        with pytest.raises(NotReadyError):
            await asked
        assert not model.is_ready()
        with pytest.raises(NotReadyError):
            await model.pool(["dog"], "embed")
        await until(model.is_ready)  # restarted, after a pause
        assert len((await model.pool(["dog"], "embed")).rows) == 1


@in_loop
async def test_lengths_and_cuts(running: Running) -> None:
    long = "cat " * 100
    async with running() as model:
        with pytest.raises(InvalidRequestError, match=r"'input.1' has 102 tokens, but at most 32"):
            await model.pool(["dog", long], "embed")
        cut = await model.pool([long, "cat " * 30], "embed", Truncation(allowed=True))
        assert cut.num_tokens == [32, 32]
        assert np.array_equal(cut.rows[0], cut.rows[1])
        left = await model.pool(["dog " + long + "mat"], "embed", Truncation(5, True, "left"))
        same = await model.pool(["cat cat mat"], "embed")
        assert np.array_equal(left.rows[0], same.rows[0])
        ids = await model.pool([[2, 5, 3], [2, 5, 5, 5]], "embed", Truncation(3, True))
        assert ids.num_tokens == [3, 3]
        with pytest.raises(InvalidRequestError, match="vocabulary ends"):
            await model.pool([[10**6]], "embed")


@in_loop
async def test_a_pair_is_cut_where_it_is_longer(running: Running, score_folder: Path) -> None:
    async with running(score_folder) as model:
        short_query = await model.pool([TextPair("dog", "cat " * 100)], "classify", Truncation(allowed=True))
        by_hand = await model.pool([TextPair("dog", "cat " * 28)], "classify")
        assert np.array_equal(short_query.rows[0], by_hand.rows[0])
        limited = await model.pool([TextPair("dog", "cat " * 100, max_second=6)], "classify")
        assert limited.num_tokens == [10]
        with pytest.raises(InvalidRequestError, match="104 tokens"):
            await model.pool([TextPair("dog", "cat " * 100)], "classify")


@in_loop
async def test_a_large_request_shares_the_model_with_a_small_one(running: Running) -> None:
    async with running(max_batch_tokens="64") as model:
        await held(model)
        large = asyncio.create_task(
            model.pool([f"the cat sat {'x' * (i % 9)}{chr(97 + i % 26)}" for i in range(300)], "embed")
        )
        await until(lambda: model.metrics.texts == 300)
        small = asyncio.create_task(model.pool(["stocks fell"], "embed"))
        await until(lambda: model.metrics.texts == 301)
        finished: list[object] = []
        for task in (large, small):
            task.add_done_callback(finished.append)
        release(model)
        assert len((await large).rows) == 300
        await small
        assert finished == [small, large]
        batches = model.explain()["batches"]
        assert max(batch["tokens"] for batch in batches) <= 64
