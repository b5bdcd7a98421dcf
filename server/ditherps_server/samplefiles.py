"""Where the server's samples lie in a run folder: beside each checkpoint, and after the job if that is asked for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from ditherps.config import JobConfig, ServerConfig
from ditherps.errors import PayloadError
from ditherps.files import sync_folder
from ditherps_server.cache import ROWS_FILE, SampleCache

log = logging.getLogger(__name__)

_FILES: Final = "samples-*.safetensors*"


class SampleFiles:
    """Saves and loads the cache of a job."""

    def __init__(self, config: ServerConfig, job: JobConfig, cache: SampleCache) -> None:
        self._folder, self._cache_dir, self._keep, self._cache = (
            config.run_dir,
            config.cache_dir,
            config.keep_cache,
            cache,
        )
        self._kept = self._folder / f"samples-of-seed-{job.seed}.safetensors"

    def _at(self, version: int) -> Path:
        return self._folder / f"samples-{version}.safetensors"

    def load(self, version: int, *, resumed: bool) -> bool:
        """Begin with what was saved with the checkpoint of this version, or was left by an earlier job.

        Whether that is there; without it the samples are sent again.
        """
        path = self._at(version) if resumed else self._kept
        if not path.exists():
            if resumed:
                log.warning("%s is not there: samples are sent again", path)
            return False
        try:
            self._cache.load(path)
        except PayloadError as error:
            log.warning("%s: samples are sent again", error)
            return False
        log.info("holds %d samples", len(self._cache))
        return True

    def save(self, version: int) -> None:
        """Write what belongs to the checkpoint of this version; raises `OSError`."""
        self._cache.save(self._at(version))

    def forget(self, *, but: int) -> None:
        """Remove what belongs to other checkpoints."""
        for path in self._folder.glob(_FILES):
            if path not in (self._at(but), self._kept):
                path.unlink(missing_ok=True)

    def end(self) -> None:
        """The job is over: nothing is left, or what the next job may begin with."""
        if self._keep:
            self._cache.save(self._kept)
        else:
            wipe(self._folder)
        for path in self._folder.glob(_FILES):
            if path != self._kept:
                path.unlink(missing_ok=True)
        wipe_rows(self._cache_dir)


def wipe_rows(cache_dir: Path | None) -> int:
    """Remove the samples that a server has kept in its `--cache-dir`; how many files that were."""
    return _remove([cache_dir / ROWS_FILE] if cache_dir is not None else [])


def wipe(run_dir: Path, cache_dir: Path | None = None) -> int:
    """Remove all samples of a run folder that no server uses; how many files that were.

    The redo log goes too: it holds what workers sent since the checkpoint. A server that resumes has it sent again.
    """
    found = [*run_dir.glob(_FILES), run_dir / "redo.bin", run_dir / "redo.old.bin"]
    removed = _remove(found) + wipe_rows(cache_dir)
    if removed and run_dir.exists():
        sync_folder(run_dir)
    return removed


def _remove(paths: list[Path]) -> int:
    removed = 0
    for path in paths:
        if path.exists():
            path.unlink()
            removed += 1
    return removed
