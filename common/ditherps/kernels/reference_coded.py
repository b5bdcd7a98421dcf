"""Slow readable reference of entropy-coded payloads (`coder = rans`), in numpy and Python integers.

Written from proto/FORMAT.md, not from the kernels: what it shares with them is the shipped table, and the choice of a
packing's group and field size. The decoder reads every form of chunk. The encoder writes a chunk in a form and with
models that are handed to it, because how these are chosen is an encoder's own affair: `read_chunk` finds a chunk's.
"""

from __future__ import annotations

import functools
import math
import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from ditherps.dither import Address
from ditherps.kernels.reference import lanes_at, pack, packed_nbytes, unpack

CHUNK = 262144
_TILE = 4096
_HEADER = 32
_TOTAL = 4096  # slots
_PLACES = 256
_SHORTEST = 8192  # coordinates of a chunk with more than one state
_LOWEST_STATE = 1 << 15
_REACH = (65, 57, 49, 42, 37, 31, 26, 20)
_ZERO_TILE = 8
_TAILS = np.load(Path(__file__).parents[1] / "entropy" / "family.npy").astype(np.int64)

OWN, PACKED, PLAIN, EXPLICIT = range(4)  # forms


class Parameters(NamedTuple):
    """What form 0 sends of a tile."""

    scale: int
    shape: int
    spike: int


@dataclass(frozen=True)
class Model:
    """How the symbols of a tile are coded.

    Attributes:
        class_bits: there are 2^class_bits tables.
        low_bits: of an index, sent beside its symbol.
        places: G[0 .. 256].
        bottom: B: symbols at places up to it, and those that mirror them, are escaped.
        offsets: o of "Matched reconstruction" for the 64 values of a lane's upper six bits, or None.
    """

    class_bits: int
    low_bits: int
    places: list[int]
    bottom: int
    offsets: NDArray[np.int64] | None = None

    def interval(self, lane: int, symbol: int) -> tuple[int, int]:
        """Start and frequency of a symbol h, or (0, 1), the escape."""
        classes = 1 << self.class_bits
        half = 128 // classes
        if abs(symbol) < half:
            place = classes * (symbol + half) - (lane >> (16 - self.class_bits))
            start, end = self.places[place], self.places[min(place + classes, _PLACES)]
            top = max((256 if self.low_bits else 257) - classes - self.bottom, 129)
            if self.bottom < place < top and end > start:
                return start, end - start
        return 0, 1


@dataclass(frozen=True)
class Chunk:
    """What stands in a chunk beside its coordinates.

    Attributes:
        form: 0 .. 3.
        models: of each tile, None for one of zeros; empty in forms 1 and 2.
        parameters: of each tile in form 0; shape 8 for one of zeros.
        escapes: how many coordinates are escaped.
        indices: q of each coordinate, 0 in tiles of zeros; none in form 2.
    """

    form: int
    models: list[Model | None]
    parameters: list[Parameters]
    escapes: int
    indices: NDArray[np.int64]


# Numbers


def _bits_of(data: bytes) -> Iterator[int]:
    for byte in data:
        for place in range(8):
            yield byte >> place & 1


def _fixed(bits: Iterator[int], count: int) -> int:
    return sum(next(bits) << place for place in range(count))


def _exp_golomb(bits: Iterator[int], order: int) -> int:
    zeros = 0
    while not next(bits):
        zeros += 1
    r = 1 << zeros | _fixed(bits, zeros)
    return (r - 1) << order | _fixed(bits, order)


def _put(value: int, count: int) -> list[int]:
    return [value >> place & 1 for place in range(count)]


def _put_exp_golomb(value: int, order: int) -> list[int]:
    r = (value >> order) + 1
    w = r.bit_length() - 1
    return [0] * w + [1] + _put(r, w) + _put(value, order)


def _to_bytes(bits: list[int]) -> bytes:
    bits = bits + [0] * (-len(bits) % 8)
    return bytes(sum(bit << place for place, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8))


