"""When the server's state is saved, what belongs to it, and how a server goes on from it."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ditherps.config import JobConfig, ServerConfig
from ditherps.errors import UserError
from ditherps_server import checkpoint
from ditherps_server.checkpoint import Checkpoint, Entered
from ditherps_server.model import ServerModel
from ditherps_server.optimizer import ServerOptimizer
from ditherps_server.samplefiles import SampleFiles, wipe

log = logging.getLogger(__name__)

CHECKPOINT_FILE = "checkpoint.safetensors"
OLD_CHECKPOINT_FILE = "checkpoint.old.safetensors"
REDO_FILE = "redo.bin"
OLD_REDO_FILE = "redo.old.bin"
CHECKPOINTS_IN_A_RUN = 20
LEAST_ROUNDS_BETWEEN = 10


@dataclass(frozen=True, slots=True)
class Origin:
    """What a server begins with: a new job, or one that goes on."""

    job_id: str = field(default_factory=lambda: secrets.token_hex(8))
    epoch: int = 1
    leases: Mapping[int, bytes] = field(default_factory=dict)
    entered: Mapping[int, Entered] = field(default_factory=dict)
    totals: Mapping[str, Any] = field(default_factory=dict)
    logged: bool = False
    """A redo log goes on from the checkpoint."""
    initial_digest: bytes = b""
    """Empty: that of the model as it is."""
    resumed: bool = False


def resumed(config: ServerConfig, job: JobConfig, model: ServerModel, optimizer: ServerOptimizer) -> Origin:
    """Bring model and optimizer to where the checkpoint in the run folder stands, and say how the job goes on.

    A new job where there is no checkpoint, or `config.resume` is not set. Raises `UserError` when the checkpoint is
    damaged, or of another job; it says how they differ.
    """
    path = config.run_dir / CHECKPOINT_FILE
    if not config.resume:
        return Origin()
    if not path.exists():
        log.info("no checkpoint in %s: the job begins", config.run_dir)
        return Origin()
    saved = checkpoint.read(path)
    if job.error_feedback and config.durability == "none":
        raise UserError(
            "--resume: with durability none a job with error_feedback cannot go on, since its workers' errors are of "
            "later rounds"
        )
    if changed := checkpoint.differences(saved.job, job):
        raise UserError(f"{path} is of another job ({'; '.join(changed)}): resume with the job file as it was")
    sizes = (saved.x.numel(), len(saved.buffers))
    if saved.layout_digest != model.layout.digest or sizes != (model.layout.coordinates, model.layout.buffer_bytes):
        raise UserError(f"{path} holds another model than the task builds now")
    model.restore(saved.x, saved.w, saved.buffers, saved.version)
    optimizer.load_state_dict(saved.optimizer_tensors, saved.optimizer_values)
    log.info("resumed job=%s version=%d epoch=%d", saved.job_id, saved.version, saved.server_epoch + 1)
    return Origin(
        saved.job_id, saved.server_epoch + 1, saved.leases, saved.entered, saved.totals, saved.logged,
        saved.initial_digest, resumed=True,
    )  # fmt: skip


class Saver:
    """Writes the checkpoint of a running job."""

    def __init__(
        self, config: ServerConfig, job: JobConfig, origin: Origin, model: ServerModel, optimizer: ServerOptimizer,
        samples: SampleFiles | None = None,
    ) -> None:  # fmt: skip
        self._path = config.run_dir / CHECKPOINT_FILE
        self._every = config.checkpoint_every or max(LEAST_ROUNDS_BETWEEN, job.rounds // CHECKPOINTS_IN_A_RUN)
        self._redo_bytes, self._logged = config.redo_bytes, config.durability == "round"
        self._samples = samples
        self._job, self._origin, self._model, self._optimizer = job, origin, model, optimizer
        self.initial_digest = origin.initial_digest or model.digest

    def set_aside(self) -> None:
        """A new job begins: a later `--resume` must not take what is left of an earlier run for this one's."""
        wipe(self._path.parent, kept=self._samples is None)  # else they have been loaded
        if self._path.exists():
            self._path.replace(self._path.with_name(OLD_CHECKPOINT_FILE))
            redo = self._path.with_name(REDO_FILE)
            if redo.exists():
                redo.replace(self._path.with_name(OLD_REDO_FILE))
            log.warning("not resumed: the checkpoint of an earlier run is %s from now on", OLD_CHECKPOINT_FILE)

    def begin(self, leases: Mapping[int, bytes], entered: Mapping[int, Entered], totals: Mapping[str, Any]) -> None:
        """The server is about to let workers in: its epoch, or the new job, has to last first.

        Then no server after this one, even if it is cut off before its next checkpoint, has the same epoch or takes
        what it finds for its own. Raises `UserError` where there is no room for that.
        """
        try:
            self.save(leases, entered, totals)
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror}") from None

    def due(self, version: int, redo_bytes: int) -> bool:
        """Whether a checkpoint belongs after the round that made `version`, with a redo log of this length."""
        return version % self._every == 0 or redo_bytes > self._redo_bytes

    def save(self, leases: Mapping[int, bytes], entered: Mapping[int, Entered], totals: Mapping[str, Any]) -> float:
        """Write the present state; returns the seconds it took. Nothing may change the model meanwhile."""
        began, model = time.perf_counter(), self._model
        tensors, values = self._optimizer.state_dict()
        state = Checkpoint(
            job=self._job, job_id=self._origin.job_id, server_epoch=self._origin.epoch, version=model.version,
            x=model.x, w=None if model.w is model.x else model.w, buffers=model.buffers,
            layout_digest=model.layout.digest, initial_digest=self.initial_digest, optimizer_tensors=tensors,
            optimizer_values=values, leases=leases, entered=entered, totals=totals,
            logged=self._logged,
        )  # fmt: skip
        if self._samples is not None:
            self._samples.save(model.version)  # before: whoever finds the checkpoint finds them too
        size = checkpoint.write(self._path, state)
        if self._samples is not None:
            self._samples.forget(but=model.version)
        seconds = time.perf_counter() - began
        log.info("checkpoint version=%d bytes=%d seconds=%.3f", model.version, size, seconds)
        return seconds

    def discard(self) -> None:
        """The job is over: there is nothing to go on with."""
        self._path.unlink(missing_ok=True)
        self._path.with_name(REDO_FILE).unlink(missing_ok=True)
        if self._samples is not None:
            self._samples.end()
