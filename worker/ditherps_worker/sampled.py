"""Mode `data` at a worker: what the server lacks of a round's samples, and where the job asks for it, a refinement."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import numpy as np
import torch

from ditherps.codecs import Codec, Encoded
from ditherps.config import JobConfig
from ditherps.dither import Address, Domain
from ditherps.errors import NonFiniteError
from ditherps.samples.contents import Contents
from ditherps.samples.importance import Selection, probabilities, scores
from ditherps.samples.mode import needs_model, sample_codec, warm_samples
from ditherps.samples.need import Need, distinct
from ditherps.samples.shard import stated
from ditherps.sampling import Ids
from ditherps.tasks import Keys
from ditherps_worker.compute import Computer


class SampledUpdate(NamedTuple):
    """A contribution: `update` begins with `sample_bytes` of selection and samples; loss and nmse as far as known."""

    update: bytes
    sample_bytes: int
    loss: float
    nmse: float
    compute_seconds: float
    encode_seconds: float


class _Batch(NamedTuple):
    """Samples that are sent: ids, keys to augment with, and weights of their losses (None: 1/n)."""

    ids: Ids
    keys: Keys
    weights: torch.Tensor | None


class SampleSender:
    """Encodes one worker's samples, round after round; the same for a round whenever it is asked for.

    Attributes:
        shard: which samples it has, as a server is told (`ditherps.samples.shard.stated`).
        needs_model: whether w is needed: for the gate, and for the refinement.
    """

    def __init__(self, job: JobConfig, index: int, computer: Computer, refinement: Codec | None) -> None:
        """`refinement`: of the job, if it has one, ready for the computer's model."""
        self._job, self._index, self._computer = job, index, computer
        self._codec = sample_codec(job, computer.task, index)
        self._contents = Contents(job, computer.task, computer.model.layout.coordinates, refinement)
        self._refinement = refinement
        warm_samples(self._codec)
        self.shard = stated(computer.samples, computer.shard)
        self.needs_model = needs_model(job.data)

    def update(self, round_: int, attempt: int, need: bytes) -> SampledUpdate:
        """What a round asks of this worker; raises `PayloadError` for a need that cannot be.

        Args:
            round_: of the plan.
            attempt: of the plan.
            need: what the server says that it holds.
        """
        began = time.perf_counter()
        ids, keys = self._computer.batch(round_)
        names, _ = distinct(ids)
        wanted = Need.from_bytes(need, len(names), self._job.data.level)
        selection = self._selected(round_, ids, keys)
        batch = _Batch(ids, keys, None)
        if selection is not None:
            weights = torch.from_numpy(selection.weights).float()
            batch = _Batch(ids[selection.kept], keys[selection.kept], weights)
        chosen = time.perf_counter()
        front = (selection.to_bytes() if selection else b"") + self._samples(batch, names, wanted)
        encoded = time.perf_counter()
        if self._refinement is None:
            return SampledUpdate(front, len(front), math.nan, math.nan, chosen - began, encoded - chosen)
        probe, rest, loss, nmse = self._refined(round_, attempt, _Batch(ids, keys, None), batch)
        done = time.perf_counter()
        update = b"".join((front, probe, rest.data.data))
        return SampledUpdate(update, len(front), loss, nmse, chosen - began + done - encoded, encoded - chosen)

    def _selected(self, round_: int, ids: Ids, keys: Keys) -> Selection | None:
        if self._job.data.keep == 1:
            return None
        computer = self._computer
        rows = torch.from_numpy(ids)
        found = scores(
            computer.task, computer.name, computer.model, computer.samples.features[rows],
            computer.samples.labels[rows], keys,
        )  # fmt: skip
        if not np.isfinite(found).all():
            raise NonFiniteError(f"round {round_}: the loss of a sample has a slope that is NaN or infinity")
        return Selection.toss(probabilities(found, self._job.data.keep), self._contents.coins(round_, self._index))

    def _samples(self, batch: _Batch, names: Ids, wanted: Need) -> bytes:
        """The payload of what the server lacks of the samples that are sent; nothing where it lacks nothing."""
        sent = np.isin(names, batch.ids) & wanted.lacking
        if not sent.any():
            return b""
        rows = torch.from_numpy(names[sent])
        features, labels = self._computer.samples.features[rows], self._computer.samples.labels[rows]
        return self._codec.encode(names[sent], features, labels, wanted.held[sent], wanted.level)

    def _refined(self, round_: int, attempt: int, whole: _Batch, sent: _Batch) -> tuple[bytes, Encoded, float, float]:
        """The probe, the encoded difference of the true gradient and that at the sent samples, loss and NMSE."""
        assert self._refinement is not None
        computer, level = self._computer, self._job.data.level
        rows = torch.from_numpy(whole.ids)
        features, labels = computer.samples.features[rows], computer.samples.labels[rows]
        buffers = computer.model.buffers()
        loss = float(computer.gradient_at(round_, features, labels, whole.keys))
        difference = computer.model.gradient.clone()
        computer.model.load_buffers(buffers)
        rows = torch.from_numpy(sent.ids)
        quantized = self._codec.quantized(sent.ids, computer.samples.features[rows], level)
        values = self._codec.values(sent.ids, quantized, level)
        computer.gradient_at(round_, values, computer.samples.labels[rows], sent.keys, sent.weights)
        difference -= computer.model.gradient
        probe = b""
        if self._contents.is_probed(round_):
            places = torch.from_numpy(self._contents.probed(round_, self._index))
            probe = computer.model.gradient.cpu()[places].numpy().astype("<f4").tobytes()
        address = Address(self._job.seed, round_, self._index, Domain.UPDATE, attempt)
        encoded = self._refinement.encode(difference, address, name=computer.model.layout.name_at)
        energy = float(torch.dot(difference, difference))
        error = self._refinement.expected_squared_error(encoded)
        return probe, encoded, loss, error / energy if energy > 0 else math.nan
