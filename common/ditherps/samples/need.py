"""What a server lacks of a round's samples, said in few bytes: the level that it holds of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditherps.errors import OptionError, PayloadError, Reason
from ditherps.samples.codec import NOTHING
from ditherps.sampling import Ids


def distinct(ids: Ids) -> tuple[Ids, NDArray[np.int64]]:
    """The ids of a batch once each, ascending, and where each sample of the batch stands among them.

    A batch that spans two epochs, or is larger than its shard, has samples twice; they travel once.
    """
    found, where = np.unique(ids, return_inverse=True)
    return found, where.astype(np.int64)


@dataclass(frozen=True, eq=False)
class Need:
    """Levels that a server holds of samples, whose ids both ends know.

    Attributes:
        held: (n,) int64, `NOTHING` to `level`.
        level: that is asked for.
    """

    held: NDArray[np.int64]
    level: int

    def __post_init__(self) -> None:
        if self.held.size and not NOTHING <= self.held.min() <= self.held.max() <= self.level:
            raise OptionError("held", self.held.tolist(), f"levels from {NOTHING} to {self.level}")

    @property
    def lacking(self) -> NDArray[np.bool_]:
        """(n,): which samples lack something."""
        return self.held < self.level

    def __bool__(self) -> bool:
        return bool(self.lacking.any())

    def to_bytes(self) -> bytes:
        """Nothing where nothing lacks, level + 1 as one byte where it is the same for all, else as few bits each."""
        if not self:
            return b""
        stated = self.held - NOTHING
        if (stated == stated[0]).all():
            return bytes([int(stated[0])])
        bits = stated[:, None] >> np.arange(self._width) & 1
        return b"\xff" + np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, count: int, level: int) -> Need:
        """Read what `to_bytes` wrote of `count` samples.

        Raises:
            PayloadError: it did not write this.
        """
        if not data:
            return cls(np.full(count, level, np.int64), level)
        if len(data) == 1:
            if count == 0 or not 0 <= data[0] <= level:
                raise PayloadError(f"a need of {count} samples says {data!r}")
            return cls(np.full(count, data[0] + NOTHING, np.int64), level)
        width = cls(np.empty(0, np.int64), level)._width
        if data[0] != 0xFF or len(data) != 1 + (count * width + 7) // 8:
            raise PayloadError(f"a need of {count} samples cannot take {len(data)} bytes", Reason.SIZE)
        bits = np.unpackbits(np.frombuffer(data, np.uint8, offset=1), bitorder="little")
        stated = (bits[: count * width].reshape(count, width).astype(np.int64) << np.arange(width)).sum(1)
        if bits[count * width :].any() or stated.max() > level - NOTHING:
            raise PayloadError("a need names levels that there are not")
        return cls(stated + NOTHING, level)

    @property
    def _width(self) -> int:
        """Bits of a level."""
        return (self.level - NOTHING).bit_length()
