"""Which samples a worker has, said once: then both ends know the ids of every round's batch, and none of them travels.

Ids are global rows of the dataset, as `ditherps.sampling` deals them, so that augmentation and order at the server are
those of the worker. The version tells whether these are still the same samples.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
import xxhash

from ditherps.errors import PayloadError, Reason, UserError
from ditherps.sampling import Ids
from ditherps.tasks import Samples

MOST_IDS: Final = 1 << 32
MOST_UNDECLARED: Final = 1 << 22
"""Of a worker whose task does not say how many samples there are: a few bits of a message each, but 8 bytes here."""
VERSION_BYTES: Final = 16

_HEAD: Final = struct.Struct("<IBI")  # ids, Rice parameter, bits of the first part


def version(samples: Samples, shard: Ids) -> bytes:
    """16 bytes of what a worker has: XXH3-128 of its ids, labels and stored features."""
    state = xxhash.xxh3_128(shard.astype("<i8").tobytes())
    state.update(samples.labels[shard].numpy().tobytes())
    for row in shard.tolist():  # one by one: no copy of the shard
        state.update(np.ascontiguousarray(samples.features[row].numpy()).data)
    return state.digest()


def stated(samples: Samples, shard: Ids) -> bytes:
    """What a worker says of its samples: `version`, then the ids (`pack`). Raises `UserError` as `pack`."""
    return version(samples, shard) + pack(shard)


def read(data: bytes, samples: int) -> tuple[bytes, Ids]:
    """Version and ids of what `stated` wrote; `samples`: how many the task has, 0: not known.

    Raises:
        PayloadError: it did not write this, there are no ids, or one is out of range.
    """
    ids = unpack(data[VERSION_BYTES:], samples or MOST_UNDECLARED)
    if len(ids) == 0:
        raise PayloadError("a shard without samples", Reason.SIZE)
    if samples and ids[-1] >= samples:
        raise PayloadError(f"a shard with sample {ids[-1]}; the task has {samples}", Reason.SIZE)
    return data[:VERSION_BYTES], ids


def pack(shard: Ids) -> bytes:
    """Ascending ids as the gaps between them, Rice-coded: about as many bits as there are choices.

    u32 ids, u8 parameter r, u32 bits of the first part; then, each in whole bytes and lowest bit first, gap >> r as
    zeros and a one for every id, and the r low bits of every gap. The gap of an id is its distance to the one before
    (-1 for the first), less one.

    Raises:
        UserError: ids that are not ascending, or beyond 32 bits.
    """
    ends = np.concatenate([np.full(1, -1, np.int64), shard])
    gaps: Ids = ends[1:] - ends[:-1] - 1
    if len(shard) and (gaps.min() < 0 or shard[-1] >= MOST_IDS):
        raise UserError("a shard's ids must ascend, and stay below 2^32")
    mean = float(gaps.mean()) if len(gaps) else 0.0
    candidates = range(max(int(np.log2(mean + 1)) - 1, 0), int(np.log2(mean + 1)) + 2)
    order = min(candidates, key=lambda r: int((gaps >> r).sum()) + r * len(gaps))
    lengths = np.cumsum((gaps >> order) + 1)
    zeros_and_ones = np.zeros(int(lengths[-1]) if len(lengths) else 0, np.uint8)
    zeros_and_ones[lengths - 1] = 1
    low = (gaps[:, None] >> np.arange(order) & 1).astype(np.uint8)
    parts = (np.packbits(bits, bitorder="little").tobytes() for bits in (zeros_and_ones, low.reshape(-1)))
    return _HEAD.pack(len(shard), order, len(zeros_and_ones)) + b"".join(parts)


def unpack(data: bytes, most: int = MOST_IDS) -> Ids:
    """Read what `pack` wrote of at most so many ids; memory in proportion to these and the data.

    Raises:
        PayloadError: it did not write this, or of more.
    """
    if len(data) < _HEAD.size:
        raise PayloadError(f"a shard of {len(data)} bytes has no head", Reason.SIZE)
    count, order, front = _HEAD.unpack_from(data)
    middle = _HEAD.size + (front + 7) // 8
    if order > 32 or count > front or len(data) != middle + (count * order + 7) // 8:
        raise PayloadError(f"a shard of {count} ids cannot take {len(data)} bytes", Reason.SIZE)
    if count > most:
        raise PayloadError(f"a shard of {count} ids; at most {most} are possible", Reason.SIZE)
    bits = np.frombuffer(data, np.uint8)
    first = np.unpackbits(bits[_HEAD.size : middle], bitorder="little")
    second = np.unpackbits(bits[middle:], bitorder="little")
    ends = np.flatnonzero(first)
    whole = len(ends) == count and (front == 0 if count == 0 else int(ends[-1]) == front - 1)
    if not whole or second[count * order :].any():
        raise PayloadError("a shard's bits are not those of so many ids")
    gaps = np.diff(ends, prepend=-1).astype(np.int64) - 1
    for low in second[: count * order].reshape(count, order).T[::-1]:
        gaps = (gaps << 1) + low
    if gaps.astype(np.float64).sum() + count > MOST_IDS:
        raise PayloadError("a shard has ids beyond 32 bits")
    return np.cumsum(gaps + 1) - 1
