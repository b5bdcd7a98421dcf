"""`topk`: the k coordinates of largest magnitude, all others zero (Top-K; Stich et al., arXiv 1809.07599).

Biased; a contraction: the error is at most (1 - k/n) times the vector's square. It wants error feedback.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ditherps.codecs.base import HEADER, BadInput, Bytes, Codec, Context, Encoded, Options, Span
from ditherps.codecs.strata import share
from ditherps.dither import Address
from ditherps.errors import PayloadError, Reason
from ditherps.kernels import cpu, largest

_NO_FLOATS = np.empty(0, np.float32)
_NO_HALVES = np.empty(0, np.uint16)
_ENTRY = 8  # bytes of the directory a chunk
_COUNT = (1 << largest.COUNT_BITS) - 1


class TopkOptions(Options):
    """How many coordinates travel, and in what type."""

    fraction: float = Field(0.01, gt=0, le=1, description="above 0, up to 1: k = max(1, ceil(fraction * n))")
    values: Literal["float32", "bf16"] = Field("float32", description="float32, bf16 (rounded to nearest)")


class Index(NamedTuple):
    """What decoding needs of a checked payload; memory proportional to the payload."""

    directory: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    values: NDArray[np.float32]
    halves: NDArray[np.uint16]
    codes: Bytes


class TopkCodec(Codec):
    """Header, a directory of chunks of 262144 coordinates, k values, and the places of these as Rice-coded gaps.

    Of equal magnitudes the one of lower index is taken.
    """

    name = "topk"
    tag = 10
    unbiased = False
    contractive = True
    Options = TopkOptions
    options: TopkOptions
    chunk_coordinates = largest.CHUNK

    def chosen(self, coordinates: int) -> int:
        """k: max(1, ceil(fraction * n)); 0 of none."""
        return share(self.options.fraction, coordinates)

    @property
    def _item(self) -> int:
        """Bytes of a value."""
        return 2 if self.options.values == "bf16" else 4

    def _sections(self, coordinates: int) -> tuple[int, int]:
        """Where values and codes begin."""
        values = HEADER.size + _ENTRY * -(-coordinates // self.chunk_coordinates)
        return values, values + self._item * self.chosen(coordinates)

    def max_nbytes(self, coordinates: int) -> int:
        """Header, directory, values, and what the places can take at most.

        With parameter r, k gaps take k (r + 1) bits and their quotients, which sum to n / 2^r at most; chunks choose
        theirs freely, and so do no worse than with the best common one.
        """
        k, chunks = self.chosen(coordinates), -(-coordinates // self.chunk_coordinates)
        bits = min(k * (r + 1) + (coordinates >> r) for r in range(largest.LARGEST_RICE + 1))
        return self._sections(coordinates)[1] + bits // 8 + chunks

    def expected_squared_error(self, encoded: Encoded) -> float:
        """NaN: the error lies in the coordinates that do not travel."""
        return math.nan

    def _encode(self, x: NDArray[np.float32], address: Address, context: Context) -> Encoded:
        n, k = x.size, self.chosen(x.size)
        if cpu.largest_bits(x.view(np.int32), 0, n) >= cpu.INFINITY_BITS:
            raise BadInput(0, n, "not finite")
        data = np.empty(self.max_nbytes(n), np.uint8)
        values_at, codes_at = self._sections(n)
        written = 0
        if n:
            bits = x.view(np.uint32)
            directory = data[HEADER.size : values_at].view(np.uint32)
            places, values = np.empty(k, np.uint32), np.empty(k, np.uint32)
            counts = np.empty(directory.size // 2, np.uint32)
            least, ties = largest.threshold(bits, k, np.empty(largest.SELECT_COUNTS, np.int64))
            largest.gather_largest(bits, least, ties, places, values, counts)
            directory[::2] = counts
            section = data[values_at:codes_at]
            if self._item == 4:
                section.view(np.uint32)[:] = values
            else:
                largest.round_to_bf16(values, section.view(np.uint16))
                if cpu.largest_bf16_bits(section.view(np.uint16)) >= cpu.BF16_INFINITY_BITS:
                    raise BadInput(0, n, "beyond the range of bfloat16")
            written = int(largest.encode_places(places, directory, data[codes_at:]))
        return self._finished(data[: codes_at + written], n, context)

    def _index(self, encoded: Encoded) -> Index:
        n, data = encoded.coordinates, encoded.data
        values_at, codes_at = self._sections(n)
        if data.size < codes_at or encoded.header.tail_bytes:
            raise PayloadError(f"payload has {data.size} bytes, its values end at {codes_at}", Reason.SIZE)
        directory = data[HEADER.size : values_at].view(np.uint32)
        codes = data[codes_at:]
        counts = (directory[::2] & _COUNT).astype(np.int64)
        rice = (directory[::2] >> largest.COUNT_BITS).astype(np.int64)
        sizes = directory[1::2].astype(np.int64)
        if int(counts.sum()) != self.chosen(n) or int(sizes.sum()) != codes.size:
            raise PayloadError("payload has a directory that contradicts its size", Reason.SIZE)
        offsets = np.zeros((counts.size, 2), np.int64)
        offsets[1:, 0], offsets[1:, 1] = np.cumsum(counts)[:-1], np.cumsum(sizes)[:-1]
        for chunk in range(counts.size):
            length = min(self.chunk_coordinates, n - chunk * self.chunk_coordinates)
            at, size, count = offsets[chunk, 1], sizes[chunk], counts[chunk]
            if rice[chunk] > largest.LARGEST_RICE or not largest.places_are_right(
                codes, at, size, count, rice[chunk], length
            ):
                raise PayloadError(f"payload has malformed places in chunk {chunk}")
        values, halves = _NO_FLOATS, _NO_HALVES
        if self._item == 4:
            values = data[values_at:codes_at].view(np.float32)
            finite = cpu.largest_bits(values.view(np.int32), 0, values.size) < cpu.INFINITY_BITS
        else:
            halves = data[values_at:codes_at].view(np.uint16)
            finite = cpu.largest_bf16_bits(halves) < cpu.BF16_INFINITY_BITS
        if not finite:
            raise PayloadError("payload holds NaN or infinity", Reason.NON_FINITE)
        return Index(directory, offsets, values, halves, codes)

    def _accumulate(
        self,
        encoded: Encoded,
        index: Any,
        address: Address,
        into: NDArray[np.float32],
        weight: np.float32,
        span: Span,
        side: NDArray[np.float32] | None,
    ) -> int:
        chunks = slice(span[0] // self.chunk_coordinates, -(-span[1] // self.chunk_coordinates))
        most = int((index.directory[::2][chunks] & _COUNT).max(initial=0)) if index.halves.size else 0
        scratch = np.empty(most, np.float32)
        largest.add_largest(
            index.directory,
            index.offsets,
            index.codes,
            index.values,
            index.halves,
            span[0],
            into,
            weight,
            scratch,
            scratch.view(np.uint32),
        )
        return 0
