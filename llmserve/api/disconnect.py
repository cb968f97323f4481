"""Runs work for as long as its client is there. Knows nothing of what the work is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from llmserve.request_context import current_request

T = TypeVar("T")


class ClientDisconnectedError(Exception):
    """The client went away before its answer was complete; the work has been cancelled."""


async def run_until_disconnect(
    receive: Receive,
    work: Coroutine[Any, Any, T],
    *,
    idle_s: float | None = None,
    on_idle: Callable[[], Awaitable[float]] | None = None,
) -> T:
    """What `work` returns, unless the connection closes first.

    The body must have been read, so that `receive` has nothing left to tell but the disconnect. `on_idle` is called
    after `idle_s` seconds and then whenever the seconds it returns have passed. However this ends, `work` has left its
    contexts when it does; once it has returned, no deadline comes between it and its answer. Raises
    ClientDisconnectedError, or what `work` raises.
    """
    task = asyncio.ensure_future(_completed(work))
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        while True:
            await asyncio.wait((task, gone), timeout=idle_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientDisconnectedError
            if on_idle is not None:
                idle_s = await on_idle()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.wait((task, gone))
        work.close()  # it may not even have begun
        if not task.cancelled():
            task.exception()  # seen: of what fails while it is being cancelled, nobody is left to be told


async def _completed(work: Coroutine[Any, Any, T]) -> T:
    result = await work
    current_request().is_complete = True
    return result


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
