"""How late the event loop is: whoever computes in it keeps heartbeats and timers waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

INTERVAL_SECONDS = 0.5


async def watch_lag(observe: Callable[[float], None]) -> None:
    """Hand how much later than asked (in seconds) a timer woke to `observe`, twice a second, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + INTERVAL_SECONDS
        await asyncio.sleep(INTERVAL_SECONDS)
        observe(max(0.0, loop.time() - due))
