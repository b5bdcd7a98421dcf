"""Fixed width: buckets with a step each, tiles of packed digits, escapes beside them (proto/FORMAT.md)."""

from __future__ import annotations

import math
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditherps.codecs.base import HEADER, BadInput, Bytes, Encoded, Span
from ditherps.codecs.buckets import BucketLayout
from ditherps.codecs.steps import StepOptions
from ditherps.dither import TILE, Address
from ditherps.errors import PayloadError, Reason
from ditherps.kernels import cpu
from ditherps.kernels.alphabets import alphabet
from ditherps.kernels.escapes import ESCAPE_NIBBLES

_NO_SIDE = np.empty(0, np.float32)


class Index(NamedTuple):
    """What decoding needs of a checked payload; memory proportional to the payload."""

    steps: NDArray[np.float32]
    table: NDArray[np.int64]
    tiles: Bytes
    escapes: Bytes
    offsets: NDArray[np.int64]


class FixedLayout(BucketLayout):
    """Header, steps, sizes of escapes, tiles, escapes; the middle and the last only where the rule has escapes.

    Attributes:
        chunk_coordinates: unit of spans.
    """

    chunk_coordinates = TILE

    def __init__(self, options: StepOptions, *, subtract: bool, alpha: float = 1.0, ratio: int = 0) -> None:
        assert options.levels is not None  # filled in by the model
        super().__init__(options, subtract=subtract, subtracts_dither=subtract)
        self._alpha, self._ratio = alpha, ratio
        self._half = round(2 * options.levels)
        self._escapes = options.unbounded and not ratio
        self._form = alphabet(ratio or self._half + 1 + self._escapes)

    def _scheme(self, coordinates: int) -> cpu.Scheme:
        rule = {"max": cpu.MAX_RULE, "l2": cpu.L2_RULE}.get(self._options.step or "", cpu.RMS_RULE)
        return cpu.Scheme(
            self._bucket(coordinates),
            rule,
            self._half,
            self._ratio,
            int(self._escapes),
            int(self._subtract),
            self._form,
        )

    def _tile_bytes(self, coordinates: int) -> int:
        """Bytes of all tiles where no bucket is zero."""
        whole, rest = divmod(coordinates, TILE)
        extra = 4 if self._ratio else 0
        last = self._form.nbytes(rest) + extra if rest else 0
        return whole * (self._form.nbytes(TILE) + extra) + last

    def _sizes(self, coordinates: int) -> int:
        """How many sizes of escapes a payload has."""
        return -(-coordinates // TILE) if self._escapes else 0

    def max_nbytes(self, coordinates: int) -> int:
        """Header, steps, tiles, and what escapes could take at most."""
        front = HEADER.size + 4 * self.buckets(coordinates) + 2 * self._sizes(coordinates)
        return front + self._tile_bytes(coordinates) + self._escape_bound(coordinates)

    def _escape_bound(self, coordinates: int) -> int:
        """Upper bound of the bytes of all escapes.

        The squares of x / step sum to n / resolution^2 at most, so at most n / (M resolution)^2 values lie M steps out;
        the nibbles of one grow with the logarithm of its square, so equal ones bound them.
        """
        if not self._escapes or coordinates == 0:
            return 0
        resolution = self._options.known_resolution
        if resolution is None:
            return ESCAPE_NIBBLES * coordinates // 2 + self._sizes(coordinates)
        most = min(coordinates, math.ceil(coordinates / (self._half / 2 * resolution) ** 2))
        square = coordinates / (most * resolution**2)
        nibbles = min(float(ESCAPE_NIBBLES), 1 + math.log(2 * math.sqrt(square) + 4, 8))
        return math.ceil(most * nibbles / 2) + self._sizes(coordinates)

    def encode(
        self, x: NDArray[np.float32], address: Address, step: float | None, pool: Executor | None
    ) -> tuple[Bytes, int, int | None]:
        """The payload with room for the header, the bytes of its tail, and what the header's checksum covers.

        Args:
            x: finite or not.
            address: of x[0]'s dither.
            step: the one step of all coordinates, where it was found before.
            pool: of no use here.

        Raises:
            BadInput: a bucket cannot be encoded.
        """
        n = x.size
        front = HEADER.size + 4 * self.buckets(n) + 2 * self._sizes(n)
        data = np.empty(front + self._tile_bytes(n), np.uint8)
        steps = self.steps(data, n)
        if step is not None:
            steps[:] = step
        scheme = self._scheme(n)
        sizes = data[HEADER.size + 4 * steps.size : front].view(np.uint16)
        escapes = np.empty(ESCAPE_NIBBLES * n // 2 + self._sizes(n), np.uint8) if self._escapes else data[:0]
        written, escaped = cpu.encode(
            x, x.view(np.int32), address.stream(n), scheme, self._options.factor, self._alpha, step is not None,
            steps, sizes, data[front:], escapes, cpu.workspace(),
        )  # fmt: skip
        if written < 0:
            lo = -1 - int(written)
            raise BadInput(lo, lo + scheme.bucket, "too large: its reconstruction could overflow float32")
        used = data[: front + written]
        if escaped:
            used = np.concatenate((used, escapes[:escaped]))
        elif used.size < data.size // 2:
            used = used.copy()  # mostly zero buckets: do not hold on to memory that is not needed
        return used, int(escaped), None

    def sealed_bytes(self, encoded: Encoded) -> int:
        """All."""
        return encoded.nbytes

    def exact_coordinates(self, encoded: Encoded) -> int:
        """None beside those of zero buckets, whose steps are 0."""
        return 0

    def index(self, encoded: Encoded) -> Index:
        """Check all sections; raises PayloadError."""
        n, size = encoded.coordinates, encoded.nbytes
        scheme, buckets, counts = self._scheme(n), self.buckets(n), self._sizes(n)
        middle = HEADER.size + 4 * buckets
        begin = middle + 2 * counts
        end = size - encoded.header.tail_bytes
        if begin > end:
            raise PayloadError(f"payload of {size} bytes has no room for the steps of {buckets} buckets", Reason.SIZE)
        steps = encoded.data[HEADER.size : middle].view(np.float32)
        # One entry a bucket, or a tile where that is less: never more than there are steps.
        table = np.empty(buckets if scheme.bucket >= TILE else -(-n // TILE), np.int64)
        expected = cpu.index_tiles(steps, n, scheme, table)
        if expected < 0:
            raise PayloadError("payload holds a step that is negative, not finite or out of range", Reason.NON_FINITE)
        if begin + expected != end:
            raise PayloadError(f"payload has {end - begin} bytes of tiles, its steps announce {expected}", Reason.SIZE)
        escapes, offsets = encoded.data[end:], np.zeros(counts + 1, np.int64)
        if escapes.size and not self._escapes:
            raise PayloadError("payload has escapes, and its codec has none")
        sizes = encoded.data[middle:begin].view(np.uint16)
        if self._escapes and not cpu.index_escapes(sizes, escapes, offsets):
            raise PayloadError("payload has malformed escapes")
        return Index(steps, table, encoded.data[begin:end], escapes, offsets)

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
        """into += weight * decoded; returns the failed tiles."""
        n = encoded.coordinates
        return int(
            cpu.accumulate(
                index.tiles, index.steps, index.table, address.stream(n), self._scheme(n), self._alpha, span[0], into,
                weight, _NO_SIDE if side is None else side, index.escapes, index.offsets, cpu.workspace(),
            )
        )  # fmt: skip
