"""Slow readable reference of the dither stream and the fixed-width codecs, in numpy and Python integers.

Written from the contracts (design.md, proto/FORMAT.md), not from the kernels: every backend must match it bit for bit.
It shares nothing with them but the choice of a packing's group and field size.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditherps.dither import Address
from ditherps.kernels.packing import packing

_TILE = 4096
_MASK = np.uint64(0xFFFFFFFF)


def philox(
    counter: tuple[NDArray[np.uint64], ...], key: tuple[int, int]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    """Philox4x32-10: four counter words (arrays of equal shape, values below 2^32) to four output words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0 = c0 * np.uint64(0xD2511F53)
        p1 = c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & _MASK,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & _MASK,
        )
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def place(address: Address, coordinates: NDArray[np.int64]) -> tuple[tuple[NDArray[np.uint64], ...], NDArray[np.int64]]:
    """Counter (four words) and lane (0 .. 7) of coordinates, counted from the address's start (contract 1)."""
    flat = address.start + coordinates
    tile, offset = flat // _TILE, flat % _TILE
    shape = flat.shape
    counter = (
        (tile * 512 + offset % 512).astype(np.uint64),
        np.full(shape, address.round, np.uint64),
        np.full(shape, address.sender, np.uint64),
        np.full(shape, int(address.domain) << 24 | address.attempt, np.uint64),
    )
    return counter, offset // 512


def lanes_at(address: Address, coordinates: NDArray[np.int64]) -> NDArray[np.uint16]:
    """The 16-bit lanes of coordinates, counted from the address's start."""
    counter, lane = place(address, coordinates)
    words = np.stack(philox(counter, (address.seed & 0xFFFFFFFF, address.seed >> 32)))
    word = np.take_along_axis(words, (lane // 2)[None], 0)[0]
    out: NDArray[np.uint16] = (word >> (16 * (lane % 2)).astype(np.uint64)).astype(np.uint16)
    return out


def dither_at(address: Address, coordinates: NDArray[np.int64]) -> NDArray[np.float64]:
    """u of coordinates, exact."""
    return (lanes_at(address, coordinates) + 0.5) / 65536 - 0.5


def pack(digits: NDArray[np.int64], base: int) -> bytes:
    """Digits below `base` as fields of binary fractions (proto/FORMAT.md, "Packing")."""
    form = packing(base)
    f = -(-digits.size // form.group)
    columns = np.zeros((form.group, f), object)
    columns.reshape(-1)[: digits.size] = [int(d) for d in digits]
    if form.bits == 16:
        fields = list(columns[0])
    else:
        values = columns[0]
        for column in columns[1:]:
            values = values * base + column
        fields = [-(-(int(v) << form.bits) // base**form.group) for v in values]
    if form.bits == 7:
        m = -(-f // 8)
        fields += [0] * (8 * m - f)
        return bytes(fields[c * m + j] << 1 | (fields[7 * m + j] >> c & 1) for c in range(7) for j in range(m))
    return bytes(field >> (8 * plane) & 0xFF for plane in range(form.bits // 8) for field in fields)


@dataclass(frozen=True)
class Scheme:
    """The options that decide about bytes; `ratio` None is the plain scheme. `bucket` 0 is the whole vector."""

    levels: float
    rms: bool = False
    resolution: float = 1.0
    bucket: int = _TILE
    ratio: int | None = None
    alpha: float = 1.0


def step_of(x: NDArray[np.float32], scheme: Scheme) -> np.float32:
    """The step of one bucket, rounded up to float32."""
    if not np.any(x):
        return np.float32(0)
    if scheme.rms:
        sums = [0.0] * 64
        for i, value in enumerate(x.astype(np.float64)):
            sums[i % 64] += value * value
        while len(sums) > 1:
            half = len(sums) // 2
            sums = [sums[i] + sums[i + half] for i in range(half)]
        exact = math.sqrt(sums[0] / x.size) * scheme.resolution
    else:
        exact = float(np.max(np.abs(x))) / scheme.levels
    exact = max(exact, 2.0**-100)
    step = np.float32(exact)
    return step if float(step) >= exact else np.nextafter(step, np.float32(np.inf))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode(x: NDArray[np.float32], address: Address, scheme: Scheme) -> tuple[bytes, bytes]:
    """The sections behind the header: (steps and tiles, exceptions)."""
    bucket = scheme.bucket or max(x.size, 1)
    steps = [step_of(x[lo : lo + bucket], scheme) for lo in range(0, x.size, bucket)]
    m, top = scheme.levels, round(2 * scheme.levels)
    off = math.floor(m)
    tiles, exceptions, last = b"", b"", -1
    for lo in range(0, x.size, _TILE):
        digits: list[int] = []
        fine: list[int] = []
        lanes = lanes_at(address, np.arange(lo, min(lo + _TILE, x.size)))
        for i, lane in enumerate(lanes.tolist(), start=lo):
            step = steps[i // bucket]
            if step == 0:
                continue
            u = (lane + 0.5) / 65536 - 0.5
            if scheme.ratio is not None:
                index = math.floor(scheme.alpha * float(x[i]) / float(step) + (u + 0.5 + (m - off)))
                fine.append(index)
                digits.append(index % scheme.ratio)
                continue
            exact = math.floor(float(x[i]) / float(step) + (u + 0.5 + m))
            if top <= 126:
                bound = np.float32(m * 65536)
                scaled = min(max(x[i] * np.float32(65536 / float(step)), -bound), bound)
                digits.append((int(scaled + np.float32(m * 65536 + 0.5)) + lane) >> 16)
            else:
                digits.append(min(max(exact, 0), top))
            if scheme.rms and not 0 <= exact <= top and abs(float(x[i])) >= float(np.float32(m * float(step))):
                q = exact - off
                raw = abs(q) > 0x7FFFFFFF or (abs(q) + 2) * float(step) > float(np.finfo(np.float32).max)
                exceptions += _varint((i - last - 1) << 1 | raw)
                exceptions += x[i].tobytes() if raw else _varint(2 * q if q >= 0 else -2 * q - 1)
                last = i
        if digits:
            tiles += pack(np.array(digits), scheme.ratio or top + 1)
            if scheme.ratio is not None:
                tiles += zlib.crc32(np.array(fine, np.int64).astype("<i2").tobytes()).to_bytes(4, "little")
    return np.array(steps, "<f4").tobytes() + tiles, exceptions


def reconstruct(digit: float, u: float, levels: float, step: np.float32) -> np.float32:
    """float32 of (d - M - u) * step."""
    return np.float32((digit - levels - u) * float(step))
