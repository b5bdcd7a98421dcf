"""Files that survive a crash whole or not at all, and folders that belong to one process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ditherps.errors import UserError

LOCK_FILE = "lock"


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o600) -> Iterator[BinaryIO]:
    """A file to be written that takes the place of `path`, synced, when the context ends; until then that one stays.

    Only its owner can read it, unless `mode` says more (the process's mask takes away from that). What a writer that
    was killed has left behind is removed first. Raises `OSError` where there is no room or no permission: nothing of
    the new file is there then; if only the folder could not be synced, it is there whole.
    """
    _remove_parts(path)
    # A name of its own: a writer that should be dead, but is not, cannot spoil what this one puts in place.
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(part, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    sync_folder(path.parent)


def write_at(descriptor: int, content: bytes | memoryview, offset: int) -> int:
    """Write all of `content` at an offset of a file, and return its length; raises `OSError`."""
    view, done = memoryview(content), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
    return done


def make(folder: Path) -> None:
    """Make a folder that may be there; raises `UserError` where it cannot be, or cannot be written into."""
    reason = "no permission"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return
    except OSError as error:
        reason = error.strerror or str(error)
    raise UserError(f"{folder} cannot be written: {reason}: choose another folder")


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if it is not there, until the context or the process ends.

    Raises `UserError` where another has it, or it cannot be written.
    """
    make(folder)
    with (folder / LOCK_FILE).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process uses the folder {folder}: end it, or choose another folder") from None
        yield


def _remove_parts(path: Path) -> None:
    for other in path.parent.iterdir():
        if other.name.startswith(path.name + ".") and other.name.endswith(".part"):
            with contextlib.suppress(OSError):
                other.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename in it last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
