"""Entropy-coded: steps, a directory, and chunks that each stand alone (proto/FORMAT.md, "Chunks")."""

from __future__ import annotations

import math
from concurrent.futures import Executor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditherps.codecs.base import HEADER, BadInput, Bytes, Encoded, Span, checksum
from ditherps.codecs.buckets import BucketLayout
from ditherps.codecs.steps import MAX_LEVELS, StepOptions
from ditherps.dither import Address
from ditherps.errors import PayloadError, Reason
from ditherps.kernels import cpu
from ditherps.kernels.alphabets import Alphabet, alphabet
from ditherps.kernels.chunk_decoder import accumulate_chunk, accumulate_packed, check_chunk
from ditherps.kernels.chunk_encoder import encode_chunk, gather_explicit, pack_chunk, prefers_explicit
from ditherps.kernels.coder import (
    CHUNK,
    CODED,
    EXPLICIT,
    HEAD,
    HEADROOM,
    MOST_BYTES,
    MOST_MODEL_BYTES,
    PACKED,
    PLAIN,
    coder,
)
from ditherps.kernels.jit import Int
from ditherps.kernels.philox import TILE, Stream
from ditherps.pool import on_threads

_LARGEST_STEP = cpu.LARGEST / HEADROOM


class Index(NamedTuple):
    """What decoding needs of a checked payload.

    Attributes:
        steps: of the buckets.
        offsets: where each chunk begins, and the last ends.
        exact: how many coordinates are decoded without an error: those of plain chunks and of tiles of zeros.
    """

    steps: NDArray[np.float32]
    offsets: NDArray[np.int64]
    exact: int


