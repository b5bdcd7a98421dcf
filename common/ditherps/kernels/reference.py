"""Slow readable reference of the dither stream and the fixed-width codecs, in numpy and Python integers.

Written from the contracts (design.md, proto/FORMAT.md), not from the kernels: every backend must match it bit for bit.
It shares nothing with them but the choice of a packing's group and field size (`packing`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
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
    if base > 256:
        return pack(digits % 256, 256) + pack(digits // 256, -(-base // 256))
    form = packing(base)
    f = -(-digits.size // form.group)
    columns = np.zeros((form.group, f), object)
    columns.reshape(-1)[: digits.size] = [int(d) for d in digits]
    values = columns[0]
    for column in columns[1:]:
        values = values * base + column
    fields = [-(-(int(v) << form.bits) // base**form.group) for v in values]
    if form.bits == 7:
        m = -(-f // 8)
        fields += [0] * (8 * m - f)
        return bytes(fields[c * m + j] << 1 | (fields[7 * m + j] >> c & 1) for c in range(7) for j in range(m))
    return bytes(field >> (8 * plane) & 0xFF for plane in range(form.bits // 8) for field in fields)


def packed_nbytes(count: int, base: int) -> int:
    """Bytes of `count` digits."""
    return len(pack(np.zeros(count, np.int64), base))


def unpack(data: bytes, count: int, base: int) -> list[int]:
    """The inverse of `pack`, for any bytes of the right number."""
    if base > 256:
        low = unpack(data[:count], count, 256)
        high = unpack(data[count:], count, -(-base // 256))
        return [min(a + 256 * b, base - 1) for a, b in zip(low, high, strict=True)]
    form = packing(base)
    f = -(-count // form.group)
    if form.bits == 7:
        m = -(-f // 8)
        last = [sum((data[c * m + j] & 1) << c for c in range(7)) for j in range(m)]
        fields = [*(byte >> 1 for byte in data), *last][:f]
    else:
        fields = [sum(data[plane * f + j] << (8 * plane) for plane in range(form.bits // 8)) for j in range(f)]
    columns = []
    for _ in range(form.group):
        columns += [field * base >> form.bits for field in fields]
        fields = [field * base & ((1 << form.bits) - 1) for field in fields]
    return columns[:count]


@dataclass(frozen=True)
class Scheme:
    """The options that decide about bytes of fixed width.

    Attributes:
        levels: M.
        rule: "max", "l2" or "rms"; with `step`, of no meaning.
        resolution: of the rms rule.
        bucket: coordinates that share a step, 0 for all.
        escapes: whether digits outside the alphabet are sent beside it.
        subtract: whether the dither is subtracted.
        ratio: k of the nested scheme, None for the plain one.
        alpha: of the nested scheme.
        step: of all coordinates, where it is given.
    """

    levels: float
    rule: str = "max"
    resolution: float = 1.0
    bucket: int = _TILE
    escapes: bool = False
    subtract: bool = True
    ratio: int | None = None
    alpha: float = 1.0
    step: np.float32 | None = None

    @property
    def top(self) -> int:
        """2M, the last digit of an index inside the alphabet."""
        return round(2 * self.levels)

    @property
    def alphabet(self) -> int:
        """How many digits there are."""
        return self.ratio or self.top + 1 + self.escapes


def step_of(x: NDArray[np.float32], scheme: Scheme) -> np.float32:
    """The step of one bucket, rounded up to float32."""
    if not np.any(x):
        return np.float32(0)
    if scheme.step is not None:
        return scheme.step
    sums = [0.0] * 64
    for i, value in enumerate(x.astype(np.float64)):
        sums[i % 64] += value * value
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [sums[i] + sums[i + half] for i in range(half)]
    exact = {
        "max": float(np.max(np.abs(x))) / scheme.levels,
        "l2": math.sqrt(sums[0]) / scheme.levels,
        "rms": math.sqrt(sums[0] / x.size) * scheme.resolution,
    }[scheme.rule]
    exact = max(exact, 2.0**-100)
    step = np.float32(exact)
    return step if float(step) >= exact else np.nextafter(step, np.float32(np.inf))


def digit_of(x: np.float32, step: np.float32, lane: int, scheme: Scheme) -> tuple[int, int]:
    """(digit, distance): inside the alphabet the distance is 0, else how far below (negative) or above it is.

    The digit is that of this project's encoder, which computes x / step in single precision where indices are small.
    Outside, the distance is from double precision, and at least 1 where the two disagree.
    """
    exact = math.floor(float(x) / float(step) + ((lane + 0.5) / 65536 + scheme.levels))
    digit = exact
    if scheme.top <= 126:
        offset = np.float32((scheme.levels + scheme.escapes) * 65536)
        scaled = min(max(x * np.float32(65536 / float(step)), -offset), offset)
        digit = ((int(scaled + (offset + np.float32(0.5))) + lane) >> 16) - scheme.escapes
    if 0 <= digit <= scheme.top:
        return digit, 0
    if not scheme.escapes:
        return min(max(digit, 0), scheme.top), 0
    return scheme.top + 1, max(exact - scheme.top, 1) if exact > scheme.levels else min(exact, -1)


def _nibbles(number: int) -> list[int]:
    """A number in groups of three bits, lowest first; the fourth bit says that more follow."""
    out = []
    while number >= 8:
        out.append(number & 7 | 8)
        number >>= 3
    return [*out, number]


def escape_nibbles(x: np.float32, distance: int) -> list[int]:
    """What is written for a coordinate whose digit lies `distance` outside the alphabet."""
    if abs(distance) > 2**31 - 2:
        bits = int(x.view(np.uint32))
        return [0, *(bits >> (4 * group) & 15 for group in range(8))]
    return _nibbles(1 + 2 * (abs(distance) - 1) + (distance > 0))


def encode(x: NDArray[np.float32], address: Address, scheme: Scheme) -> tuple[bytes, int]:
    """All sections behind the header, and the bytes of the last one, the escapes."""
    bucket = scheme.bucket or max(x.size, 1)
    steps = [step_of(x[lo : lo + bucket], scheme) for lo in range(0, x.size, bucket)]
    sizes: list[int] = []
    tiles, escapes = b"", b""
    for lo in range(0, x.size, _TILE):
        digits: list[int] = []
        fine: list[int] = []
        nibbles: list[int] = []
        lanes = lanes_at(address, np.arange(lo, min(lo + _TILE, x.size)))
        for i, lane in enumerate(lanes.tolist(), start=lo):
            step = steps[i // bucket]
            if step == 0:
                continue
            if scheme.ratio is not None:
                shift = scheme.levels % 1
                index = math.floor(scheme.alpha * float(x[i]) / float(step) + ((lane + 0.5) / 65536 + shift))
                fine.append(index)
                digits.append(index % scheme.ratio)
                continue
            digit, distance = digit_of(x[i], step, lane, scheme)
            digits.append(digit)
            if distance:
                nibbles += escape_nibbles(x[i], distance)
        if digits:
            tiles += pack(np.array(digits), scheme.alphabet)
        if fine:
            tiles += zlib.crc32(np.array(fine, np.int64).astype("<i2").tobytes()).to_bytes(4, "little")
        if len(nibbles) % 2:
            nibbles.append(0)
        sizes.append(len(nibbles) // 2)
        escapes += bytes(a | b << 4 for a, b in zip(nibbles[::2], nibbles[1::2], strict=True))
    front = np.array(steps, "<f4").tobytes() + (np.array(sizes, "<u2").tobytes() if scheme.escapes else b"")
    return front + tiles + escapes, len(escapes)


def _number(nibbles: Iterator[int]) -> int:
    number = 0
    for group in range(11):
        nibble = next(nibbles, 0)
        number |= (nibble & 7) << (3 * group)
        if nibble < 8:
            break
    return number


def decode(body: bytes, n: int, address: Address, scheme: Scheme) -> NDArray[np.float32]:
    """The vector of a plain payload's sections behind the header."""
    bucket = scheme.bucket or max(n, 1)
    at = 4 * -(-n // bucket)
    steps = np.frombuffer(body[:at], "<f4")
    count = -(-n // _TILE) if scheme.escapes else 0
    sizes = np.frombuffer(body[at : at + 2 * count], "<u2").tolist()
    at += 2 * count
    escapes_at = len(body) - sum(sizes)
    out = np.zeros(n, np.float32)
    for lo in range(0, n, _TILE):
        places = [i for i in range(lo, min(lo + _TILE, n)) if steps[i // bucket] > 0]
        size = packed_nbytes(len(places), scheme.alphabet) if places else 0
        digits = unpack(body[at : at + size], len(places), scheme.alphabet) if places else []
        at += size
        end = escapes_at + (sizes[lo // _TILE] if scheme.escapes else 0)
        nibbles = (byte >> shift & 15 for byte in body[escapes_at:end] for shift in (0, 4))
        escapes_at = end
        us = dither_at(address, np.array(places, np.int64)) if scheme.subtract else np.zeros(len(places))
        for i, digit, u in zip(places, digits, us.tolist(), strict=True):
            step = steps[i // bucket]
            if digit == scheme.top + 1:
                number = _number(nibbles)
                if number == 0:
                    raw = sum(next(nibbles, 0) << (4 * group) for group in range(8))
                    out[i] = np.uint32(raw).view(np.float32)
                    continue
                distance = (number - 1) // 2 + 1
                digit = scheme.top + distance if (number - 1) % 2 else -distance
            out[i] = reconstruct(digit, u, scheme.levels, step)
    return out


def reconstruct(digit: float, u: float, levels: float, step: np.float32) -> np.float32:
    """float32 of (d - M - u) * step, cut at the largest float32; u = 0 where the dither is not subtracted."""
    largest = float(np.finfo(np.float32).max)
    return np.float32(min(max((digit - levels - u) * float(step), -largest), largest))
