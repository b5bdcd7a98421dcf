"""What the fixed-width codecs share: buckets with a step each, tiles of packed digits, exceptions; see proto/FORMAT.md."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ditherps.codecs.base import HEADER, BadInput, Codec, Context, Encoded, Options
from ditherps.dither import TILE
from ditherps.errors import OptionError, PayloadError, Reason
from ditherps.kernels import cpu
from ditherps.kernels.packing import Packing, packing

MAX_LEVELS = 32767.0
_RULES = {"max": cpu.MAX_RULE, "rms": cpu.RMS_RULE}
_PROBLEM = "too large to be quantized: its reconstruction could overflow float32"


class FixedOptions(Options):
    """How the step of a bucket follows from its values, and how many there are."""

    default_levels: ClassVar[float]

    levels: float | None = Field(None, description="0.5, 1, 1.5, ... 32767 (the alphabet has 2 * levels + 1 symbols)")
    step: Literal["max", "rms"] = Field("max", description="max (step = max|x| / levels), rms (step = resolution * rms)")
    resolution: float | None = Field(None, gt=0, description="above 0; only with step = rms")
    bucket: int = Field(
        TILE, ge=0, description="0 (the whole vector), a power of two from 64 to 2048, or a multiple of 4096 below 2^35"
    )

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        if self.step == "max" and self.resolution is not None:
            raise OptionError("resolution", self.resolution, "nothing with step = max; it belongs to step = rms")
        if not (self.bucket % TILE == 0 and self.bucket < 1 << 35 or self.bucket in (64, 128, 256, 512, 1024, 2048)):
            raise OptionError("bucket", self.bucket, type(self).model_fields["bucket"].description or "")
        # Fields are frozen for users; defaults that depend on other fields are filled in here, so that a dump is complete.
        fill = self.__dict__
        if self.step == "rms" and self.resolution is None:
            fill["resolution"] = 1.0
        if self.levels is None:
            fill["levels"] = self.default_levels if self.resolution is None else levels_for(self.resolution)
        elif not (0.5 <= self.levels <= MAX_LEVELS and (2 * self.levels).is_integer()):
            raise OptionError("levels", self.levels, type(self).model_fields["levels"].description or "")
        return self


@functools.cache
def levels_for(resolution: float) -> float:
    """The M (of 1/2, 1, 3/2 ...) with the fewest expected bits for a Laplace source of step `resolution` * rms.

    Counted are packed digits and exceptions: an index is outside with probability P = exp(-s (M + 1/2)) sinh(s/2) / (s/2),
    s = sqrt(2) * resolution (derived by averaging the Laplace tail over the dither), and then costs a byte for its value
    and the bytes of a varint for twice the mean gap 1/P.
    """
    best, fewest = MAX_LEVELS, math.inf
    s = math.sqrt(2) * resolution
    for half in range(1, 512):
        # exp(-s(M + 1/2)) sinh(s/2) / (s/2), written so that large s does not overflow.
        outside = (math.exp(-s * half / 2) - math.exp(-s * (half / 2 + 1))) / s
        gap_bytes = 1 + max(0.0, math.floor(math.log(2 / max(outside, 1e-30), 128)))
        bits = 8 * packing(half + 1).nbytes(TILE) / TILE + outside * 8 * (1 + gap_bytes)
        if bits < fewest:
            best, fewest = half / 2, bits
    return best


class Index(NamedTuple):
    """What decoding needs of a checked payload; memory proportional to the payload."""

    steps: NDArray[np.float32]
    table: NDArray[np.int64]
    tiles: NDArray[np.uint8]
    exceptions: NDArray[np.uint8]
    checkpoints: NDArray[np.int64]


class FixedCodec(Codec):
    """Encoding, sizes and checks of the fixed-width schemes; they differ in digits and in what follows a tile."""

    extra: ClassVar[int]  # bytes behind the digits of each tile
    options: FixedOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        assert self.options.levels is not None  # filled in by the model
        self.levels = self.options.levels
        self._half = round(2 * self.levels)
        self._rule = _RULES[self.options.step]
        self._factor = self.levels if self.options.resolution is None else self.options.resolution
        self._form = self._packing()

    @abstractmethod
    def _packing(self) -> Packing:
        """How digits are packed."""

    def _bucket(self, coordinates: int) -> int:
        """Coordinates that share a step: the option, or all of them."""
        return self.options.bucket or max(coordinates, 1)

    def _tile_bytes(self, coordinates: int) -> int:
        """Bytes of all tiles where no bucket is zero."""
        whole, rest = divmod(coordinates, TILE)
        last = self._form.nbytes(rest) + self.extra if rest else 0
        return whole * (self._form.nbytes(TILE) + self.extra) + last

    def _buckets(self, coordinates: int) -> int:
        return -(-coordinates // self._bucket(coordinates))

    def _exception_bound(self, coordinates: int) -> int:
        """Upper bound of the bytes of all exceptions."""
        return 0

    def max_nbytes(self, coordinates: int) -> int:
        """Header, steps, tiles, and what exceptions could take at most."""
        steps = 4 * self._buckets(coordinates)
        return HEADER.size + steps + self._tile_bytes(coordinates) + self._exception_bound(coordinates)

    def _frame(self, coordinates: int) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
        """Memory for header, steps and tiles: the whole, and views of steps and tiles."""
        begin = HEADER.size + 4 * self._buckets(coordinates)
        data = np.empty(begin + self._tile_bytes(coordinates), np.uint8)
        return data, data[HEADER.size : begin].view(np.float32), data[begin:]

    def _finished(
        self, data: NDArray[np.uint8], tile_bytes: int, exceptions: NDArray[np.uint8], coordinates: int, context: Context
    ) -> Encoded:
        """The payload, once the kernel has filled the frame with `tile_bytes` of tiles."""
        header = self._header(coordinates, context, exceptions.size)
        HEADER.pack_into(data.data, 0, *header)
        used = data[: HEADER.size + 4 * self._buckets(coordinates) + tile_bytes]
        if exceptions.size:
            used = np.concatenate((used, exceptions))
        elif used.size < data.size // 2:
            used = used.copy()
        return Encoded(used, header)

    def _refused(self, status: int, lo: int, x: NDArray[np.float32]) -> BadInput:
        """What to raise for a kernel's status at the tile that begins at `lo`."""
        bucket = self._bucket(x.size)
        return BadInput(lo, lo + max(bucket, TILE), "not finite" if status == cpu.NON_FINITE else _PROBLEM)

    def _index(self, encoded: Encoded) -> Index:
        n, size = encoded.coordinates, encoded.nbytes
        bucket = self._bucket(n)
        buckets = self._buckets(n)
        begin = HEADER.size + 4 * buckets
        end = size - encoded.header.exception_bytes
        if begin > end:
            raise PayloadError(f"payload of {size} bytes has no room for the steps of {buckets} buckets", Reason.SIZE)
        steps = encoded.data[HEADER.size : begin].view(np.float32)
        # One entry a bucket, or a tile where that is less: never more than there are steps.
        table = np.empty(buckets if bucket >= TILE else -(-n // TILE), np.int64)
        expected = cpu.index_tiles(steps, n, bucket, self._form, self.extra, self._half, table)
        if expected < 0:
            raise PayloadError("payload holds a step that is negative, not finite or out of range", Reason.NON_FINITE)
        if begin + expected != end:
            raise PayloadError(f"payload has {end - begin} bytes of tiles, its steps announce {expected}", Reason.SIZE)
        exceptions = encoded.data[end:]
        checkpoints = np.empty((exceptions.size // (2 * cpu.CHECKPOINT) + 1, 2), np.int64)
        if exceptions.size:
            if not self._exception_bound(n):
                raise PayloadError("payload has exceptions, and its codec has none")
            count = cpu.index_exceptions(exceptions, 0, n, bucket, steps, checkpoints, cpu.workspace())
            if count < 0:
                raise PayloadError("payload has malformed exceptions")
            checkpoints = checkpoints[: -(-count // cpu.CHECKPOINT)]
        return Index(steps, table, encoded.data[begin:end], exceptions, checkpoints)
