"""Where the server's samples lie in a run folder: beside each checkpoint, and after the job if that is asked for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from ditherps.config import JobConfig, ServerConfig
from ditherps.errors import PayloadError, UserError
from ditherps.files import sync_folder
from ditherps_server.cache import SampleCache

log = logging.getLogger(__name__)

_OF_VERSIONS: Final = "samples-[0-9]*.safetensors*"
_KEPT: Final = "samples-of-seed-*.safetensors*"
_LOGS: Final = ("redo.bin", "redo.old.bin")
"""They hold what workers sent since a checkpoint."""


class SampleFiles:
    """Saves and loads the cache of a job."""

    def __init__(self, config: ServerConfig, job: JobConfig, cache: SampleCache) -> None:
        self._folder, self._keep, self._cache = config.run_dir, config.keep_cache, cache
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
        except (PayloadError, OSError) as error:
            self._cache.wipe()
            log.warning("%s: samples are sent again", error)
            return False
        log.info("holds %d samples", len(self._cache))
        return True

    def save(self, version: int) -> None:
        """Write what belongs to the checkpoint of this version; raises `OSError`."""
        self._cache.save(self._at(version))

    def forget(self, *, but: int) -> None:
        """Remove what belongs to other checkpoints."""
        for path in self._folder.glob(_OF_VERSIONS):
            if path != self._at(but):
                path.unlink(missing_ok=True)

    def end(self) -> None:
        """The job is over: nothing is left, or what the next job may begin with."""
        kept = self._keep
        if kept:
            try:
                self._cache.save(self._kept)
            except OSError as error:
                log.error("samples are not kept: %s", error.strerror)
                kept = False
        wipe(self._folder, kept=kept)


def wipe(run_dir: Path, *, kept: bool = False) -> int:
    """Remove all samples of a run folder that no server uses; how many files that were.

    The redo logs go too where samples are found, for then they hold some: a server that resumes has those sent again.
    With `kept`, what an earlier job left for the next one stays. Raises `UserError` where that is not possible.
    """
    of_versions, of_jobs = list(run_dir.glob(_OF_VERSIONS)), list(run_dir.glob(_KEPT))
    found = [*of_versions, *([] if kept else of_jobs)]
    if of_versions:
        found += [run_dir / name for name in _LOGS if (run_dir / name).exists()]
    try:
        for path in found:
            path.unlink(missing_ok=True)
        if found:
            sync_folder(run_dir)
    except OSError as error:
        raise UserError(f"samples in {run_dir} cannot be removed: {error.strerror}") from None
    return len(found)
