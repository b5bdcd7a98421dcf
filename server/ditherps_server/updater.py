"""A closed round's contributions -> the next version of the model."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from ditherps.codecs import DecodeReport, Role
from ditherps.config import AggregationConfig, JobConfig
from ditherps.errors import PayloadError, Reason, RefusedError
from ditherps.kernels.cpu import INFINITY_BITS, largest_bits
from ditherps.layout import unpack_buffers
from ditherps_server.aggregate import Sender, can_decode, merged_buffers, norms
from ditherps_server.broadcast import Broadcast, StepReport
from ditherps_server.model import ServerModel
from ditherps_server.optimizer import ServerOptimizer
from ditherps_server.staging import Announcement, Contribution
from ditherps_server.updates import SampleReport, Updates


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What applying a round's contributions took and found."""

    decode: DecodeReport
    decode_seconds: float
    learning_rate: float
    step: StepReport | None
    """Of w; None where it is x."""
    announcements: Sequence[Announcement]
    """Of the contributions, with what the server found out itself."""
    samples: SampleReport | None
    """In mode `data`."""


class Updater:
    """Decodes contributions, sums them, and steps the optimizer. Called from one thread at a time."""

    def __init__(
        self, model: ServerModel, job: JobConfig, updates: Updates, broadcast: Broadcast, pool: ThreadPoolExecutor
    ) -> None:
        self._model = model
        self._broadcast = broadcast
        self._job = job
        self._updates = updates
        self._pool = pool
        self.optimizer = ServerOptimizer(model.x, job.optimizer, job.schedule, job.rounds)
        self._update = torch.empty_like(model.x)

    def largest_update_bytes(self, role: Role) -> int:
        """Most bytes that an encoded update of this role can take."""
        return self._updates.largest_bytes(role)

    @property
    def aside_bytes(self) -> int:
        """What a contribution takes in memory beside its content."""
        return self._updates.aside_bytes

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers of each contribution."""
        return self._updates.buffer_bytes

    def check_sizes(self, announcement: Announcement) -> None:
        """Raises `PayloadError` unless a contribution can have the sizes that are announced."""
        largest = self.largest_update_bytes(announcement.role)
        if announcement.update_bytes > largest:
            raise PayloadError(
                f"an update of {announcement.update_bytes} bytes; at most {largest} are possible", Reason.SIZE
            )
        if announcement.buffer_bytes != self.buffer_bytes:
            raise PayloadError(f"buffers of {announcement.buffer_bytes} bytes, not {self.buffer_bytes}", Reason.SIZE)
        self._updates.check_sizes(announcement)

    def look_up(self, contribution: Contribution) -> None:
        """Take what belongs to a contribution that has arrived, before it is validated; raises `PayloadError`."""
        self._updates.look_up(contribution)

    def has_samples(self, index: int, stated: bytes) -> None:
        """A worker has said which samples it has, before what comes next; raises `PayloadError`."""
        self._updates.has_samples(index, stated)

    def recover(self, contribution: Contribution) -> None:
        """Take what belongs to a contribution that had been validated before; raises `PayloadError` if it is lost."""
        self._updates.recover(contribution)

    def validate(self, contribution: Contribution) -> None:
        """Raises `PayloadError` unless the content can be decoded to finite values of the model's layout.

        With `max_norm` the decoded norm is checked too (`norm`), but of nested contributions, which cannot be decoded
        alone: their steps bound it, but a hundred times too high to tell good from bad. `beyond_limit` checks these.
        """
        self._updates.validate(contribution)
        for spec, tensor in (
            zip(self._model.layout.buffers, unpack_buffers(self._model.layout, contribution.buffers), strict=True)
            if self.buffer_bytes
            else ()
        ):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise PayloadError(f"buffer {spec.name} holds NaN or infinity", Reason.NON_FINITE)
        if self._job.max_norm and self._updates.decodes_alone(contribution.announcement.role):
            senders = self._updates.senders([contribution])
            (norm,) = norms(senders, self._model.layout.coordinates, AggregationConfig(), None)
            if not norm <= self._job.max_norm:
                raise PayloadError(f"norm {norm:.4g} exceeds max_norm = {self._job.max_norm:g}", Reason.NORM)

    def unfit(self, contributions: Sequence[Contribution]) -> dict[int, PayloadError]:
        """Which contributions of a closed round may not enter it, by index, and why.

        Raises `RefusedError` as `apply`.
        """
        found = dict(self._updates.disagreeing(contributions))
        rest = [contribution for contribution in contributions if contribution.announcement.index not in found]
        for index, message in self._beyond_limit(rest).items():
            found[index] = PayloadError(message, Reason.NORM)
        return found

    def _beyond_limit(self, contributions: Sequence[Contribution]) -> dict[int, str]:
        """Whose norms are beyond `max_norm`, `max_norm_ratio`, by index, and how far.

        Sources are judged first, nested contributions by what the remaining sources make of them. Both are compared
        with the median norm of the sources. Raises `RefusedError` as `apply`.
        """
        if not self._job.max_norm and not (self._job.max_norm_ratio and len(contributions) > 1):
            return {}
        senders = self._updates.senders(contributions)
        sources = [sender for sender in senders if sender.role is Role.SOURCE]
        nested = [sender for sender in senders if sender.role is Role.NESTED]
        found = self._norms(sources, alone=True)
        limit, name = self._job.max_norm or math.inf, "max_norm"
        if self._job.max_norm_ratio and sources:
            median = statistics.median(found)
            if self._job.max_norm_ratio * median < limit:
                limit, name = self._job.max_norm_ratio * median, f"max_norm_ratio times the median of {median:.4g}"
        sound = [sender for sender, norm in zip(sources, found, strict=True) if norm <= limit]
        if nested and (sources == sound or can_decode([*sound, *nested], self._job.aggregation)):
            found += self._norms([*sound, *nested])[len(sound) :]
        else:
            nested = []  # too few sources are left to decode them with, and `apply` will say so
        return {
            sender.address.sender: f"norm {norm:.4g} exceeds {name} = {limit:.4g}"
            for sender, norm in zip([*sources, *nested], found, strict=True)
            if not norm <= limit
        }

    def _norms(self, senders: Sequence[Sender], *, alone: bool = False) -> list[float]:
        rule = AggregationConfig() if alone else self._job.aggregation
        return norms(senders, self._model.layout.coordinates, rule, self._pool)

    def apply(self, contributions: Sequence[Contribution]) -> UpdateReport:
        """Make the model's next version of contributions in the order of their index.

        The update is made by the job's aggregation rule. Raises `RefusedError` when they cannot be decoded
        (`no_side_information`), are too few for the rule (`quorum`), or their update is not finite (`non_finite`),
        `EncodingError` when the model has become infinite, NaN, or too large to be encoded.
        """
        began = time.perf_counter()
        rule = self._job.aggregation
        total = self._updates.sum(contributions, rule, self._update, self._pool)
        if largest_bits(self._update.numpy().view(np.int32), 0, len(self._update)) >= INFINITY_BITS:
            raise RefusedError(Reason.NON_FINITE, "the update of the contributions is not finite")
        decode_seconds = time.perf_counter() - began
        learning_rate = self.optimizer.learning_rate
        self.optimizer.apply(self._update)
        step = self._broadcast.step(self._update)
        weights = [float(contribution.announcement.samples) for contribution in contributions]
        self._model.advance(merged_buffers(self._model.layout, total.buffers, weights, rule, total.chosen))
        samples = self._updates.entered(contributions)
        return UpdateReport(total.report, decode_seconds, learning_rate, step, total.announcements, samples)
