"""`eden`: rotation, the quantizer of a Gaussian, and the one scale that makes it unbiased.

Vargaftik, Ben Basat, Portnoy, Mendelson, Ben-Itzhak, Mitzenmacher, "EDEN: Communication-efficient and robust
distributed mean estimation for federated learning", ICML 2022, arXiv 2108.08842. A block is rotated, each coordinate
goes to the nearest level c of the Lloyd-Max codebook of a Gaussian with the block's mean square, and the scale
S = ||x||^2 / <c, Rx> makes the part along x of what is decoded x itself; the rest vanishes in the mean over rotations.
As in the authors' code the rotation is a randomized Hadamard transform, not a uniform one, and that mean is not quite
right: at one bit a coordinate with a share e of its block's square comes out too large by about e / 3 of itself.

Fractional bits as published: between integers each coordinate takes the codebook above or below, by shared randomness;
below one bit a random part of the coordinates travels, at one bit and scaled up. Other than there, the numbers of both
are fixed (there they are binomial), so that all lengths follow from the options; and a vector is rotated in blocks,
each with its own scale, and never padded.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ditherps.codecs.base import HEADER, Bytes, Codec, Context, Encoded, Options, Span
from ditherps.codecs.rotation import DEFAULT_BLOCK, Block, check_rotatable, signs_of
from ditherps.dither import Address, Domain
from ditherps.errors import PayloadError, Reason
from ditherps.kernels import cpu, eden, hadamard
from ditherps.kernels.philox import Stream

_LARGEST_SCALE = 2.0**94  # no vector that may be rotated has a larger one
_NO_BYTES = np.empty(0, np.uint8)
_NOTHING = np.empty(0, np.float32)


class EdenOptions(Options):
    """Bits of a coordinate, and how many coordinates are mixed and share a scale."""

    bits: float = Field(1.0, ge=0.01, le=4, description="0.01 to 4: bits a coordinate, beside the scales")
    block: Block = DEFAULT_BLOCK


class Index(NamedTuple):
    """What decoding needs of a checked payload."""

    scales: NDArray[np.float32]
    begins: NDArray[np.int64]
    digits: Bytes


class _Buffers(NamedTuple):
    """Room for a block: as it is coded (first the coordinates of the smaller codebook), rotated, and its order."""

    coded: NDArray[np.float32]
    rotated: NDArray[np.float32]
    places: NDArray[np.int32]

    @classmethod
    def of(cls, size: int) -> _Buffers:
        return cls(np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.int32))


class EdenCodec(Codec):
    """Header, a scale a block, packed digits block by block."""

    name = "eden"
    tag = 14
    Options = EdenOptions
    options: EdenOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        bits = self.options.bits
        self.chunk_coordinates = self.options.block
        self._sparse = bits < 1
        self._share = bits if self._sparse else bits - math.floor(bits)
        low = max(1, math.floor(bits))
        self._books = (eden.CODEBOOKS[low], eden.CODEBOOKS[low + 1 if self._share and not self._sparse else low])

    def _chosen(self, count: int) -> int:
        """Coordinates of a block of `count` that shared randomness chooses."""
        chosen = math.floor(self._share * count + 0.5)
        return max(chosen, 1) if self._sparse else chosen

    def _parts(self, count: int) -> tuple[int, int]:
        """How many coordinates of a block of `count` take the first codebook, and how many the second."""
        chosen = self._chosen(count)
        return (chosen, 0) if self._sparse else (count - chosen, chosen)

    def _block_nbytes(self, count: int) -> int:
        """Bytes of the digits of a block of `count` coordinates that is not zero."""
        return sum(
            int(eden.digits_nbytes((*book.form,), np.int64(part)))
            for book, part in zip(self._books, self._parts(count), strict=True)
        )

    def _blocks(self, coordinates: int) -> int:
        return -(-coordinates // self.options.block)

    def _last(self, coordinates: int) -> int:
        """Coordinates of the last block."""
        return coordinates - self.options.block * (self._blocks(coordinates) - 1)

    def max_nbytes(self, coordinates: int) -> int:
        """Exactly what a vector without a zero block takes."""
        blocks = self._blocks(coordinates)
        if not blocks:
            return HEADER.size
        whole = (blocks - 1) * self._block_nbytes(self.options.block)
        return HEADER.size + 4 * blocks + whole + self._block_nbytes(self._last(coordinates))

    def expected_squared_error(self, encoded: Encoded) -> float:
        """For rotated coordinates that are Gaussian: what the scales and the distortion D of the codebooks tell.

        With a mean square of s^2, S = s / (p (1 - D)) where a part p of the coordinates travels, and the error is the
        square of what is decoded less that of the vector: p n S^2 (1 - D) (1 - p (1 - D)).
        """
        blocks = self._blocks(encoded.coordinates)
        if not blocks:
            return 0.0
        scales = encoded.data[HEADER.size : HEADER.size + 4 * blocks].view(np.float32)
        before = float(cpu.sum_of_squares(scales, 0, blocks - 1, cpu.workspace().sums))
        last = float(scales[-1]) ** 2
        return before * self._error(self.options.block) + last * self._error(self._last(encoded.coordinates))

    def _error(self, count: int) -> float:
        """Expected squared error of a block of `count` coordinates whose scale is 1."""
        parts = self._parts(count)
        kept = sum(part * (1 - book.distortion) for part, book in zip(parts, self._books, strict=True))
        return kept * (1 - kept / count)

    def _choice(self, address: Address, coordinates: int) -> Stream:
        """The stream that chooses coordinates."""
        return dataclasses.replace(address, domain=Domain.COORDINATES).stream(coordinates)

    def _choose(self, stream: Stream, lo: int, count: int, places: NDArray[np.int32]) -> NDArray[np.int32]:
        """Fill in `places` for a block; return the coordinates that travel, in the order in which they do."""
        work, chosen = cpu.workspace(), self._chosen(count)
        eden.choose(stream, lo, count, chosen, work.lanes, work.scratch, _NOTHING, places)
        return places[count - chosen if self._sparse else 0 : count]

    def _encode(self, x: NDArray[np.float32], address: Address, context: Context) -> Encoded:
        n, block = x.size, self.options.block
        check_rotatable(x, block)
        signs, choice = signs_of(address, n), self._choice(address, n)
        data = np.empty(self.max_nbytes(n), np.uint8)
        begin = HEADER.size + 4 * self._blocks(n)
        scales, out = data[HEADER.size : begin].view(np.float32), data[begin:]
        buffers = _Buffers.of(min(block, n))
        at = 0
        for entry, lo in enumerate(range(0, n, block)):
            count = min(block, n - lo)
            coded = self._coded(x, lo, count, signs, choice, buffers)
            end, scales[entry] = self._quantize(coded, count, out, at)
            if scales[entry] > 0:
                at = end
        used = data[: begin + at]
        return self._finished(used.copy() if 2 * used.size < data.size else used, n, context)

    def _coded(
        self, x: NDArray[np.float32], lo: int, count: int, signs: Stream, choice: Stream, buffers: _Buffers
    ) -> NDArray[np.float32]:
        """The rotated coordinates of a block that travel, those of the first codebook first."""
        coded, rotated, work = buffers.coded, buffers.rotated, cpu.workspace()
        tools = (work.lanes, work.word, work.word_bits)
        if not self._share:
            hadamard.rotate(x, lo, lo + count, signs, lo, *tools, coded, 0)
            return coded[:count]
        places = self._choose(choice, lo, count, buffers.places)
        if self._sparse:
            eden.gather(x, lo, places, rotated)
            hadamard.rotate(rotated, 0, places.size, signs, lo, *tools, coded, 0)
        else:
            hadamard.rotate(x, lo, lo + count, signs, lo, *tools, rotated, 0)
            eden.gather(rotated, 0, places, coded)
        return coded[: places.size]

    def _quantize(self, coded: NDArray[np.float32], count: int, out: Bytes, at: int) -> tuple[int, float]:
        """Write the digits of a block to `out[at:]`; return where they end, and the scale, 0 for a zero block."""
        work = cpu.workspace()
        total = float(cpu.sum_of_squares(coded, 0, coded.size, work.sums))
        if total == 0:
            return at, 0.0
        sigma = math.sqrt(total / coded.size)
        sums, lo = np.zeros(cpu.SQUARE_LANES), 0
        tools = (work.digits, work.fields, work.wide)
        for book, part in zip(self._books, self._parts(count), strict=True):
            hi = lo + part
            at = int(eden.quantize(coded, lo, hi, sigma, book.levels, book.cuts, (*book.form,), *tools, sums, out, at))
            lo = hi
        # Where only a part travels, it stands for all.
        return at, total / float(eden.folded(sums)) * (count / coded.size)

    def _index(self, encoded: Encoded) -> Index:
        n, size = encoded.coordinates, encoded.nbytes
        blocks = self._blocks(n)
        begin = HEADER.size + 4 * blocks
        if encoded.header.tail_bytes or begin > size:
            raise PayloadError(f"payload of {size} bytes has no room for the scales of {blocks} blocks", Reason.SIZE)
        scales = encoded.data[HEADER.size : begin].view(np.float32)
        if not np.all((scales >= 0) & (scales <= _LARGEST_SCALE)):
            raise PayloadError("payload holds a scale that is negative, not finite or out of range", Reason.NON_FINITE)
        ends = np.zeros(blocks + 1, np.int64)
        if blocks:
            ends[1:] = self._block_nbytes(self.options.block)
            ends[-1] = self._block_nbytes(self._last(n))
            ends[1:][scales == 0] = 0
            np.cumsum(ends, out=ends)
        if begin + ends[-1] != size:
            raise PayloadError(
                f"payload has {size - begin} bytes of digits, its scales announce {ends[-1]}", Reason.SIZE
            )
        return Index(scales, ends[:-1], encoded.data[begin:])

    def _accumulate(
        self,
        encoded: Encoded,
        index: Index,
        address: Address,
        into: NDArray[np.float32],
        weight: np.float32,
        span: Span,
        side: NDArray[np.float32] | None,
    ) -> int:
        n, block, work = encoded.coordinates, self.options.block, cpu.workspace()
        signs, choice = signs_of(address, n), self._choice(address, n)
        buffers = _Buffers.of(min(block, into.size))
        tools = (work.lanes, work.word, work.word_bits)
        coded, rotated = buffers.coded, buffers.rotated
        for lo in range(*span, block):
            count, entry = min(block, span[1] - lo), lo // block
            if index.scales[entry] == 0:
                continue
            self._reconstruct(index, entry, count, coded)
            if not self._share:
                hadamard.add_rotated_back(
                    coded, coded.view(np.int32), 0, count, signs, lo, *tools, weight, into, lo - span[0]
                )
                continue
            places = self._choose(choice, lo, count, buffers.places)
            if self._sparse:
                rotated.fill(0.0)
                one = np.float32(1.0)
                hadamard.add_rotated_back(
                    coded, coded.view(np.int32), 0, places.size, signs, lo, *tools, one, rotated, 0
                )
                eden.scatter_add(rotated, places, weight, into, lo - span[0])
            else:
                eden.scatter(coded, places, rotated)
                hadamard.add_rotated_back(
                    rotated, rotated.view(np.int32), 0, count, signs, lo, *tools, weight, into, lo - span[0]
                )
        return 0

    def _reconstruct(self, index: Index, entry: int, count: int, coded: NDArray[np.float32]) -> None:
        """The values of a block that travelled, in their order: to the beginning of `coded`."""
        work, lo, at = cpu.workspace(), 0, int(index.begins[entry])
        tools = (work.digits, work.fields, work.wide)
        for book, part in zip(self._books, self._parts(count), strict=True):
            form, hi = (*book.form,), lo + part
            eden.reconstruct(index.digits, at, index.scales[entry], book.levels, form, *tools, coded, lo, hi)
            at += int(eden.digits_nbytes(form, np.int64(part)))
            lo = hi
