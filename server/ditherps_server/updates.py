"""What a contribution's update is, by the job's mode: how it is checked, and how a round's become one.

Here: an encoded vector, in the modes `gradient` and `local`. Samples: `ditherps_server.sampled`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

import torch

from ditherps.codecs import Codec, DecodeReport, Encoded, Role
from ditherps.config import AggregationConfig, JobConfig
from ditherps.dither import Address, Domain
from ditherps.errors import PayloadError, Reason
from ditherps.layout import Layout
from ditherps.samples.agreement import Agreement
from ditherps_server.aggregate import Sender, aggregate
from ditherps_server.staging import Announcement, Contribution


@dataclass(frozen=True, slots=True)
class Sum:
    """A round's contributions as one.

    Attributes:
        report: of the nested decoding.
        chosen: places among the contributions of those that are in it.
        buffers: the model's buffers of each contribution.
        announcements: of each contribution, with what the server found out itself.
    """

    report: DecodeReport
    chosen: tuple[int, ...]
    buffers: Sequence[bytes | memoryview]
    announcements: Sequence[Announcement]


@dataclass(frozen=True, slots=True)
class SampleReport:
    """What a round's samples were, in mode `data`.

    Attributes:
        new: of which nothing was held.
        finer: of which something was held, but not all that was asked for.
        held: of which nothing had to be sent.
        gradient_seconds: what all gradients of the round took.
        cached: samples that are kept now, and
        cached_bytes: what they take of the budget.
        agreement: of the last probe, the worst of its round; None before the first.
    """

    new: int
    finer: int
    held: int
    gradient_seconds: float
    cached: int
    cached_bytes: int
    agreement: Agreement | None


class Updates(Protocol):
    """A mode's contributions. What `look_up` takes from elsewhere is fixed as long as the round is open."""

    buffer_bytes: int
    """Of each contribution, behind its update."""

    def largest_bytes(self, role: Role) -> int:
        """Most bytes that an update of this role can take."""
        ...

    def check_sizes(self, announcement: Announcement) -> None:
        """Raises `PayloadError` unless an update can have these sizes."""
        ...

    def look_up(self, contribution: Contribution) -> None:
        """Take what else belongs to a contribution that has arrived; raises `PayloadError`."""
        ...

    def validate(self, contribution: Contribution) -> None:
        """Raises `PayloadError` unless the update can be decoded; from then on it can be."""
        ...

    def recover(self, contribution: Contribution) -> None:
        """Both again, for one that had been validated by a server before this one; raises `PayloadError`."""
        ...

    def decodes_alone(self, role: Role) -> bool:
        """Whether a contribution in this role has a vector before the round is closed."""
        ...

    def senders(self, contributions: Sequence[Contribution]) -> list[Sender]:
        """The vector of each contribution."""
        ...

    def disagreeing(self, contributions: Sequence[Contribution]) -> Mapping[int, PayloadError]:
        """Whose contributions may not enter, by index, and why."""
        ...

    def sum(
        self, contributions: Sequence[Contribution], rule: AggregationConfig, into: torch.Tensor, pool: Executor | None
    ) -> Sum:
        """Write the update by the job's rule into `into`; raises as `ditherps_server.aggregate.aggregate`."""
        ...

    def entered(self, contributions: Sequence[Contribution]) -> SampleReport | None:
        """The round is applied."""
        ...

    def has_samples(self, index: int, stated: bytes) -> None:
        """A worker had said which samples it has; raises `PayloadError`."""
        ...

    @property
    def aside_bytes(self) -> int:
        """What a contribution takes in memory beside its content."""
        ...


class EncodedUpdates:
    """Updates that a codec has encoded."""

    def __init__(self, job: JobConfig, codec: Codec, layout: Layout) -> None:
        self.buffer_bytes = layout.buffer_bytes
        self._seed, self._coordinates = job.seed, layout.coordinates
        self._codecs = {role: codec.for_role(role) for role in codec.roles}
        self._running_side = getattr(codec.options, "side", "sources") == "running"

    def largest_bytes(self, role: Role) -> int:
        """Most bytes that an update of this role can take."""
        return self._codecs[role].max_nbytes(self._coordinates)

    def check_sizes(self, announcement: Announcement) -> None:
        """Raises `PayloadError` for an update of no bytes, or with samples."""
        if announcement.update_bytes == 0 or announcement.sample_bytes:
            raise PayloadError(
                f"an update of {announcement.update_bytes} bytes, {announcement.sample_bytes} of samples", Reason.SIZE
            )

    def look_up(self, contribution: Contribution) -> None:
        """Nothing else belongs to it."""

    def validate(self, contribution: Contribution) -> None:
        """Raises `PayloadError` unless the update can be decoded to finite values."""
        codec = self._codecs[contribution.announcement.role]
        codec.validate(Encoded.from_bytes(contribution.update), self._coordinates)

    def recover(self, contribution: Contribution) -> None:
        """Nothing: its content is all there is of it."""

    def decodes_alone(self, role: Role) -> bool:
        """Whether it needs no side information."""
        return not self._codecs[role].needs_side_information

    def senders(self, contributions: Sequence[Contribution]) -> list[Sender]:
        """The vector of each contribution."""
        return [self._sender(contribution) for contribution in contributions]

    def _sender(self, contribution: Contribution) -> Sender:
        announcement = contribution.announcement
        return Sender(
            announcement.role,
            self._codecs[announcement.role],
            Encoded.from_bytes(contribution.update),
            address_of(self._seed, announcement),
            float(announcement.samples),
        )

    def disagreeing(self, contributions: Sequence[Contribution]) -> Mapping[int, PayloadError]:
        """Nobody's: nothing is computed twice."""
        return {}

    def sum(
        self, contributions: Sequence[Contribution], rule: AggregationConfig, into: torch.Tensor, pool: Executor | None
    ) -> Sum:
        """Write the update by the job's rule into `into`; raises as `aggregate`."""
        report, chosen = aggregate(
            self.senders(contributions), into, rule, running_side=self._running_side, pool=pool
        )  # fmt: skip
        buffers = [contribution.buffers for contribution in contributions]
        return Sum(report, chosen, buffers, [contribution.announcement for contribution in contributions])

    def entered(self, contributions: Sequence[Contribution]) -> None:
        """Nothing is kept of them."""

    def has_samples(self, index: int, stated: bytes) -> None:
        """Raises `PayloadError`: no samples are asked for."""
        raise PayloadError("which samples a worker has is asked for in mode data only")

    @property
    def aside_bytes(self) -> int:
        """Nothing."""
        return 0


def address_of(seed: int, announcement: Announcement) -> Address:
    """The dither's address of a contribution's update."""
    return Address(
        seed=seed, round=announcement.round, sender=announcement.index, domain=Domain.UPDATE,
        attempt=announcement.attempt,
    )  # fmt: skip
