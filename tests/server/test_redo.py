"""The redo log: what it gives back, what a cut-off end costs, and what happens where there is no room."""

from __future__ import annotations

import asyncio
import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest

from ditherps import files
from ditherps.codecs.base import Role
from ditherps.errors import Reason, UserError
from ditherps_server import redo
from ditherps_server.evaluation import Evaluation
from ditherps_server.redo import Abandoned, Began, Closed, Contributed, Leased, Opened, Record, RedoLog, read
from ditherps_server.staging import Announcement

ACCOUNTS: dict[str, Any] = {"totals": {"contributions": 3, "elapsed_seconds": 0.1 + 0.2}, "traffic": {"rpcs": 2**63}}


def announcement(index: int, content: bytes) -> Announcement:
    return Announcement(
        round=3, attempt=1, index=index, role=Role.NESTED, update_bytes=len(content) - 2, buffer_bytes=2,
        digest=bytes(range(240, 256)), samples=2**40 - 1, loss=math.inf, nmse=-0.0, compute_seconds=0.1 + 0.2,
    )  # fmt: skip


CONTENT = bytes(range(256)) * 5
RECORDS: list[tuple[Record, bytes]] = [
    (Leased(index=2, key=b"\xff\x00key"), b""),
    (
        Opened(
            round=3, attempt=1, base_version=3, roles={0: Role.SOURCE, 2: Role.NESTED}, evaluator=-1,
            encoded={0: Role.SOURCE, 2: Role.NESTED}, accounts=ACCOUNTS,
        ),
        b"",
    ),
    (Contributed(announcement=announcement(2, CONTENT), accounts=ACCOUNTS), CONTENT),
    (Abandoned(reason=Reason.QUORUM, accounts=ACCOUNTS), b""),
    (
        Closed(
            members=(0, 2), absent={1: Reason.SILENT}, evaluation=Evaluation(3, 0.5, 0.25, 7, 0.125), round_seconds=0.3,
            accounts=ACCOUNTS,
        ),
        b"",
    ),
]  # fmt: skip


async def written(path: Path, records: list[tuple[Record, bytes]]) -> RedoLog:
    log = RedoLog(path, "job")
    log.begin()
    await asyncio.gather(*(log.append(record, [content] if content else []) for record, content in records))
    return log


def found(path: Path, job_id: str = "job") -> list[tuple[Record, bytes]]:
    return [(logged.record, bytes(logged.content)) for logged in read(path, job_id)]


async def test_what_was_appended_comes_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "redo.bin"
    (await written(path, RECORDS)).close()
    assert found(path) == [(Began(job_id="job"), b""), *RECORDS]
    assert path.stat().st_mode & 0o777 == 0o600


async def test_nan_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "redo.bin"
    lost = Contributed(announcement=Announcement(0, 0, 0, Role.SOURCE, 1, 0, bytes(16), 1), accounts={})
    (await written(path, [(lost, b"x")])).close()
    _, (record, _) = found(path)
    assert isinstance(record, Contributed)
    assert math.isnan(record.announcement.loss)
    assert math.isnan(record.announcement.nmse)


async def test_wherever_it_is_cut_off_what_is_before_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "redo.bin"
    (await written(path, RECORDS)).close()
    whole, ends = path.read_bytes(), [logged.end for logged in read(path, "job")]
    for size in {
        *range(ends[0], len(whole), 7),
        *ends,
        *(end - 1 for end in ends[1:]),
        *(end + 1 for end in ends[:-1]),
    }:
        path.write_bytes(whole[:size])
        assert len(found(path)) == sum(end <= size for end in ends), size


async def test_a_flipped_bit_ends_it_there(tmp_path: Path) -> None:
    path = tmp_path / "redo.bin"
    (await written(path, RECORDS)).close()
    whole, ends = path.read_bytes(), [logged.end for logged in read(path, "job")]
    for at in range(ends[0], len(whole), 11):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        assert len(found(path)) == sum(end <= at for end in ends), at


async def test_after_a_cut_off_end_new_records_follow_the_whole_ones(tmp_path: Path) -> None:
    path = tmp_path / "redo.bin"
    (await written(path, RECORDS)).close()
    path.write_bytes(path.read_bytes()[:-1])
    end = list(read(path, "job"))[-1].end
    log = RedoLog(path, "job")
    log.go_on(end)
    await log.append(RECORDS[0][0])
    log.close()
    assert found(path) == [(Began(job_id="job"), b""), *RECORDS[:-1], RECORDS[0]]


