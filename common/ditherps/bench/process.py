"""What another process of this machine costs: its memory and processor time, from /proc."""

from __future__ import annotations

import contextlib
import os
import resource
from dataclasses import dataclass
from pathlib import Path

from ditherps.errors import UserError


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used by now."""

    peak_bytes: int
    """Largest resident set (VmHWM) since it started, or since `reset_peak`."""
    anonymous_bytes: int
    """Resident memory that no file stands behind (RssAnon), now."""
    cpu_seconds: float
    """User and system time of all its threads."""


def usage(pid: int) -> Usage:
    """What the process `pid` has used; raises `UserError` where there is no Linux /proc for it."""
    folder = Path("/proc") / str(pid)
    try:
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        sizes = [int(status[name].split()[0]) << 10 for name in ("VmHWM", "RssAnon")]
    except (OSError, KeyError) as error:
        raise UserError(f"memory is measured in {folder}, which cannot be read: {error}") from None
    ticks = int(fields[11]) + int(fields[12])  # utime and stime of proc(5), two fields after the name
    return Usage(sizes[0], sizes[1], ticks / os.sysconf("SC_CLK_TCK"))


def reset_peak(pid: int) -> None:
    """From now on the peak is that of what follows (proc(5), clear_refs); raises `UserError` as `usage`."""
    path = Path("/proc") / str(pid) / "clear_refs"
    try:
        path.write_text("5")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def raise_open_files() -> None:
    """Let this process, and those that it starts, open as many files (and sockets) as the system lets it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
