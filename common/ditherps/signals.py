"""What a process does when it is asked to end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping


def on_first_signal(actions: Mapping[signal.Signals, Callable[[], None]]) -> None:
    """Run a signal's action in the running loop; the second signal, of any of these kinds, ends the process at once."""
    loop = asyncio.get_running_loop()

    def first(act: Callable[[], None]) -> None:
        for name in actions:
            loop.remove_signal_handler(name)
            signal.signal(name, signal.SIG_DFL)
        act()

    for name, act in actions.items():
        loop.add_signal_handler(name, first, act)
