"""Where the files of a dataset are, and getting them when they are nowhere.

Files are looked for below the user's data directory and below the cache of this program. What is missing is downloaded
by torchvision in a process of its own: so an attempt ends in bounded time whatever the network does, shows no progress
bars, and leaves no half-written file behind.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

from ditherps.errors import DataMissingError

DOWNLOAD_TIMEOUT: Final = 600.0
"""Seconds that a whole download may take."""

SOCKET_TIMEOUT: Final = 15
"""Seconds that a download may wait for an answer."""

Source = Literal["MNIST", "FashionMNIST", "CIFAR10"]
"""A dataset class of torchvision."""

_SCRIPT = """
import socket, sys
socket.setdefaulttimeout(float(sys.argv[3]))
import torchvision
getattr(torchvision.datasets, sys.argv[1])(sys.argv[2], download=True)
"""


def cache_dir() -> Path:
    """Where downloads go when the user named no directory that can be written to."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ditherps"


def find_or_download(
    source: Source, folder: str, data_dir: Path | None, complete: Callable[[Path], bool], wanted: str
) -> Path:
    """The root folder of a dataset, which is downloaded when it is nowhere.

    Args:
        source: what torchvision calls the dataset.
        folder: the dataset's own folder in a data directory that holds several (`mnist`).
        data_dir: the user's data directory, or None.
        complete: whether a root folder has the files.
        wanted: the files, in words, for the error.

    Returns:
        A folder for which `complete` is true: `data_dir/folder`, `data_dir`, or the same two of the cache.

    Raises:
        DataMissingError: found nowhere, and the download failed.
    """
    places = [directory for directory in (data_dir, cache_dir()) if directory is not None]
    roots = [root for directory in places for root in (directory / folder, directory)]
    for root in roots:
        if complete(root):
            return root
    failure = ""
    for directory in places:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=directory) as scratch:
                failure = _download(source, Path(scratch))
                if not failure:
                    _move_into(directory, Path(scratch))
        except OSError as error:  # a read-only directory; the next one may do
            failure = f"{directory}: {error.strerror or error}"
            continue
        if complete(directory):
            return directory
        break
    raise DataMissingError(
        f"{folder}: no data in {', '.join(map(str, roots))}, and it cannot be downloaded ({failure}); "
        f"point --data-dir or DITHERPS_DATA at a folder with {wanted}"
    )


def _download(source: Source, root: Path) -> str:
    """Let torchvision download a dataset below `root`; why it could not, in one line, or ''."""
    command = [sys.executable, "-c", _SCRIPT, source, str(root), str(SOCKET_TIMEOUT)]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=DOWNLOAD_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not finished after {DOWNLOAD_TIMEOUT:.0f} s"
    if ended.returncode == 0:
        return ""
    said = ended.stderr.strip().splitlines()
    return said[-1].strip() if said else f"exit status {ended.returncode}"


def _move_into(directory: Path, scratch: Path) -> None:
    """Move downloaded files to where they belong, each at once; another process may be doing the same."""
    for path in scratch.rglob("*"):
        if path.is_file():
            target = directory / path.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
