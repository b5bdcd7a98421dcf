"""The redo log: what a server must know again that was killed since its last checkpoint.

One file beside the checkpoint, only ever appended to, cut when a checkpoint makes it needless. A contribution is
acknowledged when it is in here, a round is closed when its member list is (design, contract 4). Records are

    magic       4 bytes, `DRL1`
    head_bytes  uint32, little-endian
    content_bytes  uint64, little-endian
    digest      16 bytes: XXH3-128 of the two lengths, head and content
    head        JSON: one of the records below
    content     of a contribution: the encoded update, then the buffers

A record that is cut off, as the last one may be, ends the log. Nothing in the file is executed.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ditherps.codecs.base import Role
from ditherps.errors import Reason, UserError
from ditherps.files import replacing, sync_folder, write_at
from ditherps.wire import digest_of
from ditherps_server.evaluation import Evaluation
from ditherps_server.staging import Announcement

log = logging.getLogger(__name__)

_MAGIC = b"DRL1"
_PREFIX = struct.Struct("<4sIQ16s")
LARGEST_HEAD_BYTES = 64 << 20
_AGAIN = "put back a good copy of it, or go on from the checkpoint with --durability none"
AGAIN_SECONDS = 0.5
"""Until records that found no room are tried again."""


class _Record(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, ser_json_bytes="hex", val_json_bytes="hex", ser_json_inf_nan="constants"
    )


class Began(_Record):
    """The first record: whose log this is."""

    kind: Literal["began"] = "began"
    job_id: str


class Leased(_Record):
    """A worker joined as this member, under this key."""

    kind: Literal["leased"] = "leased"
    index: int = Field(ge=0)
    key: bytes


class Sharded(_Record):
    """In mode `data`, a worker said which samples it has (`ditherps.samples.shard.stated`)."""

    kind: Literal["sharded"] = "sharded"
    index: int = Field(ge=0)
    stated: bytes


class Opened(_Record):
    """A plan that workers were told."""

    kind: Literal["opened"] = "opened"
    round: int
    attempt: int
    base_version: int
    roles: dict[int, Role]
    evaluator: int | None
    encoded: dict[int, Role]
    """Roles in which workers may have encoded for this attempt, in this plan or an abandoned one."""
    accounts: dict[str, Any]


class Contributed(_Record):
    """A contribution to the open plan, whole; its content goes with the record."""

    kind: Literal["contributed"] = "contributed"
    announcement: Announcement
    accounts: dict[str, Any]


class Closed(_Record):
    """The open plan's round is closed: these contributions enter."""

    kind: Literal["closed"] = "closed"
    members: tuple[int, ...]
    absent: dict[int, Reason]
    evaluation: Evaluation | None
    """Of the base version, where there was one by then."""
    round_seconds: float
    accounts: dict[str, Any]


class Abandoned(_Record):
    """The open plan's attempt is abandoned."""

    kind: Literal["abandoned"] = "abandoned"
    reason: Reason
    accounts: dict[str, Any]


Record = Began | Leased | Sharded | Opened | Contributed | Closed | Abandoned
_RECORDS: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])


@dataclass(slots=True)
class _Entry:
    parts: tuple[bytes | memoryview, ...]
    written: asyncio.Future[None]
    kept: bool
    """To be tried again where there is no room."""


