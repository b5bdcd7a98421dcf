"""The parts of an update in mode `data`, as both ends know them from the job (proto/FORMAT.md, "Samples")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ditherps.codecs import Codec
from ditherps.config import JobConfig
from ditherps.dither import Address, Domain
from ditherps.errors import PayloadError, Reason
from ditherps.samples.agreement import probed
from ditherps.samples.importance import Selection
from ditherps.samples.mode import sample_codec
from ditherps.sampling import Ids
from ditherps.tasks import Task

PROBE_COORDINATES: Final = 1024
"""Of a gradient that a probe compares; 4 KiB, once in `data.probe_every` rounds."""


@dataclass(frozen=True, slots=True)
class Update:
    """An update in its parts, each the bytes as they came.

    Attributes:
        front: selection and samples.
        probe: (n,) float32, some coordinates of the worker's gradient at the quantized samples; empty without a probe.
        refinement: the encoded difference of the worker's gradients; empty without one.
    """

    front: memoryview
    probe: NDArray[np.float32]
    refinement: memoryview

    def samples(self, selection: Selection | None) -> memoryview:
        """The payload of the samples, behind the selection."""
        return self.front if selection is None else self.front[len(selection.to_bytes()) :]


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the parts of an update end."""

    samples: int
    probe: int
    update: int

    def of(self, update: memoryview) -> Update:
        """The parts of an update of this form."""
        probe = np.frombuffer(update[self.samples : self.probe], "<f4")
        return Update(update[: self.samples], probe, update[self.probe :])


class Contents:
    """What the updates of a job consist of."""

    def __init__(self, job: JobConfig, task: Task, coordinates: int, refinement: Codec | None) -> None:
        """`refinement`: the codec of the refinement, ready for a model with so many coordinates."""
        self.refinement = refinement
        self._job, self._coordinates = job, coordinates
        self._most_samples = sample_codec(job, task, 0).max_nbytes(job.batch_size, job.data.level)
        self._most_refinement = refinement.max_nbytes(coordinates) if refinement is not None else 0

    def is_probed(self, round_: int) -> bool:
        """Whether the updates of a round hold a probe."""
        return self.refinement is not None and round_ % self._job.data.probe_every == 0

    def probed(self, round_: int, worker: int) -> Ids:
        """Which coordinates of the gradient a worker's probe holds."""
        return probed(Address(self._job.seed, round_, worker, Domain.PROBE), self._coordinates, PROBE_COORDINATES)

    def _probe_bytes(self, round_: int) -> int:
        return 4 * min(PROBE_COORDINATES, self._coordinates) if self.is_probed(round_) else 0

    @property
    def _most_selection(self) -> int:
        return 0 if self._job.data.keep == 1 else (self._job.batch_size + 7) // 8 + self._job.batch_size

    @property
    def largest_bytes(self) -> int:
        """Most bytes that an update can take."""
        return self._most_selection + self._most_samples + 4 * PROBE_COORDINATES + self._most_refinement

    def parts(self, update_bytes: int, sample_bytes: int, round_: int) -> Parts:
        """The form of an update in a round; raises `PayloadError` where it cannot have these sizes."""
        after = update_bytes - sample_bytes - self._probe_bytes(round_)
        most_samples = self._most_selection + self._most_samples
        if sample_bytes > most_samples or not (self.refinement is not None) <= after <= self._most_refinement:
            raise PayloadError(
                f"an update of {update_bytes} bytes, {sample_bytes} of samples; at most {most_samples} of samples, "
                f"{self._probe_bytes(round_)} of a probe and {self._most_refinement} of a refinement are possible",
                Reason.SIZE,
            )
        return Parts(sample_bytes, update_bytes - after, update_bytes)

    def coins(self, round_: int, worker: int) -> Address:
        """The address of the coins that decide which samples of a batch are sent."""
        return Address(self._job.seed, round_, worker, Domain.IMPORTANCE)

    def selection(self, update: Update, round_: int, worker: int) -> Selection | None:
        """Which samples of the batch a worker has sent; None: all, since the job has no gate.

        Raises `PayloadError` for one that cannot be.
        """
        if self._job.data.keep == 1:
            return None
        front, count = update.front, self._job.batch_size
        kept = np.unpackbits(np.frombuffer(front, np.uint8, min((count + 7) // 8, len(front))), bitorder="little")
        size = (count + 7) // 8 + int(kept.sum())
        return Selection.from_bytes(bytes(front[:size]), count, self.coins(round_, worker))
