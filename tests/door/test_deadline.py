"""The end of a request's time: set late, moved, never; and a cancellation from outside stays one."""

from __future__ import annotations

import asyncio

import pytest

from llmserve.api.deadline import Deadline


async def run_until(deadline: Deadline, *delays_s: float) -> None:
    """Waits for ever inside `deadline`, set by each of the delays in turn."""
    loop = asyncio.get_running_loop()
    with deadline:
        for delay_s in delays_s:
            deadline.move(loop.time() + delay_s)
        await loop.create_future()


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


def test_what_ends_in_time_leaves_no_timer() -> None:
    async def main() -> None:
        deadline = Deadline()
        with deadline:
            deadline.move(asyncio.get_running_loop().time() + 0.01)
        await asyncio.sleep(0.03)
        assert not deadline.passed

    asyncio.run(main())
