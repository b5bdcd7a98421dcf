"""A small disk that can be filled, and freed again."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path


class Disk:
    """A file system of its own, in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / ".ballast"

    @property
    def free_bytes(self) -> int:
        """What still fits."""
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def fill(self, leave_bytes: int = 0) -> None:
        """Leave only so much room, to the page, whatever others write or delete just now."""
        page = os.statvfs(self.folder).f_frsize
        with self._ballast.open("ab") as file:
            while (spare := self.free_bytes - leave_bytes) >= page:
                with contextlib.suppress(OSError):  # somebody else took of it: look again
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, spare)

    def free(self) -> None:
        """Make room again."""
        self._ballast.unlink(missing_ok=True)


def why_not() -> str:
    """Why there can be no such disk here; empty where there can."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return "mounting a small file system takes root, and mount"
    return ""


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Disk]:
    """A tmpfs of `size_bytes` at `folder`, unmounted at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={size_bytes},mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