def fold(value: int) -> int:
    """0, -1, 1, -2, 2 ... to 0, 1, 2, 3, 4 ..."""
    return 2 * value if value >= 0 else -2 * value - 1


def unfold(number: int) -> int:
    """The inverse of `fold`."""
    return -(number + 1) // 2 if number % 2 else number // 2


def nibbles(number: int) -> list[int]:
    """Groups of three bits, lowest first; the highest bit of each says that more follow."""
    out = [number & 7]
    while number := number >> 3:
        out[-1] |= 8
        out.append(number & 7)
    return out


# Models


def tail(shape: int, z: NDArray[np.int64]) -> NDArray[np.int64]:
    """t(z): 2^31 P(Z > z), z in units of 2^-20."""
    w = np.minimum(z, 1 << 26) + (1 << 17)
    exponent = np.frexp(w.astype(np.float64))[1] - 1  # the double is exact
    mantissa = (w << (52 - exponent)) & ((1 << 52) - 1)
    line = 32 * (exponent - 17) + (mantissa >> 47)
    table = _TAILS[shape]
    p = mantissa >> 31 & 0xFFFF
    out: NDArray[np.int64] = table[line] - ((table[line] - table[line + 1]) * p >> 16)
    return out


def zeros_share(spike: int) -> int:
    """P, in 2^-16."""
    return 2048 * spike if spike < 32 else 65536 - math.isqrt(1 << (53 - spike))


@functools.cache
def _unit(scale: int) -> tuple[int, int]:
    """e and U: a step is 2^-e U 2^-32 mean magnitudes."""
    e, twelfths = divmod(scale - 96, 12)
    low, high = 1 << 31, (1 << 32) + 1  # by bisection, since a power of floats would be rounded
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**12 <= 1 << (32 * 12 - twelfths) else (low, middle)
    return e, low


