"""The encoded steps of w that the server keeps, and the cheapest way for a worker to the newest w."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ditherps.codecs import Encoded


@dataclass(frozen=True, slots=True)
class Step:
    """The step of w from `version` to the next: w <- w + rate * decoded."""

    version: int
    encoded: Encoded
    rate: float
    digest: bytes
    """XXH3-128 of w, then the buffers, at `version`."""

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return self.encoded.nbytes


class StepHistory:
    """The newest steps, without a gap, at most `most_steps` of them and `most_bytes` of payload.

    What was read stays as it was while another thread adds: a newer state takes the older one's place as a whole.
    """

    def __init__(self, most_steps: int, most_bytes: int) -> None:
        self._most_steps, self._most_bytes = most_steps, most_bytes
        self._steps: tuple[Step, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of payload that are kept."""
        return sum(step.nbytes for step in self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: Step) -> None:
        """Keep a step, and forget the oldest that have no room beside it."""
        steps = [*self._steps, step] if not self._steps or step.version == self._steps[-1].version + 1 else [step]
        first, room = len(steps), self._most_bytes
        while first > max(0, len(steps) - self._most_steps) and steps[first - 1].nbytes <= room:
            first -= 1
            room -= steps[first].nbytes
        self._steps = tuple(steps[first:])

    def between(self, first: int, last: int) -> Sequence[Step] | None:
        """The steps from version `first` to version `last`; None where one of them is not here."""
        steps = self._steps
        if first == last:
            return ()
        if first > last or not steps or first < steps[0].version or last > steps[-1].version + 1:
            return None
        return steps[first - steps[0].version : last - steps[0].version]

    def digest_at(self, version: int) -> bytes | None:
        """The digest of w and the buffers at a version whose step is here."""
        steps = self.between(version, version + 1)
        return steps[0].digest if steps else None


@dataclass(frozen=True, slots=True)
class Way:
    """How to bring a worker to the newest version: perhaps a snapshot of version `first`, then the steps since."""

    first: int
    snapshot: bool
    steps: Sequence[Step]


def cheapest(
    history: StepHistory, held: int | None, newest: int, snapshots: Sequence[tuple[int, int]], step_overhead_bytes: int
) -> Way:
    """The way of fewest bytes; steps alone where it is equal.

    Args:
        history: what steps there are.
        held: the version that the worker holds, None if none.
        newest: the version that it is to reach.
        snapshots: version and bytes of each snapshot that can be sent; one must be of the newest version.
        step_overhead_bytes: what travels with each step beside its payload.
    """
    ways = []
    if held is not None and (steps := history.between(held, newest)) is not None:
        ways.append((_nbytes(steps, step_overhead_bytes), Way(held, False, steps)))
    for version, nbytes in snapshots:
        if (steps := history.between(version, newest)) is not None:
            ways.append((nbytes + _nbytes(steps, step_overhead_bytes), Way(version, True, steps)))
    return min(ways, key=lambda way: way[0])[1]


def _nbytes(steps: Sequence[Step], overhead: int) -> int:
    return sum(step.nbytes + overhead for step in steps)
