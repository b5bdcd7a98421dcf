"""Contributions between their arrival and the closing of their round, within a limit of bytes."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

import numpy as np

from ditherps.codecs.base import Role
from ditherps.errors import PayloadError, Reason, RefusedError
from ditherps.wire import Receiver
from ditherps_server.cache import Taken


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
    sample_bytes: int = 0
    """Of the update: its selection and samples, in mode `data`."""
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
    content: memoryview
    receiver: Receiver
    whole: bool = False
    written: asyncio.Future[None] | None = None
    """Its way to the disk, once it is checked: one for all streams that may deliver it."""
    checked: asyncio.Future[None] | None = None
    """Its check, once it is whole: one for all streams that may deliver it."""
    taken: Taken | None = None
    """In mode `data`: its samples, with what was held of them when it arrived."""
    stream: object | None = field(default_factory=object)
    """The stream that may write: a newer one takes over, and none may once the round is over."""

    @classmethod
    def restored(cls, announcement: Announcement, content: memoryview) -> Contribution:
        """A whole contribution whose content has been checked before."""
        return cls(announcement, content, Receiver(content, announcement.digest), whole=True)

    @property
    def update(self) -> memoryview:
        """The encoded update."""
        return self.content[: self.announcement.update_bytes]

    @property
    def buffers(self) -> memoryview:
        """The model's buffers."""
        return self.content[self.announcement.update_bytes :]

    def take(self, stream: object, chunk: memoryview) -> None:
        """Append a chunk that came on `stream`; raises `RefusedError` when that stream may write no longer."""
        if self.stream is None:
            raise RefusedError(Reason.LATE, "the round has ended")
        if stream is not self.stream:
            raise RefusedError(Reason.SUPERSEDED, "another stream goes on with this contribution")
        self.receiver.take(chunk)

    @property
    def memory(self) -> memoryview:
        """What was allocated for the content, which may be more than its size."""
        return memoryview(self.content.obj)

    def end(self, stream: object | None) -> None:
        """Only `stream` may write from now on; lets go of the memory, even while an older stream still waits."""
        self.stream = stream
        self.content = memoryview(b"")
        self.taken = None
        self.checked = None  # whose error, with its frames, would hold this
        self.receiver = Receiver(self.content, b"")


class Staging:
    """The contributions of the open round, one a worker.

    Memory is taken when a contribution is announced; when its round is over it is kept for the next contribution of its
    size, since fresh pages cost more than what is copied into them. Together they never exceed `limit_bytes`.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held: dict[int, Contribution] = {}
        self._spare: list[memoryview] = []

    @property
    def held_bytes(self) -> int:
        """Bytes that are taken now."""
        return sum(len(contribution.memory) for contribution in self._held.values())

    @property
    def _spare_bytes(self) -> int:
        return sum(len(spare) for spare in self._spare)

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
            if held.whole or held.written is not None:
                raise RefusedError(
                    Reason.CONFLICTING_CONTRIBUTION, "another content of this worker has arrived for this round"
                )
            self.drop(held)
        content = self._memory(announcement.content_bytes)
        contribution = Contribution(announcement, content, Receiver(content, announcement.digest))
        self._held[announcement.index] = contribution
        return contribution

    def _memory(self, size: int) -> memoryview:
        for place, spare in enumerate(self._spare):
            if size <= len(spare) <= 2 * size:
                return self._spare.pop(place)[:size]
        if self.held_bytes + size > self._limit_bytes:
            raise RefusedError(
                Reason.STAGING_FULL, f"{size} bytes do not fit beside the {self.held_bytes} of {self._limit_bytes} held"
            )
        while self._spare and self.held_bytes + self._spare_bytes + size > self._limit_bytes:
            self._spare.pop(0)
        return np.empty(size, np.uint8).data

    def restore(self, contribution: Contribution) -> None:
        """Hold a copy of a contribution that a server before this one had acknowledged."""
        content = self._memory(len(contribution.content))
        content[:] = contribution.content
        announcement = contribution.announcement
        copy = self._held[announcement.index] = Contribution.restored(announcement, content)
        copy.taken = contribution.taken

    def drop(self, contribution: Contribution) -> None:
        """Forget a contribution that turned out unusable, or that another content replaces."""
        if self._held.get(contribution.announcement.index) is contribution:
            del self._held[contribution.announcement.index]
            contribution.end(object())

    def unsettle(self, index: int) -> None:
        """What a worker's contribution rests on changes: forget it, unless it is being written down or has been."""
        held = self._held.get(index)
        if held is not None and not held.whole and held.written is None:
            self.drop(held)

    def check(self, contribution: Contribution) -> None:
        """Raises `RefusedError` when a contribution was forgotten: `late`, or `superseded` by another content."""
        if self._held.get(contribution.announcement.index) is not contribution:
            if contribution.stream is None:
                raise RefusedError(Reason.LATE, f"round {contribution.announcement.round} has ended")
            raise RefusedError(Reason.SUPERSEDED, "another content of this worker has taken its place")

    def commit(self, contribution: Contribution) -> bool:
        """A contribution arrived and is good: from now on it is whole; False if it was before. Raises as `check`."""
        self.check(contribution)
        first, contribution.whole = not contribution.whole, True
        return first

    def members(self, indices: tuple[int, ...]) -> list[Contribution]:
        """The whole contributions of these workers, in this order."""
        chosen = [self._held[index] for index in indices]
        if not all(contribution.whole for contribution in chosen):
            raise PayloadError("a contribution that is not whole cannot enter a round")
        return chosen

    def clear(self) -> None:
        """The round is over: every contribution is forgotten, and its memory is free for the next."""
        for contribution in self._held.values():
            if contribution.whole:  # no stream writes into it any more
                self._spare.append(contribution.memory)
            contribution.end(None)
        self._held.clear()
