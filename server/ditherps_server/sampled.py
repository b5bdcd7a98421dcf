"""Mode `data`: contributions are samples, of which the server computes the gradient, and how a worker refines it.

An update is, each part only where the job asks for it: which samples of the batch are sent (the gate), what the server
lacks of them, some coordinates of the worker's gradient at the same samples (the probe), the encoded refinement.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from ditherps.codecs import Codec, DecodeReport, Encoded, Role
from ditherps.codecs import codec as make_codec
from ditherps.config import AggregationConfig, JobConfig
from ditherps.errors import PayloadError, Reason
from ditherps.kernels.cpu import accumulate_float32
from ditherps.samples.agreement import Agreement, agreement
from ditherps.samples.codec import NOTHING, SampleCodec
from ditherps.samples.contents import Contents, Parts
from ditherps.samples.mode import features_of, sample_codec
from ditherps.samples.need import Need, distinct
from ditherps.samples.shard import read
from ditherps.sampling import Ids, Walk, augmentation_keys
from ditherps.tasks import Task
from ditherps_server.aggregate import Sender, aggregate
from ditherps_server.cache import SampleCache, Taken
from ditherps_server.model import ServerModel
from ditherps_server.staging import Announcement, Contribution
from ditherps_server.trainer import Batch, Computed, Trainers
from ditherps_server.updates import SampleReport, Sum, address_of

log = logging.getLogger(__name__)


class Shard(NamedTuple):
    """Which samples a worker has: as it said so, their version, its walk through them, their codec."""

    stated: bytes
    version: bytes
    walk: Walk
    codec: SampleCodec


class SampledUpdates:
    """Contributions of samples; `ditherps_server.updates.Updates` says what its methods do."""

    buffer_bytes = 0
    """The buffers are those that the server's own computation leaves."""

    def __init__(
        self, job: JobConfig, task: Task, model: ServerModel, codec: Codec, cache: SampleCache, device: torch.device,
        pool: Executor | None = None, at_once: int = 1,
    ) -> None:  # fmt: skip
        """`codec`: of the refinement, if the job has one; `pool`, `at_once`: as of `Trainers`."""
        self.cache = cache
        self._agreement: Agreement | None = None
        self._gradient_seconds = 0.0
        self._job, self._task, self._model = job, task, model
        self._contents = Contents(job, task, model.layout.coordinates, codec if job.data.refine else None)
        self._refinement = self._contents.refinement
        self._plain = make_codec("none")
        self._trainers = Trainers(task, job.model or None, job.seed, device, pool, at_once)
        self._shards: dict[int, Shard] = {}

    # Who has what.

    def read(self, index: int, stated: bytes, round_: int) -> Shard:
        """What worker `index` says of its samples, ready for a round. Takes long; raises `PayloadError`."""
        version, ids = read(stated, self._task.training_samples)
        walk = Walk(ids, self._job.seed, index)
        walk.take(round_ * self._job.batch_size, self._job.batch_size)  # it keeps the order of the epoch
        return Shard(stated, version, walk, sample_codec(self._job, self._task, index))

    def knows(self, index: int, stated: bytes) -> bool:
        """Whether worker `index` has said so before."""
        known = self._shards.get(index)
        return known is not None and known.stated == stated

    def admit(self, index: int, shard: Shard) -> None:
        """Worker `index` has these samples; what is held of others is forgotten. Only between rounds."""
        self._shards[index] = shard
        self.cache.admit(index, shard.version)

    @property
    def stated(self) -> dict[int, bytes]:
        """By worker, what it has said last."""
        return {index: shard.stated for index, shard in self._shards.items()}

    def need(self, index: int, round_: int) -> bytes:
        """What the server holds of a worker's samples of a round (`Need.to_bytes`)."""
        names, _ = distinct(self._batch(index, round_)[0])
        level = self._job.data.level
        return Need(np.minimum(self.cache.held(index, names), level), level).to_bytes()

    def _batch(self, index: int, round_: int) -> tuple[Ids, Ids]:
        """Ids and epochs of a worker's samples of a round."""
        return self._of(index).walk.take(round_ * self._job.batch_size, self._job.batch_size)

    def _of(self, index: int) -> Shard:
        if (shard := self._shards.get(index)) is None:
            raise PayloadError("this worker has not said which samples it has", Reason.CONTEXT_MISMATCH)
        return shard

    # One contribution.

    def largest_bytes(self, role: Role) -> int:
        """Most bytes that an update can take."""
        return self._contents.largest_bytes

    @property
    def aside_bytes(self) -> int:
        """Its samples, decoded, as one changes them into the other."""
        return 2 * features_of(self._task).count * 2 * self._job.batch_size

    def check_sizes(self, announcement: Announcement) -> None:
        """Raises `PayloadError` unless an update can have these sizes."""
        self._contents.parts(announcement.update_bytes, announcement.sample_bytes, announcement.round)

    def look_up(self, contribution: Contribution) -> None:
        """Copy what the cache holds of the samples; raises `PayloadError` for a selection that cannot be."""
        announcement = contribution.announcement
        ids, epochs = self._batch(announcement.index, announcement.round)
        selection = self._contents.selection(
            self._parts(contribution).of(contribution.update), announcement.round, announcement.index
        )
        if selection is not None:
            ids, epochs = ids[selection.kept], epochs[selection.kept]
        codec, level = self._of(announcement.index).codec, self._job.data.level
        change = self.cache.begin(codec, announcement.index, ids, level)
        contribution.taken = Taken(change, epochs, selection)

    def _parts(self, contribution: Contribution) -> Parts:
        announcement = contribution.announcement
        return self._contents.parts(announcement.update_bytes, announcement.sample_bytes, announcement.round)

    def validate(self, contribution: Contribution) -> None:
        """Decode the samples; raises `PayloadError` unless they, the probe and the refinement can be."""
        taken, parts = _taken(contribution), self._parts(contribution)
        update = contribution.update
        samples = parts.of(update).samples(taken.selection)
        if taken.change.need:
            taken.change.complete(self._of(contribution.announcement.index).codec, samples)
        elif len(samples):
            raise PayloadError(f"{len(samples)} bytes of samples, of which nothing was asked for", Reason.SIZE)
        if not np.isfinite(parts.of(update).probe).all():
            raise PayloadError("the probe holds NaN or infinity", Reason.NON_FINITE)
        if self._refinement is not None:
            self._refinement.validate(Encoded.from_bytes(parts.of(update).refinement), self._coordinates)

    def has_samples(self, index: int, stated: bytes) -> None:
        """A worker had said which samples it has."""
        if not self.knows(index, stated):
            self.admit(index, self.read(index, stated, 0))

    def recover(self, contribution: Contribution) -> None:
        """Take it as it was taken when it came; raises `PayloadError` where the cache is not what it was."""
        self.look_up(contribution)
        self.validate(contribution)

    @property
    def _coordinates(self) -> int:
        return self._model.layout.coordinates

    # A round.

    def _computed(self, contributions: Sequence[Contribution]) -> Iterator[tuple[Contribution, Computed]]:
        """The gradient at each contribution's samples; it holds until the next."""
        began, self._gradient_seconds = time.perf_counter(), 0.0
        computed = self._trainers.compute(self._model, map(self._batch_of, contributions))
        for contribution, found in zip(contributions, computed, strict=True):
            self._gradient_seconds += time.perf_counter() - began
            yield contribution, found
            began = time.perf_counter()

    def _batch_of(self, contribution: Contribution) -> Batch:
        announcement, taken = contribution.announcement, _taken(contribution)
        change = taken.change
        features, labels = change.samples(self._of(announcement.index).codec)
        keys = augmentation_keys(self._job.seed, taken.epochs, change.ids[change.where])
        weights = None if taken.selection is None else torch.from_numpy(taken.selection.weights).float()
        return Batch(announcement.round, announcement.index, features, labels, keys, weights)

    def decodes_alone(self, role: Role) -> bool:
        """No: gradients are computed when the round is closed, one after the other."""
        return False

    def senders(self, contributions: Sequence[Contribution]) -> list[Sender]:
        """The vector of each contribution, in float32."""
        return [self._sender(*computed) for computed in self._computed(contributions)]

    def _sender(self, contribution: Contribution, computed: Computed) -> Sender:
        announcement = contribution.announcement
        address = address_of(self._job.seed, announcement)
        vector = computed.gradient.clone()
        self._refine(contribution, vector, 1.0)
        encoded = self._plain.encode(vector, address)
        return Sender(Role.SOURCE, self._plain, encoded, address, float(announcement.samples))

    def _refine(self, contribution: Contribution, into: torch.Tensor, weight: float) -> None:
        if self._refinement is None:
            return
        encoded = Encoded.from_bytes(self._parts(contribution).of(contribution.update).refinement)
        address = address_of(self._job.seed, contribution.announcement)
        self._refinement.accumulate(encoded, address, into, weight, (0, len(into)))

    def disagreeing(self, contributions: Sequence[Contribution]) -> Mapping[int, PayloadError]:
        """Who computes another gradient at the same samples, by what it sent of it: beyond `data.probe_limit`."""
        probed = [c for c in contributions if self._contents.is_probed(c.announcement.round)]
        if not probed:
            return {}
        found = {c.announcement.index: self._compared(c, computed) for c, computed in self._computed(probed)}
        self._agreement = max(found.values(), key=lambda agreed: agreed.relative_error)
        limit = self._job.data.probe_limit
        return {
            index: PayloadError(
                f"its gradient differs from the server's at the same samples by {agreed.relative_error:.3g} (cosine "
                f"{agreed.cosine:.6f}); data.probe_limit = {limit:g}",
                Reason.DISAGREEMENT,
            )
            for index, agreed in found.items()
            if not agreed.relative_error <= limit
        }

    def _compared(self, contribution: Contribution, computed: Computed) -> Agreement:
        announcement = contribution.announcement
        places = self._contents.probed(announcement.round, announcement.index)
        theirs = self._parts(contribution).of(contribution.update).probe
        return agreement(torch.from_numpy(theirs.copy()), computed.gradient[torch.from_numpy(places)])

    def sum(
        self, contributions: Sequence[Contribution], rule: AggregationConfig, into: torch.Tensor, pool: Executor | None
    ) -> Sum:
        """Write the update by the job's rule into `into`; raises as `aggregate`.

        Means add one worker's gradient after the other; other rules hold all of them in memory.
        """
        buffers, announcements, senders = [], [], []
        means = rule.name in ("mean", "weighted_mean")
        weights = [float(c.announcement.samples) if rule.name == "weighted_mean" else 1.0 for c in contributions]
        total = sum(weights)
        into.zero_()
        for weight, (contribution, computed) in zip(weights, self._computed(contributions), strict=True):
            if means:
                accumulate_float32(computed.gradient.numpy(), into.numpy(), np.float32(weight / total))
                self._refine(contribution, into, weight / total)
            else:
                senders.append(self._sender(contribution, computed))
            buffers.append(computed.buffers)
            loss = contribution.announcement.loss if self._refinement is not None else computed.loss
            announcements.append(replace(contribution.announcement, loss=loss))
        report, chosen = DecodeReport(), tuple(range(len(contributions)))
        if not means:
            report, chosen = aggregate(senders, into, rule, pool=pool)
        return Sum(report, chosen, buffers, announcements)

    def entered(self, contributions: Sequence[Contribution]) -> SampleReport:
        """The round is applied: its samples enter the cache."""
        try:
            for contribution in contributions:
                self.cache.commit(_taken(contribution).change)
        except OSError as error:
            log.error("the sample cache cannot be written, and is emptied: %s", error.strerror)
            self.cache.wipe()
        after = contributions[0].announcement.round + 1
        for index in self._shards:
            self._batch(index, after)  # the order of a new epoch is found here, not where everybody waits for it
        held = np.concatenate([_taken(contribution).change.need.held for contribution in contributions])
        new, whole = int((held == NOTHING).sum()), int((held == self._job.data.level).sum())
        return SampleReport(
            new, len(held) - new - whole, whole, self._gradient_seconds, len(self.cache), self.cache.nbytes,
            self._agreement,
        )  # fmt: skip


def _taken(contribution: Contribution) -> Taken:
    taken = contribution.taken
    if taken is None:  # while it is checked another content may take its place
        raise PayloadError("this contribution is forgotten")
    return taken