def bits_of(parameters: Parameters, subtract: bool) -> tuple[int, int]:
    """Class bits and low bits."""
    r = parameters.scale - 96 + _REACH[parameters.shape]
    if subtract and r <= 58:
        return 4 - sum(r > border for border in (22, 34, 46)), 0
    return 0, min(max(-(-(r - 78) // 12), 0), 12)


def lower_tails(parameters: Parameters, subtract: bool) -> NDArray[np.int64]:
    """t at the places 0 .. 128, without the spike."""
    class_bits, low_bits = bits_of(parameters, subtract)
    e, unit = _unit(parameters.scale)
    shift = 13 + e + class_bits
    s = 128 - np.arange(129)
    if subtract or low_bits:
        return tail(parameters.shape, ((s << (low_bits + 1)) + (not low_bits)) * unit >> shift)
    m = np.arange(16)
    tails = tail(parameters.shape, (32 * s[:, None] + 2 * m + 1) * unit >> (shift + 4))
    mean: NDArray[np.int64] = tails.sum(axis=1) >> 4
    return mean


@functools.cache
def own_model(parameters: Parameters, subtract: bool) -> Model:
    """The model of a tile of form 0."""
    class_bits, low_bits = bits_of(parameters, subtract)
    classes = 1 << class_bits
    share = 65536 - zeros_share(parameters.spike)
    lower = 1 + ((lower_tails(parameters, subtract) * share * 4095 + (1 << 46)) >> 47)
    places = [1, *lower[1:].tolist()] + [0] * 128
    bottom = max((b for b in range(classes, 129 - classes) if places[b] == places[b + classes]), default=classes - 1)
    for j in range(min(bottom + classes, 128) + 1):
        places[j] = 1
    for j in range(128) if low_bits else range(1, 129):
        places[(256 if low_bits else 257) - j] = 4097 - places[j]
    return Model(class_bits, low_bits, places, bottom, matched_offsets(parameters, class_bits))


def matched_offsets(parameters: Parameters, class_bits: int) -> NDArray[np.int64] | None:
    """o[0 .. 63], or None where the dither is subtracted."""
    if class_bits == 0 or (class_bits < 3 and parameters.spike == 0):
        return None
    odd = 2 * np.arange(32) + 1
    if class_bits < 3:
        mean = odd << 24
    else:
        e, unit = _unit(parameters.scale)
        centre = (2 * np.arange(1, 128 >> class_bits)[:, None] - 1) * 64
        near = tail(parameters.shape, (centre - odd) * unit >> (19 + e))
        far = tail(parameters.shape, (centre + odd) * unit >> (19 + e))
        mean = (near - far).sum(axis=0)
    upper = (mean * (65536 - zeros_share(parameters.spike)) + (1 << 29)) >> 30
    return np.concatenate((-upper[::-1], upper))


def explicit_model(class_bits: int, low_bits: int, slots: list[int]) -> Model:
    """The model of form 3 with these slots of the 256 cells."""
    return Model(class_bits, low_bits, np.cumsum([1, *slots]).tolist(), (1 << class_bits) - 1)


def _read_parameters(bits: Iterator[int], tiles: int) -> list[Parameters]:
    out, last = [], Parameters(0, 0, 0)
    for _ in range(tiles):
        last = Parameters(*(before + unfold(_exp_golomb(bits, 0)) for before in last))
        out.append(last)
    return out


def _put_parameters(parameters: list[Parameters]) -> list[int]:
    bits: list[int] = []
    last = Parameters(0, 0, 0)
    for new in parameters:
        if new.shape == _ZERO_TILE:
            new = last._replace(shape=_ZERO_TILE)
        for before, value in zip(last, new, strict=True):
            bits += _put_exp_golomb(fold(value - before), 0)
        last = new
    return bits


def _read_explicit(bits: Iterator[int], tiles: int) -> list[Model | None]:
    class_bits, low_bits, order = _fixed(bits, 3), _fixed(bits, 4), _fixed(bits, 4)
    first, last = _fixed(bits, 8), _fixed(bits, 8)
    slots = [0] * _PLACES
    for cell in range(first, last + 1):
        slots[cell] = _exp_golomb(bits, order)
    if sum(slots) != _TOTAL - 1 or first < 1 << class_bits:
        raise ValueError("slots do not sum to 4095, or lie below the classes")
    model = explicit_model(class_bits, low_bits, slots)
    return [None if _fixed(bits, 1) else model for _ in range(tiles)]


def _put_explicit(models: list[Model | None]) -> list[int]:
    model = next(model for model in models if model is not None)
    slots = np.diff(model.places)
    used = np.flatnonzero(slots)
    first, last = int(used[0]), int(used[-1])
    orders = [[bit for n in slots[first : last + 1] for bit in _put_exp_golomb(int(n), k)] for k in range(10)]
    order = min(range(10), key=lambda k: len(orders[k]))
    bits = _put(model.class_bits, 3) + _put(model.low_bits, 4) + _put(order, 4) + _put(first, 8) + _put(last, 8)
    return bits + orders[order] + [int(model is None) for model in models]


# Coding


class _Decoder:
    """States and words of a chunk."""

    def __init__(self, states: tuple[int, ...], words: tuple[int, ...]) -> None:
        self.states, self.words, self.read = list(states), words, 0

    def pop(self, state: int, start: int, frequency: int) -> None:
        x = self.states[state]
        x = frequency * (x >> 12) + x % _TOTAL - start
        if x < _LOWEST_STATE:
            x = x << 16 | self.words[self.read]
            self.read += 1
        self.states[state] = x

    def symbols(self, model: Model, lanes: list[int]) -> list[int | None]:
        """h of each coordinate of a tile, None where it is escaped."""
        classes = 1 << model.class_bits
        half = 128 // classes
        starts = [[model.places[classes * (h + half) - c] for h in range(1 - half, half)] for c in range(classes)]
        out: list[int | None] = []
        for i, lane in enumerate(lanes):
            state = i % len(self.states)
            slot = self.states[state] % _TOTAL
            if slot == 0:
                out.append(None)
                self.pop(state, 0, 1)
                continue
            h = bisect_right(starts[lane >> (16 - model.class_bits)], slot) - half
            start, frequency = model.interval(lane, h)
            if not 0 < start <= slot < start + frequency:
                raise ValueError(f"slot {slot} has no symbol")
            out.append(h)
            self.pop(state, start, frequency)
        return out

    def low(self, count: int, bits: int) -> list[int]:
        """The low bits of the coordinates of a tile."""
        out = []
        for i in range(count):
            state = i % len(self.states)
            value = self.states[state] % _TOTAL >> (12 - bits)
            out.append(value)
            self.pop(state, value << (12 - bits), 1 << (12 - bits))
        return out


class _Escapes:
    """The numbers behind the words."""

    def __init__(self, data: bytes) -> None:
        self.nibbles = [half for byte in data for half in (byte & 15, byte >> 4)]
        self.read = 0

    def number(self) -> int:
        value = shift = 0
        while True:
            nibble = self.nibbles[self.read]
            self.read += 1
            value |= (nibble & 7) << shift
            shift += 3
            if nibble < 8:
                return value

    def end_tile(self) -> None:
        self.read += self.read % 2


def read_chunk(data: bytes, lanes: list[int], subtract: bool) -> Chunk:
    """A chunk of forms 0, 1 and 3: its models and its indices, by the lanes of its coordinates.

    Raises:
        ValueError, IndexError, StopIteration: it is not well formed.
    """
    size, states, form, words = struct.unpack_from("<HBBI", data)
    count = len(lanes)
    tiles = -(-count // _TILE)
    if form == PLAIN:
        return Chunk(form, [], [], 0, np.empty(0, np.int64))
    if form == PACKED:
        digits: list[int] = []
        at = 8
        for lo in range(0, count, _TILE):
            n = min(_TILE, count - lo)
            taken = packed_nbytes(n, 2 * size + 1)
            digits += unpack(data[at : at + taken], n, 2 * size + 1)
            at += taken
        if at != len(data) or states or words:
            raise ValueError("wrong length, or states or words that are not 0")
        return Chunk(form, [], [], 0, np.array(digits, np.int64) - size)
    bits = _bits_of(data[8 : 8 + size])
    parameters: list[Parameters] = []
    models: list[Model | None]
    if form == OWN:
        parameters = _read_parameters(bits, tiles)
        models = [None if p.shape == _ZERO_TILE else own_model(p, subtract) for p in parameters]
    else:
        models = _read_explicit(bits, tiles)
    if any(bits):
        raise ValueError("bits behind the models")
    at = 8 + size
    if states != _states(models, count):
        raise ValueError("wrong number of states")
    decoder = _Decoder(
        struct.unpack_from(f"<{states}I", data, at), struct.unpack_from(f"<{words}H", data, at + 4 * states)
    )
    escapes = _Escapes(data[at + 4 * states + 2 * words :])
    indices = np.zeros(count, np.int64)
    escaped = 0
    for tile, used in enumerate(models):
        if used is None:
            continue
        lo = tile * _TILE
        mine = lanes[lo : lo + _TILE]
        symbols = decoder.symbols(used, mine)
        low = decoder.low(len(mine), used.low_bits) if used.low_bits else [0] * len(mine)
        for i, h in enumerate(symbols):
            indices[lo + i] = unfold(escapes.number()) if h is None else (h << used.low_bits) + low[i]
        escaped += symbols.count(None)
        escapes.end_tile()
    if decoder.read != words or any(x != _LOWEST_STATE for x in decoder.states):
        raise ValueError("words are left, or states have not come to their end")
    if escapes.read != len(escapes.nibbles):
        raise ValueError("escapes are left")
    return Chunk(form, models, parameters, escaped, indices)


def _states(models: list[Model | None], count: int) -> int:
    if all(model is None for model in models):
        return 0
    return 16 if count >= _SHORTEST else 1


def encode_chunk(chunk: Chunk, x: NDArray[np.float32], indices: NDArray[np.int64], lanes: list[int]) -> bytes:
    """The chunk of these values and indices in the form and with the models of `chunk`."""
    if chunk.form == PLAIN:
        return struct.pack("<HBBI", 0, 0, PLAIN, 0) + x.astype("<f4").tobytes()
    if chunk.form == PACKED:
        reach = int(np.abs(indices).max())
        digits = indices + reach
        packed = [pack(digits[lo : lo + _TILE], 2 * reach + 1) for lo in range(0, digits.size, _TILE)]
        return struct.pack("<HBBI", reach, 0, PACKED, 0) + b"".join(packed)
    count = len(lanes)
    states = _states(chunk.models, count)
    intervals: list[tuple[int, int, int]] = []  # state, start, frequency in the order of decoding
    escapes = b""
    for tile, model in enumerate(chunk.models):
        if model is None:
            continue
        mine = indices[tile * _TILE : (tile + 1) * _TILE].tolist()
        half_bytes: list[int] = []
        for i, q in enumerate(mine):
            start, frequency = model.interval(lanes[tile * _TILE + i], q >> model.low_bits)
            intervals.append((i % states, start, frequency))
            if start == 0:
                half_bytes += nibbles(fold(q))
        if model.low_bits:
            shift = 12 - model.low_bits
            mask = (1 << model.low_bits) - 1
            intervals += [(i % states, (q & mask) << shift, 1 << shift) for i, q in enumerate(mine)]
        half_bytes += [0] * (len(half_bytes) % 2)
        escapes += bytes(low | high << 4 for low, high in zip(half_bytes[::2], half_bytes[1::2], strict=True))
    x_of, words = [_LOWEST_STATE] * states, []
    for state, start, frequency in reversed(intervals):
        value = x_of[state]
        if value >= frequency << 19:  # what decoding this symbol would bring to 2^31 or more
            words.append(value & 0xFFFF)
            value >>= 16
        x_of[state] = (value // frequency << 12) + value % frequency + start
    words.reverse()
    models = _to_bytes(_put_parameters(chunk.parameters) if chunk.form == OWN else _put_explicit(chunk.models))
    return (
        struct.pack("<HBBI", len(models), states, chunk.form, len(words))
        + models
        + struct.pack(f"<{states}I{len(words)}H", *x_of, *words)
        + escapes
    )


# Payloads


@dataclass(frozen=True)
class Scheme:
    """What of the options the coded sections depend on; `bucket` 0 is the whole vector."""

    bucket: int = 0
    subtract: bool = True
    matched: bool = False


@dataclass(frozen=True)
class Payload:
    """The sections behind the header, and where the chunks' coordinates lie."""

    steps: NDArray[np.float32]
    chunks: list[bytes]
    lanes: list[list[int]]

    def step_of(self, chunk: int, scheme: Scheme) -> NDArray[np.float64]:
        """The step of each coordinate of a chunk."""
        at = np.arange(chunk * CHUNK, chunk * CHUNK + len(self.lanes[chunk]))
        places = at // scheme.bucket if scheme.bucket else np.zeros_like(at)
        return self.steps[places].astype(np.float64)


def sections(payload: bytes, address: Address, scheme: Scheme) -> Payload:
    """The sections of a whole payload; ValueError where lengths or checksums are wrong."""
    (n,) = struct.unpack_from("<Q", payload, 20)
    buckets = -(-n // (scheme.bucket or max(n, 1)))
    count = -(-n // CHUNK)
    steps = np.frombuffer(payload, "<f4", buckets, _HEADER)
    directory = struct.unpack_from(f"<{2 * count}I", payload, _HEADER + 4 * buckets)
    at = [_HEADER + 4 * buckets + 8 * count]
    for size in directory[::2]:
        at.append(at[-1] + size)
    if at[-1] != len(payload):
        raise ValueError("the directory's sizes are not the payload's")
    chunks = [payload[begin:end] for begin, end in pairwise(at)]
    if any(_checksum(chunk) != check for chunk, check in zip(chunks, directory[1::2], strict=True)):
        raise ValueError("a chunk does not match its checksum")
    lanes = lanes_at(address, np.arange(n)).tolist()
    return Payload(steps, chunks, [lanes[lo : lo + CHUNK] for lo in range(0, n, CHUNK)])


def _checksum(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


def quantize(x: NDArray[np.float32], step: NDArray[np.float64], lanes: list[int], scheme: Scheme) -> NDArray[np.int64]:
    """q = floor(x / step + u + 1/2) as this project's encoder rounds it, 0 where the step is 0.

    It rounds x / step to a multiple of 2^-16 in float32, and computes in double precision where a tile, or a shorter
    bucket, has values of 2^14 steps.
    """
    out = np.zeros(x.size, np.int64)
    width = min(scheme.bucket or _TILE, _TILE)
    for lo in range(0, x.size, width):
        part = x[lo : lo + width]
        size = float(step[lo])
        lane = np.array(lanes[lo : lo + width], np.int64)
        if size == 0:
            continue
        bound = np.float32(1 << 30)
        scaled = np.clip(part * np.float32(65536 / size), -bound, bound)
        whole = (np.abs(scaled) + np.float32(0.5)).astype(np.int64)
        if whole.max() < 1 << 30:
            out[lo : lo + width] = (np.where(scaled < 0, -whole, whole) + lane) >> 16
        else:
            out[lo : lo + width] = np.floor(part.astype(np.float64) / size + (lane + 0.5) / 65536)
    return out


def values(chunk: Chunk, lanes: list[int], step: NDArray[np.float64], scheme: Scheme) -> NDArray[np.float32]:
    """The values of the indices of a chunk of forms 0, 1 and 3."""
    lane = np.array(lanes, np.int64)
    subtracted = (lane + 0.5) / 65536 - 0.5 if scheme.subtract else np.zeros(lane.size)
    for tile, model in enumerate(chunk.models):
        part = slice(tile * _TILE, (tile + 1) * _TILE)
        if model is None:
            subtracted[part] = 0  # the indices are 0 as well
        elif scheme.matched and model.offsets is not None:
            subtracted[part] = model.offsets[lane[part] >> 10] / 2.0**17
    return ((chunk.indices - subtracted) * step).astype(np.float32)


def decode(payload: bytes, address: Address, scheme: Scheme) -> NDArray[np.float32]:
    """The vector of a whole payload; its header is believed.

    Raises:
        ValueError, IndexError, StopIteration, struct.error: it is not well formed.
    """
    read = sections(payload, address, scheme)
    out = [np.empty(0, np.float32)]
    for place, (data, lanes) in enumerate(zip(read.chunks, read.lanes, strict=True)):
        chunk = read_chunk(data, lanes, scheme.subtract)
        if chunk.form == PLAIN:
            out.append(np.frombuffer(data, "<f4", len(lanes), 8))
        else:
            out.append(values(chunk, lanes, read.step_of(place, scheme), scheme))
    return np.concatenate(out) + np.float32(0)  # -0 to 0, as adding to a sum does


def encode(x: NDArray[np.float32], payload: bytes, address: Address, scheme: Scheme) -> bytes:
    """The sections behind the header for x, with the steps, forms and models of a payload."""
    read = sections(payload, address, scheme)
    chunks = []
    for place, (data, lanes) in enumerate(zip(read.chunks, read.lanes, strict=True)):
        part = x[place * CHUNK : (place + 1) * CHUNK]
        indices = quantize(part, read.step_of(place, scheme), lanes, scheme)
        chunks.append(encode_chunk(read_chunk(data, lanes, scheme.subtract), part, indices, lanes))
    directory = [number for chunk in chunks for number in (len(chunk), _checksum(chunk))]
    return read.steps.tobytes() + struct.pack(f"<{len(directory)}I", *directory) + b"".join(chunks)
