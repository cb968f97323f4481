"""A pause before something that has failed is tried again. Nothing else is waited for by time. Knows no room."""

from __future__ import annotations

import asyncio


async def pause(seconds: float) -> None:
    """Returns when they are over."""
    over = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, over.set)
    await over.wait()