def test_what_is_no_log_of_this_job(tmp_path: Path) -> None:
    path = tmp_path / "redo.bin"
    assert found(path) == []
    path.touch()
    with pytest.raises(UserError, match="is empty"):
        found(path)
    RedoLog(path, "job").begin()
    assert found(path) == [(Began(job_id="job"), b"")]
    with pytest.raises(UserError, match="not the log of job other"):
        found(path, "other")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged at its beginning"):
        found(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        found(path)


async def test_a_lying_length_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "redo.bin"
    (await written(path, RECORDS[:1])).close()
    whole = bytearray(path.read_bytes())
    end = next(iter(read(path, "job"))).end
    whole[end + 8 : end + 16] = (2**63).to_bytes(8, "little")
    path.write_bytes(whole)
    assert found(path) == [(Began(job_id="job"), b"")]


async def test_a_record_of_another_version_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "redo.bin"
    newer = Leased(index=2, key=b"")
    log = await written(path, RECORDS[:1])
    with monkeypatch.context() as patched:
        patched.setattr(Leased, "model_dump_json", lambda _: '{"kind": "leased", "index": 2, "key": "", "new": 1}')
        await log.append(newer)
    log.close()
    with pytest.raises(UserError, match="another version of ditherps"):
        found(path)


@pytest.mark.parametrize("fails", ["open", "replace", "sync_folder"])
async def test_a_cut_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    path = tmp_path / "redo.bin"
    log = await written(path, RECORDS)

    def failing(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        if fails == "replace":
            patched.setattr(Path, "replace", failing)
        else:
            patched.setattr(files, fails, failing, raising=False)
        with pytest.raises(OSError, match="Too many open files"):
            await log.cut(redo.members({1: b"a"}, {}))
    last = Leased(index=7, key=b"after")
    await log.append(last)
    log.close()
    before = [(Leased(index=1, key=b"a"), b"")] if fails == "sync_folder" else RECORDS
    assert found(path) == [(Began(job_id="job"), b""), *before, (last, b"")]
    assert os.listdir(tmp_path) == ["redo.bin"]


async def test_who_is_cancelled_does_not_cancel_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = await written(tmp_path / "redo.bin", [])
    written_ = log.append(RECORDS[0][0])
    waiting = [asyncio.ensure_future(asyncio.shield(written_)) for _ in range(2)]
    waiting[0].cancel()
    await waiting[1]
    cancelled = log.append(RECORDS[1][0])
    cancelled.cancel()
    await log.append(RECORDS[2][0], [CONTENT])
    log.close()
    assert found(tmp_path / "redo.bin") == [(Began(job_id="job"), b""), *RECORDS[:3]]


async def test_cutting_keeps_what_is_asked_for_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "redo.bin"
    log = await written(path, RECORDS)
    await log.cut(redo.members({1: b"a"}, {}))
    await log.append(RECORDS[1][0])
    log.close()
    assert found(path) == [(Began(job_id="job"), b""), (Leased(index=1, key=b"a"), b""), RECORDS[1]]


class FullDisk:
    """The file system, which has room for `room` bytes more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        self._pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", self._write)

    def _write(self, descriptor: int, content: memoryview, offset: int) -> int:
        if not (fits := content[: self.room]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = self._pwrite(descriptor, fits, offset)
        self.room -= count
        return count


async def test_where_there_is_no_room_the_log_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contribution is refused; what must not be missing before later ones is written as soon as there is room."""
    path = tmp_path / "redo.bin"
    log = await written(path, RECORDS[:1])
    before = path.read_bytes()
    monkeypatch.setattr(redo, "AGAIN_SECONDS", 0.01)
    disk = FullDisk(monkeypatch, room=len(CONTENT) // 2)
    opened, contributed = RECORDS[1][0], RECORDS[2][0]
    kept = log.append(opened)
    with pytest.raises(OSError, match="No space left"):
        await log.append(contributed, [CONTENT], kept=False)
    assert path.read_bytes() == before
    assert not kept.done()
    disk.room = 1 << 20
    await kept
    await log.append(contributed, [CONTENT], kept=False)
    log.close()
    assert found(path) == [(Began(job_id="job"), b""), *RECORDS[:3]]


async def test_many_records_share_a_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = await written(tmp_path / "redo.bin", [])
    syncs, fdatasync = [], os.fdatasync

    def counted(descriptor: int) -> None:
        syncs.append(descriptor)
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", counted)
    await asyncio.gather(*(log.append(Leased(index=index, key=b"")) for index in range(100)))
    log.close()
    assert len(syncs) <= 2
    assert len(found(tmp_path / "redo.bin")) == 101
