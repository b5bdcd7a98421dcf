"""Contributions between their arrival and the closing of their round, within a limit of bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ditherps.codecs.base import Role

from ditherps.errors import PayloadError, Reason, RefusedError
from ditherps.wire import Receiver


@dataclass(frozen=True, slots=True)
class Announcement:
    """What the header of a Push says, checked against the plan and the layout."""

    round: int
    attempt: int
    index: int
    role: Role
    update_bytes: int
    buffer_bytes: int
    digest: bytes
    samples: int
    loss: float = math.nan
    nmse: float = math.nan
    compute_seconds: float = 0.0
    encode_seconds: float = 0.0

    @property
    def content_bytes(self) -> int:
        """Bytes of the update and the buffers."""
        return self.update_bytes + self.buffer_bytes


@dataclass(slots=True)
class Contribution:
    """One worker's content, arriving or whole."""

    announcement: Announcement
    content: bytearray
    receiver: Receiver
    whole: bool = False
    stream: object = field(default_factory=object)
    """The stream that may write; a newer one takes over."""

    @property
    def update(self) -> memoryview:
        """The encoded update."""
        return memoryview(self.content)[: self.announcement.update_bytes]

    @property
    def buffers(self) -> memoryview:
        """The model's buffers."""
        return memoryview(self.content)[self.announcement.update_bytes :]

    def take(self, stream: object, chunk: memoryview) -> None:
        """Append a chunk that came on `stream`; raises `RefusedError` when a newer stream has taken over."""
        if stream is not self.stream:
            raise RefusedError(Reason.SUPERSEDED, "another stream goes on with this contribution")
        self.receiver.take(chunk)


class Staging:
    """The contributions of the open round, one a worker.

    Memory is taken when a contribution is announced and given back when its round is over; together they never exceed
    `limit_bytes`.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held: dict[int, Contribution] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes that are taken now."""
        return sum(len(contribution.content) for contribution in self._held.values())

    def admit(self, announcement: Announcement) -> Contribution:
        """The contribution to go on with: a new one, or the one that the same content began before.

        The first whole contribution of a worker stands. Raises `RefusedError`: `conflicting_contribution` when another
        content has arrived whole, `staging_full` when there is no room.
        """
        held = self._held.get(announcement.index)
        if held is not None:
            if held.announcement.digest == announcement.digest:
                held.stream = object()
                return held
            if held.whole:
                raise RefusedError(
                    Reason.CONFLICTING_CONTRIBUTION, "another content of this worker has arrived for this round"
                )
            del self._held[announcement.index]
        size = announcement.content_bytes
        if self.held_bytes + size > self._limit_bytes:
            raise RefusedError(
                Reason.STAGING_FULL, f"{size} bytes do not fit beside the {self.held_bytes} of {self._limit_bytes} held"
            )
        content = bytearray(size)
        contribution = Contribution(announcement, content, Receiver(memoryview(content), announcement.digest))
        self._held[announcement.index] = contribution
        return contribution

    def drop(self, contribution: Contribution) -> None:
        """Forget a contribution that turned out unusable."""
        if self._held.get(contribution.announcement.index) is contribution:
            del self._held[contribution.announcement.index]

    def members(self, indices: tuple[int, ...]) -> list[Contribution]:
        """The whole contributions of these workers, in this order."""
        chosen = [self._held[index] for index in indices]
        if not all(contribution.whole for contribution in chosen):
            raise PayloadError("a contribution that is not whole cannot enter a round")
        return chosen

    def clear(self) -> None:
        """The round is over: give all memory back."""
        self._held.clear()
