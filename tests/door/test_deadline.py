"""The end of a request's time: set late, moved, never; and a cancellation from outside stays one."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from starlette.types import ASGIApp

from llmserve.api.body_memory import BodyMemory
from llmserve.api.deadline import Deadline
from llmserve.api.disconnect import run_until_disconnect
from llmserve.api.door import Door
from llmserve.api.gatekeeper import Gatekeeper
from llmserve.request_context import current_request


async def run_until(deadline: Deadline, *delays_s: float) -> None:
    """Waits for ever inside `deadline`, set by each of the delays in turn."""
    loop = asyncio.get_running_loop()
    with deadline:
        for delay_s in delays_s:
            deadline.move(loop.time() + delay_s)
        await loop.create_future()


async def pass_door(app: ASGIApp, timeout_s: bytes, sent: list[Any]) -> None:
    """One request behind the door, of a client that says nothing more; `sent` gets what goes back."""

    async def collect(message: Any) -> None:
        sent.append(message)

    async def nothing() -> Any:
        return await asyncio.get_running_loop().create_future()

    door = Door(app, gatekeeper=Gatekeeper(None), body_memory=BodyMemory(1 << 20))
    headers = [(b"x-request-timeout", timeout_s)]
    await door({"type": "http", "path": "/v1/completions", "headers": headers, "client": None}, nothing, collect)


@pytest.mark.parametrize("delays_s", [(0.01,), (-1.0,), (60.0, 0.01), (0.0, 0.05)])
def test_the_last_time_set_counts(delays_s: tuple[float, ...]) -> None:
    deadline = Deadline()

    async def main() -> int:
        with pytest.raises(TimeoutError):
            await run_until(deadline, *delays_s)
        task = asyncio.current_task()
        assert task is not None
        await asyncio.sleep(0)  # the task goes on as if it had never been cancelled
        return task.cancelling()

    assert asyncio.run(main()) == 0
    assert deadline.passed


def test_a_cancellation_from_outside_is_no_timeout() -> None:
    deadline = Deadline()

    async def main() -> None:
        task = asyncio.create_task(run_until(deadline, 60.0))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert not deadline.passed


@pytest.mark.parametrize("is_direct", [True, False])
def test_a_stream_that_was_complete_when_its_time_was_over_gets_no_event_behind_its_last(is_direct: bool) -> None:
    """As it may happen where the engine's clock was faster than ours."""
    sent: list[Any] = []

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        last = {"type": "http.response.body", "body": b"data: [DONE]\n\n"}
        if is_direct:  # as `EventStreamResponse` sends
            current_request().is_complete = True
            sent.append(last)
        else:
            await send(last)
        await asyncio.sleep(0.1)  # past its time: the client is slow to read

    asyncio.run(pass_door(stream, b"0.05", sent))
    assert [message.get("body") for message in sent] == [None, b"data: [DONE]\n\n"]


@pytest.mark.parametrize("late", [0.0, 0.02], ids=["while it is computed", "while it is sent"])
def test_an_answer_that_was_complete_in_time_is_sent(late: float) -> None:
    """The event loop was busy meanwhile, or the client reads slowly."""
    sent: list[Any] = []

    async def work() -> bytes:
        time.sleep(0.05 - late)  # noqa: ASYNC251 (nobody else shall run)
        return b"all"

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        body = await run_until_disconnect(receive, work())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(late * 2)
        await send({"type": "http.response.body", "body": body})

    asyncio.run(pass_door(answer, b"0.04", sent))
    assert [message.get("status", message.get("body")) for message in sent] == [200, b"all"]


def test_what_ends_in_time_leaves_no_timer() -> None:
    async def main() -> None:
        deadline = Deadline()
        with deadline:
            deadline.move(asyncio.get_running_loop().time() + 0.01)
        await asyncio.sleep(0.03)
        assert not deadline.passed

    asyncio.run(main())