class CodedLayout(BucketLayout):
    """Header, steps, directory, chunks. The header's checksum covers the first three, the directory holds the chunks'.

    Attributes:
        chunk_coordinates: unit of spans, and of work for threads.
    """

    chunk_coordinates = CHUNK

    def __init__(self, options: StepOptions, *, subtract: bool, matched: bool = False) -> None:
        super().__init__(options, subtract=subtract, subtracts_dither=subtract and not matched)
        self._matched = matched

    def _front(self, coordinates: int) -> int:
        """Bytes before the chunks."""
        return HEADER.size + 4 * self.buckets(coordinates) + 8 * -(-coordinates // CHUNK)

    def max_nbytes(self, coordinates: int) -> int:
        """What the finest steps could take: a symbol, its low bits and its escape for every coordinate."""
        chunks = -(-coordinates // CHUNK)
        return self._front(coordinates) + (HEAD + MOST_MODEL_BYTES) * chunks + MOST_BYTES * coordinates

    def encode(
        self, x: NDArray[np.float32], address: Address, step: float | None, pool: Executor | None
    ) -> tuple[Bytes, int, int | None]:
        """As `FixedLayout.encode`; chunks are encoded on the threads of `pool`, to the same bytes."""
        n = x.size
        steps = self._steps(x, pool) if step is None else np.full(self.buckets(n), step, np.float32)
        stream, bucket = address.stream(n), self._bucket(n)

        def sealed(lo: int) -> tuple[Bytes, int]:
            chunk = self._chunk(x, lo, min(lo + CHUNK, n), stream, bucket, steps)
            return chunk, checksum(chunk)

        chunks = on_threads(pool, sealed, range(0, n, CHUNK))
        front = self._front(n)
        data = np.empty(front + sum(chunk.size for chunk, _ in chunks), np.uint8)
        self.steps(data, n)[:] = steps
        directory = data[front - 8 * len(chunks) : front].view(np.uint32)
        at = front
        for place, (chunk, check) in enumerate(chunks):
            directory[2 * place : 2 * place + 2] = chunk.size, check
            data[at : at + chunk.size] = chunk
            at += chunk.size
        return data, 0, front

    def _steps(self, x: NDArray[np.float32], pool: Executor | None) -> NDArray[np.float32]:
        """The step of each bucket; a bucket of several chunks is summed chunk by chunk, in their order."""
        bits, bucket = x.view(np.int32), self._bucket(x.size)
        rule, factor = self._options.step, self._options.factor
        unit = min(bucket, CHUNK) if bucket < CHUNK or bucket % CHUNK == 0 or bucket >= x.size else TILE

        def measure(lo: int) -> tuple[int, float]:
            hi = min(lo + unit, x.size)
            if rule == "max":
                return int(cpu.largest_bits(bits, lo, hi)), 0.0
            # In double precision no square of a float32 vanishes or overflows: they tell zeros and what is not finite.
            squares = float(cpu.sum_of_squares(x, lo, hi, cpu.workspace().sums))
            return int(squares > 0) if math.isfinite(squares) else cpu.INFINITY_BITS, squares

        parts = on_threads(pool, measure, range(0, x.size, unit))
        steps = np.empty(self.buckets(x.size), np.float32)
        per_bucket = -(-bucket // unit)
        for place in range(steps.size):
            mine = parts[place * per_bucket : (place + 1) * per_bucket]
            lo, hi = place * bucket, min((place + 1) * bucket, x.size)
            largest = max(part[0] for part in mine)
            if largest >= cpu.INFINITY_BITS:
                raise BadInput(lo, hi, "not finite")
            squares = 0.0
            for part in mine:  # not sum(): some Pythons compensate its rounding
                squares += part[1]
            if rule == "max":
                exact = float(np.array(largest, np.int32).view(np.float32)) / factor
            elif rule == "l2":
                exact = math.sqrt(squares) / factor
            else:
                exact = math.sqrt(squares / (hi - lo)) * factor
            steps[place] = cpu.rounded_up(exact, HEADROOM) if largest else 0.0
            if steps[place] < 0:
                raise BadInput(lo, hi, "too large: its reconstruction could overflow float32")
        return steps

    def _chunk(
        self, x: NDArray[np.float32], lo: int, hi: int, stream: Stream, bucket: int, steps: NDArray[np.float32]
    ) -> Bytes:
        """The bytes of one chunk, in the form that takes the fewest."""
        work = coder()
        out, where = work.out, (x, lo, hi, stream, bucket, steps, self._subtract)
        plan: tuple[bool, Int, Int] = False, 0, 0
        size = int(encode_chunk(*where, *plan, work, out))
        if size < 0:  # an index beyond 32 bits; that must not depend on the dither, since these values stay as they are
            values = np.zeros(HEAD + 4 * (hi - lo), np.uint8)
            values[3] = PLAIN
            values[HEAD:] = x[lo:hi].view(np.uint8)
            return values
        reach = int(work.reach[0])
        if self._matched:  # its values depend on the models, and so these may not depend on the dither
            return out[:size].copy()
        plan = prefers_explicit(x, lo, hi, bucket, steps, self._subtract, work)
        if plan[0] and gather_explicit(*where, *plan[1:], work):
            other = np.empty_like(out)
            found = int(encode_chunk(*where, *plan, work, other))
            if found < size:
                out, size = other, found
        if 0 < reach <= MAX_LEVELS:
            form = alphabet(2 * reach + 1)
            if _packed_nbytes(form, hi - lo) < size:
                size = int(pack_chunk(*where[:6], form, reach, work, cpu.workspace(), out))
        return out[:size].copy()

    def sealed_bytes(self, encoded: Encoded) -> int:
        """Header, steps and directory, or what there is of them."""
        return min(self._front(encoded.coordinates), encoded.nbytes)

    def exact_coordinates(self, encoded: Encoded) -> int:
        """Coordinates of plain chunks and of tiles of zeros."""
        return (encoded.index[1] if encoded.index else self.index(encoded)).exact

    def index(self, encoded: Encoded) -> Index:
        """Check the directory and every chunk; raises PayloadError."""
        n, size = encoded.coordinates, encoded.nbytes
        front = self._front(n)
        if front > size or encoded.header.tail_bytes:
            raise PayloadError(f"payload of {size} bytes has no room for the directory of its chunks", Reason.SIZE)
        steps = self.steps(encoded.data, n)
        if not np.all((steps == 0) | ((steps >= cpu.SMALLEST_STEP) & (steps <= _LARGEST_STEP))):
            raise PayloadError("payload holds a step that is negative, not finite or out of range", Reason.NON_FINITE)
        directory = encoded.data[HEADER.size + 4 * steps.size : front].view(np.uint32).reshape(-1, 2)
        offsets = front + np.concatenate((np.zeros(1, np.int64), np.cumsum(directory[:, 0], dtype=np.int64)))
        if offsets[-1] != size:
            raise PayloadError(f"payload has {size} bytes, its directory announces {offsets[-1]}", Reason.SIZE)
        exact = 0
        for place, (begin, end) in enumerate(pairwise(offsets.tolist())):
            chunk = encoded.data[begin:end]
            if checksum(chunk) != directory[place, 1]:
                raise PayloadError(f"chunk {place} does not match its checksum", Reason.DIGEST_MISMATCH)
            found = _exact_coordinates(chunk, min(CHUNK, n - place * CHUNK))
            if found < 0:
                raise PayloadError(f"chunk {place} is malformed")
            exact += found
        return Index(steps, offsets, exact)

    def accumulate(
        self,
        encoded: Encoded,
        index: Index,
        address: Address,
        into: NDArray[np.float32],
        weight: np.float32,
        span: Span,
        side: NDArray[np.float32] | None,
    ) -> int:
        """into += weight * decoded; no tile has a check that could fail."""
        n = encoded.coordinates
        stream, bucket, work = address.stream(n), self._bucket(n), coder()
        for lo in range(span[0], span[1], CHUNK):
            place = lo // CHUNK
            chunk = encoded.data[index.offsets[place] : index.offsets[place + 1]]
            target = into[lo - span[0] : min(lo + CHUNK, span[1]) - span[0]]
            form = int(chunk[3])
            if form in (CODED, EXPLICIT):
                accumulate_chunk(
                    chunk, lo, stream, bucket, index.steps, self._subtract, self._matched, work, target, weight
                )
            elif form == PACKED:
                reach = int(chunk[:2].view(np.uint16)[0])
                accumulate_packed(
                    chunk, lo, stream, bucket, index.steps, self._subtract, alphabet(2 * reach + 1), reach, work,
                    cpu.workspace(), target, weight,
                )  # fmt: skip
            else:
                cpu.accumulate_float32(chunk[HEAD:].copy().view(np.float32), target, weight)
        return 0


def _packed_nbytes(form: Alphabet, count: int) -> int:
    whole, rest = divmod(count, TILE)
    return HEAD + whole * form.nbytes(TILE) + (form.nbytes(rest) if rest else 0)


def _exact_coordinates(chunk: Bytes, count: int) -> int:
    """How many of a chunk's coordinates are decoded without an error; -1 where it is not whole, or not finite."""
    if chunk.size < HEAD:
        return -1
    form = int(chunk[3])
    if form in (CODED, EXPLICIT):
        return int(check_chunk(chunk, count, coder()))
    if form == PACKED:
        reach = int(chunk[0]) | int(chunk[1]) << 8
        rest = int(chunk[2]) or chunk[4:HEAD].any()
        whole = 0 < reach <= MAX_LEVELS and not rest and chunk.size == _packed_nbytes(alphabet(2 * reach + 1), count)
        return 0 if whole else -1
    if form == PLAIN and chunk.size == HEAD + 4 * count and not chunk[:3].any() and not chunk[4:HEAD].any():
        finite = cpu.largest_bits(chunk[HEAD:].copy().view(np.int32), 0, count) < cpu.INFINITY_BITS
        return count if finite else -1
    return -1
