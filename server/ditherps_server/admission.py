"""How often workers may join, how much each may have open at once, and for whom the server waits.

Clocks are handed in, in seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from ditherps.config import LimitsConfig
from ditherps.errors import Reason, RefusedError
from ditherps_server.gate import covers

T = TypeVar("T")


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


class Patience:
    """Waits for the other ends of RPCs: for so long, and for so many at once.

    An honest end keeps the server waiting for moments only. So where too many do, the one that has for longest is
    given up: whoever holds RPCs open, under however many names, takes nobody else's place.
    """

    def __init__(self, what: str, limit: int, seconds: float) -> None:
        self._what, self._limit, self._seconds = what, limit, seconds
        self._waiting: dict[asyncio.Timeout, None] = {}  # in the order in which they came

    async def wait(self, awaited: Awaitable[T]) -> T:
        """What comes of it; raises `RefusedError` (`idle_timeout`, `too_many_streams`) where it takes too long."""
        patience = asyncio.timeout(self._seconds)
        try:
            async with patience:
                self._waiting[patience] = None
                if len(self._waiting) > self._limit:
                    self._give_up(next(iter(self._waiting)))
                return await awaited
        except TimeoutError:
            if patience in self._waiting:
                raise RefusedError(Reason.IDLE_TIMEOUT, f"{self._what}: nothing for {self._seconds:g} s") from None
            raise RefusedError(
                Reason.TOO_MANY_STREAMS, f"{self._what}: more than {self._limit} RPCs wait for it: try again"
            ) from None
        finally:
            self._waiting.pop(patience, None)

    def _give_up(self, longest: asyncio.Timeout) -> None:
        del self._waiting[longest]
        if not longest.expired():
            longest.reschedule(0.0)


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
