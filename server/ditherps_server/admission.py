"""How often workers may join, and how much each may have open at once. Clocks are handed in, in seconds."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator

from ditherps.config import LimitsConfig
from ditherps.errors import Reason, RefusedError
from ditherps_server.gate import covers


class TokenBucket:
    """Lets `burst` through at once, and `per_second` after that."""

    def __init__(self, per_second: float, burst: float, now: float) -> None:
        self._per_second, self._burst = per_second, burst
        self._tokens, self._at = burst, now

    def take(self, now: float) -> float:
        """0 where one more may pass, which is counted; else for how many seconds none may."""
        self._tokens = min(self._burst, self._tokens + max(0.0, now - self._at) * self._per_second)
        self._at = now
        if self._tokens < 1:
            return (1 - self._tokens) / self._per_second
        self._tokens -= 1
        return 0.0


class Slots:
    """What each caller may have open at once."""

    def __init__(self, what: str, limit: int) -> None:
        self._what, self._limit = what, limit
        self._held: Counter[object] = Counter()

    @contextlib.contextmanager
    def hold(self, key: object, times: int = 1) -> Iterator[None]:
        """Take one of a caller's slots, `times` the limit in all; raises `RefusedError` (`too_many_streams`)."""
        if self._held[key] >= self._limit * times:
            raise RefusedError(
                Reason.TOO_MANY_STREAMS,
                f"{self._held[key]} {self._what} of this worker are open: try again when one has ended",
            )
        self._held[key] += 1
        try:
            yield
        finally:
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]


class Admission:
    """The rate of Joins, of each identity and in total.

    An identity that may be any of n members has n times the allowance of one. Who joins too often is refused before
    the total is charged, so that nobody can use up the others' share.
    """

    def __init__(
        self, limits: LimitsConfig, table: tuple[str, ...], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits, self._table, self._clock = limits, table, clock
        self._total = TokenBucket(limits.joins_per_second, limits.join_burst, clock())
        self._buckets: dict[str, TokenBucket] = {}
        self._covered: dict[str, int] = {"": len(table)}

    def members_of(self, identity: str) -> int:
        """How many members an identity may be; all for nobody's (empty), and for one that may be none."""
        return self._covered[self._key(identity)]

    def join(self, identity: str) -> None:
        """One more Join; raises `RefusedError` (`join_rate`) where it comes too soon."""
        now, key = self._clock(), self._key(identity)
        if key not in self._buckets:
            limits, times = self._limits, self._covered[key]
            self._buckets[key] = TokenBucket(
                times * limits.worker_joins_per_second, times * limits.worker_join_burst, now
            )
        wait = self._buckets[key].take(now)
        if wait:
            raise RefusedError(
                Reason.JOIN_RATE,
                f"{key or 'somebody without a name'} joins too often: wait {wait:.1f} s; does a second worker run "
                "under this name, or does something start it again and again?",
            )
        wait = self._total.take(now)
        if wait:
            raise RefusedError(Reason.JOIN_RATE, f"too many workers join at once: wait {wait:.1f} s")

    def _key(self, identity: str) -> str:
        """The same for all identities that are no member's, so that made-up names take no memory."""
        if identity not in self._covered:
            covered = sum(covers(identity, name) for name in self._table)
            if not covered:
                return ""
            self._covered[identity] = covered
        return identity