class RedoLog:
    """Appends records, many with one sync; one event loop.

    Failing to write leaves the log as it was before; what is written is on disk.
    """

    def __init__(self, path: Path, job_id: str) -> None:
        self._path, self._job_id = path, job_id
        self._file = -1
        self._end = 0
        self._folder_unsynced = False
        """The last `begin` may not have lasted."""
        self._waiting: list[_Entry] = []
        self._writing: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes that are on disk."""
        return self._end

    def begin(self, records: Sequence[Record] = ()) -> None:
        """Begin anew with these records, in place of the file that may be there.

        Raises `OSError`: then the log goes on in that file, or, where only the folder could not be synced, in the new
        one, and nothing is acknowledged before it is.
        """
        content = b"".join(part for record in (Began(job_id=self._job_id), *records) for part in _parts(record))
        descriptor = -1
        try:
            with replacing(self._path) as file:
                file.write(content)
                descriptor = os.dup(file.fileno())
            self._folder_unsynced = False
        except OSError:
            self._folder_unsynced = True
            raise
        finally:
            if descriptor >= 0 and os.path.samestat(os.fstat(descriptor), self._path.stat()):
                self._close_file()
                self._file, self._end = descriptor, len(content)
            elif descriptor >= 0:
                os.close(descriptor)

    def go_on(self, end: int) -> None:
        """Append to the file that is there, of which `end` bytes are whole records; raises `OSError`."""
        self._file = os.open(self._path, os.O_RDWR)
        os.ftruncate(self._file, end)
        self._end = end

    def append(
        self, record: Record, content: Sequence[bytes | memoryview] = (), *, kept: bool = True
    ) -> asyncio.Future[None]:
        """Add a record behind those before it; the future is done when it is on disk.

        Where there is no room, a record that is `kept` is tried again until it is written; the future of another has
        `OSError`, and it is forgotten. The content must not change before the end. Wait for it shielded: who is
        cancelled must not cancel it for others.
        """
        entry = _Entry(_parts(record, content), asyncio.get_running_loop().create_future(), kept)
        entry.written.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be waiting
        self._waiting.append(entry)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_waiting())
        return entry.written

    async def cut(self, records: Sequence[Record]) -> None:
        """A checkpoint is on disk: forget all before it but `records`; raises `OSError` as `begin`."""
        async with self._lock:
            await asyncio.to_thread(self.begin, records)

    async def drained(self) -> None:
        """Returns when all that was appended is on disk, or has not been for `AGAIN_SECONDS`."""
        if self._writing is not None:
            await asyncio.wait([entry.written for entry in self._waiting] or [self._writing], timeout=AGAIN_SECONDS)

    def close(self) -> None:
        """End: what has found no room yet is lost."""
        if self._writing is not None:
            self._writing.cancel()
        self._close_file()

    def _close_file(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    async def _write_waiting(self) -> None:
        while self._waiting:
            async with self._lock:
                entries, self._waiting = self._waiting, []
                try:
                    await asyncio.to_thread(self._write, entries)
                except OSError as error:
                    log.error("redo log: %d records not written: %s", len(entries), error)
                    self._waiting[:0] = [entry for entry in entries if entry.kept]
                    for entry in entries:
                        if not (entry.kept or entry.written.done()):
                            entry.written.set_exception(error)
                    failed = True
                else:
                    for entry in entries:
                        if not entry.written.done():
                            entry.written.set_result(None)
                    failed = False
            if failed:
                await asyncio.sleep(AGAIN_SECONDS)

    def _write(self, entries: Sequence[_Entry]) -> None:
        end = self._end
        if self._folder_unsynced:
            sync_folder(self._path.parent)
            self._folder_unsynced = False
        try:
            for entry in entries:
                for part in entry.parts:
                    end += write_at(self._file, part, end)
            os.fdatasync(self._file)
        except OSError:
            os.ftruncate(self._file, self._end)  # no half record, and nothing whose sync has failed
            raise
        self._end = end


class NoLog:
    """In place of a redo log where none is wanted."""

    nbytes = 0

    def begin(self, records: Sequence[Record] = ()) -> None:
        """Nothing."""

    def append(
        self, record: Record, content: Sequence[bytes | memoryview] = (), *, kept: bool = True
    ) -> asyncio.Future[None]:
        """A future that is done."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    async def cut(self, records: Sequence[Record]) -> None:
        """Nothing."""

    async def drained(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class Logged:
    """A record as it stands in the file."""

    record: Record
    content: memoryview
    end: int
    """Bytes of the log up to and with this record."""


def read(path: Path, job_id: str) -> Iterator[Logged]:
    """The whole records of a job's log, in order; none where the file is not there.

    Contents are the file's own pages: they can be read as long as this iterator is there. Raises `UserError` for a file
    that cannot be read, that begins with no whole record, is another job's, or another version's.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        return
    except ValueError:
        raise UserError(f"{path} is empty: {_AGAIN}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    view, end = memoryview(pages), 0
    try:
        while (logged := _logged(view, end)) is not None:
            if end == 0 and logged.record != Began(job_id=job_id):
                raise UserError(f"{path} is not the log of job {job_id}: {_AGAIN}")
            end = logged.end
            yield logged
    except ValidationError:
        raise UserError(f"{path}: another version of ditherps wrote what is at byte {end}: resume with that") from None
    if not end:
        raise UserError(f"{path} is damaged at its beginning: {_AGAIN}")
    if end < size:
        log.warning("%s: the last %d bytes are not a whole record: nobody was told of it", path, size - end)


def _logged(view: memoryview, begin: int) -> Logged | None:
    """The record at a place, None where there is no whole one; raises `ValidationError` for one of another version."""
    head_begin = begin + _PREFIX.size
    if head_begin > len(view):
        return None
    magic, head_bytes, content_bytes, digest = _PREFIX.unpack(view[begin:head_begin])
    end = head_begin + head_bytes + content_bytes
    if magic != _MAGIC or head_bytes > LARGEST_HEAD_BYTES or end > len(view):
        return None
    head, content = view[head_begin : head_begin + head_bytes], view[head_begin + head_bytes : end]
    if _digest(head, (content,)) != digest:
        return None
    return Logged(_RECORDS.validate_json(bytes(head)), content, end)


def _parts(record: Record, content: Sequence[bytes | memoryview] = ()) -> tuple[bytes | memoryview, ...]:
    head = record.model_dump_json().encode()
    size = sum(len(part) for part in content)
    return (_PREFIX.pack(_MAGIC, len(head), size, _digest(head, content)) + head, *content)


def _digest(head: bytes | memoryview, content: Sequence[bytes | memoryview]) -> bytes:
    size = sum(len(part) for part in content)
    return digest_of(struct.pack("<IQ", len(head), size), head, *content)


def members(leases: Mapping[int, bytes], stated: Mapping[int, bytes]) -> list[Record]:
    """Records of all leases, and of what workers have said of their samples."""
    return [
        *(Leased(index=index, key=key) for index, key in leases.items()),
        *(Sharded(index=index, stated=shard) for index, shard in stated.items()),
    ]
