"""The dither stream, version 1 (design, contract 1): pseudo-random numbers that are addressed, never drawn.

Any coordinate's value follows from its `Address` alone, so both ends of a link compute the same dither, and a retry, a
restart or another chunking cannot put them out of step. Every random choice of a run comes from here, under its own
`Domain`. Generator: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

import enum
import operator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditherps.errors import OptionError
from ditherps.kernels.philox import TILE, Stream, fill_lanes, lanes_random

__all__ = [
    "MAX_COORDINATES",
    "SERVER",
    "TILE",
    "Address",
    "Domain",
    "dither",
    "lanes",
    "lanes_at",
    "permutation",
    "uniforms",
    "words",
    "words_at",
]

SERVER: int = 0xFFFFFFFF
"""The server's place in `Address.sender`."""

MAX_COORDINATES: int = TILE << 23
"""Coordinates that one (round, sender, domain, attempt) addresses: what the 32-bit counter word c0 holds."""


class Domain(enum.IntEnum):
    """What a dither is used for; two uses never share one, so they never share a number.

    ============  =========================================  ====================  ==================================
    domain        used for                                   `round` holds         `sender` holds
    ============  =========================================  ====================  ==================================
    UPDATE        quantizing a worker's update               round                 worker index
    DOWNLINK      quantizing what the server sends           round                 SERVER
    SAMPLE        quantizing a data sample                   sample id             worker index
    ROTATION      signs of a randomised rotation             round                 worker index, SERVER if shared
    COORDINATES   choice of coordinates (Rand-K)             round                 worker index, SERVER if shared
    IMPORTANCE    coins of the importance layer              round                 worker index
    STRATA        permutation of stratified dithers          round                 SERVER
    SPLIT         split of the data over workers             0                     SERVER
    ORDER         order of a worker's samples                epoch                 worker index
    AUGMENTATION  augmentation, indexed by global sample id  epoch                 SERVER
    COMPUTE       seed of torch (dropout) for a round        round                 worker index
    INVITATION    choice of a round's workers, by index      round                 SERVER
    PROBE         coordinates by which gradients are probed  round                 worker index
    ============  =========================================  ====================  ==================================
    """

    UPDATE = 1
    DOWNLINK = 2
    SAMPLE = 3
    ROTATION = 4
    COORDINATES = 5
    IMPORTANCE = 6
    STRATA = 7
    SPLIT = 8
    ORDER = 9
    AUGMENTATION = 10
    COMPUTE = 11
    INVITATION = 12
    PROBE = 13


def _checked(field: str, value: object, bits: int) -> int:
    """The integer `value`, or OptionError naming `field` where it is none or does not fit in `bits` bits."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if not 0 <= number < 1 << bits:
        raise OptionError(f"address.{field}", value, f"an integer from 0 to 2^{bits} - 1")
    return number


@dataclass(frozen=True, slots=True)
class Address:
    """Where a vector's dither lies: its coordinate 0 has flat coordinate `start`.

    Attributes:
        seed: the job's, 64 bits.
        round: 32 bits; a sample id or an epoch in some domains (see `Domain`).
        sender: the worker's index, 32 bits, or `SERVER`.
        domain: what the dither is for.
        attempt: 24 bits; 0 unless a reopened round changed what is encoded.
        start: flat coordinate in the model's layout, below `MAX_COORDINATES` = 2^35.

    Raises:
        OptionError: a field does not fit; the error names it.
    """

    seed: int
    round: int
    sender: int
    domain: Domain
    attempt: int = 0
    start: int = 0

    def __post_init__(self) -> None:
        for field, bits in (("seed", 64), ("round", 32), ("sender", 32), ("attempt", 24), ("start", 35)):
            object.__setattr__(self, field, _checked(field, getattr(self, field), bits))
        try:
            object.__setattr__(self, "domain", Domain(self.domain))
        except ValueError:
            raise OptionError("address.domain", self.domain, [d.name for d in Domain]) from None

    def stream(self, count: int) -> Stream:
        """What the kernels take, for coordinates `start .. start + count`; OptionError where these end beyond 2^35."""
        if count < 0 or self.start + count > MAX_COORDINATES:
            raise OptionError("address.start + count", self.start + count, f"0 to {MAX_COORDINATES} coordinates")
        return (
            self.seed & 0xFFFFFFFF,
            self.seed >> 32,
            self.round,
            self.sender,
            int(self.domain) << 24 | self.attempt,
            self.start,
        )


def lanes(address: Address, count: int) -> NDArray[np.uint16]:
    """The 16-bit lanes of flat coordinates `start .. start + count`: uint16[count]."""
    stream = address.stream(count)
    out = np.empty(count, np.uint16)
    fill_lanes(stream, 0, count, out, np.empty(TILE, np.uint16), np.empty(0, np.float32), 0)
    return out


def lanes_at(address: Address, positions: ArrayLike) -> NDArray[np.uint16]:
    """Random access: `lanes_at(a, p)[i] == lanes(a, n)[p[i]]` for every n > p[i].

    Args:
        address: coordinate p of the result's numbering is flat coordinate `start + p`.
        positions: non-negative integers of any shape.

    Returns:
        uint16 of the shape of `positions`.

    Raises:
        OptionError: a position is negative or ends beyond 2^35.
    """
    index = np.asarray(positions)
    if index.size and not np.issubdtype(index.dtype, np.integer):
        raise OptionError("positions", index.dtype, "integers")
    if index.size and int(index.min()) < 0:
        raise OptionError("positions", int(index.min()), "non-negative integers")
    stream = address.stream(int(index.max()) + 1 if index.size else 0)
    flat = np.ascontiguousarray(index, np.int64).reshape(-1)
    out = np.empty(flat.size, np.uint16)
    lanes_random(stream, flat, out)
    return out.reshape(index.shape)


def dither(address: Address, count: int) -> NDArray[np.float32]:
    """The dither u = (lane + 1/2) / 65536 - 1/2, in units of the step: float32[count] in (-1/2, 1/2), exact."""
    return (lanes(address, count).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-16) - np.float32(0.5)


def words(address: Address, count: int) -> NDArray[np.uint64]:
    """64-bit words: word i holds the lanes of coordinates `start + 4i .. start + 4i + 3`, the first in its low bits."""
    return lanes(address, 4 * count).astype("<u2", copy=False).view("<u8").astype(np.uint64, copy=False)


def words_at(address: Address, indices: ArrayLike) -> NDArray[np.uint64]:
    """Random access to `words`: uint64 of the shape of `indices`. Raises OptionError as `lanes_at` does."""
    index = np.asarray(indices, np.int64)
    four = lanes_at(address, index[..., None] * 4 + np.arange(4))
    return np.ascontiguousarray(four).astype("<u2", copy=False).view("<u8").astype(np.uint64, copy=False)[..., 0]


def permutation(address: Address, n: int) -> NDArray[np.int64]:
    """A uniform permutation of 0 .. n-1: the stable argsort of `words(address, n)`. O(n log n)."""
    return np.argsort(words(address, n), kind="stable").astype(np.int64, copy=False)


def uniforms(address: Address, count: int) -> NDArray[np.float64]:
    """Uniform numbers (word >> 12 + 1/2) * 2^-52: float64[count], strictly inside (0, 1), mean exactly 1/2."""
    return ((words(address, count) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
