"""Who may take part: the job's member table, the sessions of its members, and the fence that keeps others out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ditherps.config import WORKER_NAME
from ditherps.errors import Reason, RefusedError
from ditherps.v1 import types_pb2

LARGEST_LEASE_KEY_BYTES = 64


@dataclass(frozen=True, slots=True)
class Session:
    """One Join of one member."""

    index: int
    number: int
    samples: int = 0
    """Behind each of its contributions, as declared: their weight."""


class Members:
    """Names, their indices, and the newest session of each.

    A worker's index is the position of its name in the job's table, never its order of arrival. A worker without a
    name leases the lowest free one under a key that it keeps.
    """

    def __init__(
        self, table: tuple[str, ...], job_id: str, server_epoch: int, leases: Mapping[int, bytes] | None = None
    ) -> None:
        self.names = table
        self.leases = dict(leases or {})
        """By index, the key of who joined last."""
        self._index = {name: index for index, name in enumerate(table)}
        self._job_id = job_id
        self._server_epoch = server_epoch
        self._sessions: dict[int, Session] = {}
        """By number, the newest of each member."""
        self._newest: dict[int, int] = {}
        """By index, its number."""
        self._count = 0

    def join(self, name: str, lease_key: bytes, *, occupied: frozenset[int], samples: int = 0) -> Session:
        """A new session for `name`, which ends the one before; `occupied` are the indices that are present.

        `POOL/*` is any member of a pool, and an empty name any member: they lease the lowest free one.
        Raises `RefusedError`: `unknown_member` for a name that is not in the table, `members_full` when none is free.
        """
        if len(lease_key) > LARGEST_LEASE_KEY_BYTES:
            raise RefusedError(Reason.SIZE, f"a lease key of {len(lease_key)} bytes; at most {LARGEST_LEASE_KEY_BYTES}")
        if name and not WORKER_NAME.fullmatch(name.removesuffix("/*")):
            raise RefusedError(
                Reason.NAME_INVALID, f"{name[:80]!r} is not a worker name; allowed: {WORKER_NAME.pattern}"
            )
        leased = not name or name.endswith("/*")
        index = self._lease(name.removesuffix("*"), lease_key, occupied) if leased else self._index.get(name, -1)
        if index < 0:
            shown = ", ".join(self.names[:4]) + (", ..." if len(self.names) > 4 else "")
            raise RefusedError(Reason.UNKNOWN_MEMBER, f"{name!r} is not a member of this job; members: {shown}")
        self._count += 1
        self.leases[index] = lease_key
        self._sessions.pop(self._newest.get(index, 0), None)
        session = self._sessions[self._count] = Session(index, self._count, samples)
        self._newest[index] = session.number
        return session

    def _lease(self, prefix: str, lease_key: bytes, occupied: frozenset[int]) -> int:
        """The member that has this key, else the lowest free one, of those whose name begins so; -1: there is none."""
        slots = [index for index, name in enumerate(self.names) if name.startswith(prefix)]
        for index in slots:
            if lease_key and self.leases.get(index) == lease_key:
                return index
        for index in slots:
            if index not in occupied:
                return index
        if not slots:
            return -1
        of = f"of {prefix}* " if prefix else ""
        raise RefusedError(Reason.MEMBERS_FULL, f"all {len(slots)} members {of}of this job are here")

    def fence(self, session: Session) -> types_pb2.Fence:
        """What stands in every message of this session."""
        return types_pb2.Fence(job_id=self._job_id, server_epoch=self._server_epoch, session=session.number)

    def check(self, fence: types_pb2.Fence) -> Session:
        """The session that a message belongs to.

        Raises `RefusedError`: `wrong_job`, `wrong_epoch`, `not_joined`, or `superseded` for an older session.
        """
        if fence.job_id != self._job_id:
            raise RefusedError(Reason.WRONG_JOB, f"this server runs job {self._job_id}, not {fence.job_id[:80]!r}")
        if fence.server_epoch != self._server_epoch:
            raise RefusedError(
                Reason.WRONG_EPOCH, f"the server is in epoch {self._server_epoch}, not {fence.server_epoch}: join again"
            )
        session = self._sessions.get(fence.session)
        if session is not None:
            return session
        if 0 < fence.session <= self._count:
            raise RefusedError(Reason.SUPERSEDED, "this worker has joined again since")
        raise RefusedError(Reason.NOT_JOINED, "no such session: join first")
