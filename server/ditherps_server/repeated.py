"""Log lines that others cause: the first of a kind is written, those that follow at once are counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable


class Repeated:
    """Says which lines are due. Keys must be of a closed set: each takes memory."""

    def __init__(self, seconds: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        """`seconds`: between two lines of one kind."""
        self._seconds, self._clock = seconds, clock
        self._kinds: dict[Hashable, tuple[float, int]] = {}

    def due(self, kind: Hashable) -> str | None:
        """What to write behind a line of this kind, how many were left out before it; None: leave this out too."""
        now = self._clock()
        last, skipped = self._kinds.get(kind, (-float("inf"), 0))
        if now - last < self._seconds:
            self._kinds[kind] = (last, skipped + 1)
            return None
        self._kinds[kind] = (now, 0)
        return f" ({skipped} more like this)" if skipped else ""
