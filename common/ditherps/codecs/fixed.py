"""What the fixed-width codecs share: buckets with a step each, tiles of packed digits, exceptions (proto/FORMAT.md)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ditherps.codecs.base import HEADER, BadInput, Bytes, Codec, Context, Encoded, Options, Span
from ditherps.dither import TILE, Address
from ditherps.errors import OptionError, PayloadError, Reason
from ditherps.kernels import cpu, exceptions
from ditherps.kernels.packing import packing
from ditherps.kernels.philox import Stream

MAX_LEVELS = 32767.0
_SMALL_BUCKETS = (64, 128, 256, 512, 1024, 2048)
_NO_SIDE = np.empty(0, np.float32)
_NO_BYTES = np.empty(0, np.uint8)


class FixedOptions(Options):
    """How the step of a bucket follows from its values, and how many values share it."""

    default_levels: ClassVar[float]

    levels: float | None = Field(None, description="0.5, 1, 1.5, ... 32767 (the alphabet has 2 * levels + 1 symbols)")
    step: Literal["max", "rms"] = Field(
        "max", description="max (step = max|x| / levels), rms (step = resolution * rms)"
    )
    resolution: float | None = Field(None, gt=0, description="above 0; only with step = rms")
    bucket: int = Field(
        TILE, ge=0, description="0 (the whole vector), a power of two from 64 to 2048, or a multiple of 4096 below 2^35"
    )

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        """Check what depends on several fields, and fill in the defaults that do, so that a dump is complete."""
        if self.step == "max" and self.resolution is not None:
            raise OptionError("resolution", self.resolution, "nothing with step = max; it belongs to step = rms")
        if (self.bucket % TILE or self.bucket >= 1 << 35) and self.bucket not in _SMALL_BUCKETS:
            raise OptionError("bucket", self.bucket, type(self).model_fields["bucket"].description or "")
        values = self.__dict__  # the model is frozen for everyone else
        if self.step == "rms" and self.resolution is None:
            values["resolution"] = 1.0
        if self.levels is None:
            values["levels"] = self.default_levels if self.resolution is None else levels_for(self.resolution)
        elif not (0.5 <= self.levels <= MAX_LEVELS and (2 * self.levels).is_integer()):
            raise OptionError("levels", self.levels, type(self).model_fields["levels"].description or "")
        return self


@functools.cache
def levels_for(resolution: float) -> float:
    """The M (of 1/2, 1, 3/2 ... 127.5) with the fewest expected bits for a Laplace source of step `resolution` * rms.

    Counted are packed digits and exceptions. With s = sqrt(2) * resolution, an index is outside with probability
    P = exp(-s (M + 1/2)) sinh(s/2) / (s/2), the Laplace tail averaged over the dither, and then costs a byte for its
    value and the bytes of a varint for twice the mean gap 1/P.
    """
    best, fewest = 0.5, math.inf
    s = math.sqrt(2) * resolution
    for half in range(1, 256):
        outside = (math.exp(-s * half / 2) - math.exp(-s * (half / 2 + 1))) / s
        gap_bytes = 1 + max(0, math.floor(math.log(2 / max(outside, 1e-30), 128)))
        bits = 8 * packing(half + 1).nbytes(TILE) / TILE + outside * 8 * (1 + gap_bytes)
        if bits < fewest:
            best, fewest = half / 2, bits
    return best


class Index(NamedTuple):
    """What decoding needs of a checked payload; memory proportional to the payload."""

    steps: NDArray[np.float32]
    table: NDArray[np.int64]
    tiles: Bytes
    exceptions: Bytes
    checkpoints: NDArray[np.int64]


class FixedCodec(Codec):
    """A fixed-width scheme. Subclasses say what alphabet is packed (`base`), and what is nested."""

    options: FixedOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        assert self.options.levels is not None  # filled in by the model
        self.levels = self.options.levels
        self._factor = self.levels if self.options.resolution is None else self.options.resolution
        self._alpha, self._ratio = self._nesting()
        self._half = round(2 * self.levels)
        self._form = packing(self._ratio or self._half + 1)

    def _nesting(self) -> tuple[float, int]:
        """Alpha and the ratio of nested coding; ratio 0 for none."""
        return 1.0, 0

    def _has_exceptions(self) -> bool:
        return self.options.step == "rms" and not self._ratio

    def _bucket(self, coordinates: int) -> int:
        """Coordinates that share a step: the option, or all of them."""
        return self.options.bucket or max(coordinates, 1)

    def _buckets(self, coordinates: int) -> int:
        return -(-coordinates // self._bucket(coordinates))

    def _scheme(self, coordinates: int) -> cpu.Scheme:
        rms = int(self.options.step == "rms")
        return cpu.Scheme(self._bucket(coordinates), rms, self._half, self._ratio, *self._form)

    def _tile_bytes(self, coordinates: int) -> int:
        """Bytes of all tiles where no bucket is zero."""
        whole, rest = divmod(coordinates, TILE)
        extra = 4 if self._ratio else 0
        last = self._form.nbytes(rest) + extra if rest else 0
        return whole * (self._form.nbytes(TILE) + extra) + last

    def max_nbytes(self, coordinates: int) -> int:
        """Header, steps, tiles, and what exceptions could take at most."""
        steps = 4 * self._buckets(coordinates)
        return HEADER.size + steps + self._tile_bytes(coordinates) + self._exception_bound(coordinates)

    def _exception_bound(self, coordinates: int) -> int:
        """Upper bound of the bytes of all exceptions: at most E = n / (M resolution)^2 values can lie M steps out.

        Their gaps sum to n and the squares of their indices to about n / resolution^2; the lengths of both varints are
        concave, so equal gaps and equal indices bound them (with a byte each for rounding).
        """
        resolution = self.options.resolution
        if not self._has_exceptions() or resolution is None or coordinates == 0:
            return 0
        most = min(coordinates, math.ceil(coordinates / (self.levels * resolution) ** 2))
        gap = 2 + math.log(2 * coordinates / most, 128)
        index = 2 + 0.5 * math.log(max(4 * coordinates / (most * resolution**2), 1.0), 128)
        return math.ceil(most * (gap + min(5.0, index)))

    def expected_squared_error(self, encoded: Encoded) -> float:
        """step^2 / 12 a coordinate (Schuchman 1964)."""
        buckets, bucket = self._buckets(encoded.coordinates), self._bucket(encoded.coordinates)
        if not buckets:
            return 0.0
        # The order of the sum is fixed: `scaled` makes bytes of it.
        steps = encoded.data[HEADER.size : HEADER.size + 4 * buckets].view(np.float32)
        before = float(cpu.sum_of_squares(steps, 0, buckets - 1, cpu.workspace().sums))
        last = encoded.coordinates - bucket * (buckets - 1)
        return (bucket * before + last * float(steps[-1]) ** 2) / 12

    def _encode(self, x: NDArray[np.float32], address: Address, context: Context) -> Encoded:
        n = x.size
        begin = HEADER.size + 4 * self._buckets(n)
        data = np.empty(begin + self._tile_bytes(n), np.uint8)
        steps = data[HEADER.size : begin].view(np.float32)
        stream, scheme = address.stream(n), self._scheme(n)
        written = cpu.encode(
            x, x.view(np.int32), stream, scheme, self._factor, self._alpha, steps, data[begin:], cpu.workspace()
        )
        if written < 0:
            lo = -1 - int(written)
            raise BadInput(lo, lo + scheme.bucket, "too large: its reconstruction could overflow float32")
        used = data[: begin + written]
        behind = self._exceptions(x, stream, scheme.bucket, steps) if self._has_exceptions() else _NO_BYTES
        if behind.size:
            used = np.concatenate((used, behind))
        elif used.size < data.size // 2:
            used = used.copy()  # mostly zero buckets: do not hold on to memory that is not needed
        return self._finished(used, n, context, behind.size)

    def _exceptions(self, x: NDArray[np.float32], stream: Stream, bucket: int, steps: NDArray[np.float32]) -> Bytes:
        """The bytes of the exceptions of x."""
        out = np.empty(4096 + x.size // 16, np.uint8)
        cursor = np.array([0, -1, 0], np.int64)
        while not exceptions.find_exceptions(x, x.view(np.uint32), stream, bucket, self._half, steps, out, cursor):
            out = np.concatenate((out, np.empty_like(out)))
        return out[: int(cursor[0])]

    def _index(self, encoded: Encoded) -> Index:
        n, size = encoded.coordinates, encoded.nbytes
        scheme = self._scheme(n)
        buckets = self._buckets(n)
        begin = HEADER.size + 4 * buckets
        end = size - encoded.header.tail_bytes
        if begin > end:
            raise PayloadError(f"payload of {size} bytes has no room for the steps of {buckets} buckets", Reason.SIZE)
        steps = encoded.data[HEADER.size : begin].view(np.float32)
        # One entry a bucket, or a tile where that is less: never more than there are steps.
        table = np.empty(buckets if scheme.bucket >= TILE else -(-n // TILE), np.int64)
        expected = cpu.index_tiles(steps, n, scheme, table)
        if expected < 0:
            raise PayloadError("payload holds a step that is negative, not finite or out of range", Reason.NON_FINITE)
        if begin + expected != end:
            raise PayloadError(f"payload has {end - begin} bytes of tiles, its steps announce {expected}", Reason.SIZE)
        behind = encoded.data[end:]
        checkpoints = np.empty((behind.size // (2 * exceptions.CHECKPOINT) + 1 if behind.size else 0, 2), np.int64)
        if behind.size:
            if not self._has_exceptions():
                raise PayloadError("payload has exceptions, and its codec has none")
            count = exceptions.index_exceptions(behind, n, scheme.bucket, steps, checkpoints)
            if count < 0:
                raise PayloadError("payload has malformed exceptions")
            checkpoints = checkpoints[: -(-count // exceptions.CHECKPOINT)]
        return Index(steps, table, encoded.data[begin:end], behind, checkpoints)

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
        n = encoded.coordinates
        stream, scheme = address.stream(n), self._scheme(n)
        visit = self._visitor(index, stream, scheme.bucket, into, weight, span) if index.exceptions.size else None
        if visit:
            visit(False)
        failed = cpu.accumulate(
            index.tiles,
            index.steps,
            index.table,
            stream,
            scheme,
            self._alpha,
            span[0],
            into,
            weight,
            _NO_SIDE if side is None else side,
            cpu.workspace(),
        )
        if visit:
            visit(True)
        return int(failed)

    def _visitor(
        self,
        index: Index,
        stream: Stream,
        bucket: int,
        into: NDArray[np.float32],
        weight: np.float32,
        span: Span,
    ) -> Callable[[bool], None]:
        """`visit_exceptions` for this span: called with False before the others are added, with True afterwards."""
        # The last checkpoint behind which no exception of the span lies, and the first beyond it, bound their number.
        first = max(int(np.searchsorted(index.checkpoints[:, 0], span[0])) - 1, 0)
        beyond = int(np.searchsorted(index.checkpoints[:, 0], span[1]))
        last, at = (int(value) for value in index.checkpoints[first])
        kept = np.empty(1 + (beyond - first) * exceptions.CHECKPOINT, np.float32)

        def visit(apply: bool) -> None:
            exceptions.visit_exceptions(
                index.exceptions,
                at,
                last,
                span[0],
                into,
                kept,
                kept.view(np.uint32),
                apply,
                weight,
                self._half,
                index.steps,
                bucket,
                stream,
            )

        return visit
