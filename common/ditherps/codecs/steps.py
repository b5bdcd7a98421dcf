"""How the step of a uniform quantizer follows from the vector: options, and what they imply before any data is seen."""

from __future__ import annotations

import functools
import math
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from ditherps.codecs.base import Options
from ditherps.dither import TILE
from ditherps.errors import OptionError
from ditherps.kernels.packing import packing

MAX_LEVELS = 32767.0
_SMALL_BUCKETS = (64, 128, 256, 512, 1024, 2048)


class StepOptions(Options):
    """How the step of a bucket follows from its values, how many values share it, and how indices are written."""

    default_levels: ClassVar[float] = 1.0
    default_bucket: ClassVar[int] = TILE
    whole: ClassVar[bool] = False  # whether only whole numbers are chosen for `levels`: half ones have no zero

    coder: Literal["fixed", "rans"] = Field(
        "fixed", description="fixed (packed, all indices as wide as another), rans (entropy-coded)"
    )
    step: Literal["max", "l2", "rms", "target"] | None = Field(
        None,
        description="max (step = max|x| / levels), l2 (step = Euclidean norm / levels), rms (step = resolution * rms), "
        "target (reaches nmse or bits); default max with coder = fixed, rms with coder = rans",
    )
    levels: float | None = Field(None, description="0.5, 1, 1.5, ... 32767 (the alphabet has 2 * levels + 1 symbols)")
    resolution: float | None = Field(
        None, ge=2.0**-20, le=2.0**20, description="2^-20 to 2^20; only with step = rms (default 1)"
    )
    nmse: float | None = Field(
        None, gt=1e-12, le=1e6, description="above 1e-12: squared error over the vector's square sum; step = target"
    )
    bits: float | None = Field(None, ge=0.1, le=15, description="0.1 to 15: bits a coordinate; only with step = target")
    bucket: int | None = Field(
        None,
        ge=0,
        description="0 (the whole vector), a power of two from 64 to 2048, or a multiple of 4096 below 2^35; "
        "default 4096 with coder = fixed, 0 with coder = rans or a bits target",
    )

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        """Check what depends on several fields, and fill in the defaults that do, so that a dump is complete."""
        values = self.__dict__  # the model is frozen for everyone else
        if self.step is None:
            aimed = self.nmse is not None or self.bits is not None
            scaled = self.resolution is not None or (self.coder == "rans" and self.levels is None)
            values["step"] = "target" if aimed else "rms" if scaled else "max"
        if self.step != "rms" and self.resolution is not None:
            raise OptionError(
                "resolution", self.resolution, f"nothing with step = {self.step}; it belongs to step = rms"
            )
        if self.step == "target" and (self.nmse is None) == (self.bits is None):
            raise OptionError("nmse, bits", (self.nmse, self.bits), "exactly one of them with step = target")
        for name in ("nmse", "bits"):
            if self.step != "target" and values[name] is not None:
                raise OptionError(name, values[name], f"nothing with step = {self.step}; it belongs to step = target")
        if self.bucket is None:
            values["bucket"] = 0 if self.coder == "rans" or self.bits is not None else self.default_bucket
        if (self.width % TILE or self.width >= 1 << 35) and self.width not in _SMALL_BUCKETS:
            raise OptionError("bucket", self.bucket, type(self).model_fields["bucket"].description or "")
        if self.bits is not None and self.width:
            raise OptionError("bucket", self.bucket, "0 with a bits target: one step for the whole vector")
        if self.step == "rms" and self.resolution is None:
            values["resolution"] = 1.0
        self._resolve_levels()
        return self

    def _resolve_levels(self) -> None:
        """Fill in the alphabet: what was asked for, or what suits the rule; none where an entropy coder needs none."""
        values = self.__dict__
        if self.levels is not None:
            if not (0.5 <= self.levels <= MAX_LEVELS and (2 * self.levels).is_integer()):
                raise OptionError("levels", self.levels, type(self).model_fields["levels"].description or "")
            if self.coder == "rans" and self.unbounded:
                raise OptionError("levels", self.levels, "nothing with coder = rans, but for step = max or l2")
        if self.bits is not None and self.coder == "fixed":
            fewest = math.ceil(100 * packed_bits(round(2 * (self.levels or 0.5)))) / 100
            if self.bits < fewest:
                raise OptionError("bits", self.bits, f"at least {fewest} with coder = fixed and this alphabet")
        if self.levels is not None:
            return
        if not self.unbounded:
            values["levels"] = self.default_levels
        elif self.coder == "fixed":
            known = self.known_resolution
            values["levels"] = (
                levels_for(known, self.whole) if known is not None else levels_of_bits(self.bits or 0.0, self.whole)
            )

    @property
    def width(self) -> int:
        """Coordinates that share a step, 0 for all of them."""
        return self.bucket or 0

    @property
    def unbounded(self) -> bool:
        """Whether an index may lie beyond `levels`."""
        return self.step in ("rms", "target")

    @property
    def factor(self) -> float:
        """What the norm of a bucket is divided by (max, l2) or its rms multiplied with; 1 where only the data tell."""
        if not self.unbounded:
            return self.levels or 1.0
        return self.known_resolution or 1.0

    @property
    def known_resolution(self) -> float | None:
        """step / rms, where that is known before the data: an NMSE of step^2 / 12 / rms^2 (Schuchman 1964) is."""
        if self.nmse is not None:
            return math.sqrt(12 * self.nmse)
        return self.resolution


def escape_nibbles(shrink: float) -> float:
    """Expected nibbles of an escape whose distance beyond the alphabet is geometric: each step more by `shrink`."""
    return 1.0 + sum(float(shrink ** (0.5 * 8**group - 0.5)) for group in range(1, 11))


@functools.cache
def levels_for(resolution: float, whole: bool = False) -> float:
    """The M (of 1/2, 1, 3/2 ... 127, or `whole`) with the fewest expected bits for a Laplace source.

    The step is `resolution` * rms. Counted are packed digits and escapes. With s = sqrt(2) * resolution, an index is
    outside with probability P = exp(-s (M + 1/2)) sinh(s/2) / (s/2), the Laplace tail averaged over the dither.
    """
    best, fewest = 1.0 if whole else 0.5, math.inf
    s = math.sqrt(2) * resolution
    nibbles = escape_nibbles(math.exp(-s))
    for half in range(2 if whole else 1, 255, 2 if whole else 1):
        outside = (math.exp(-s * half / 2) - math.exp(-s * (half / 2 + 1))) / s
        bits = packed_bits(half) + 4 * outside * nibbles
        if bits < fewest:
            best, fewest = half / 2, bits
    return best


@functools.cache
def levels_of_bits(bits: float, whole: bool = False) -> float:
    """The M with which `bits` a coordinate reach the smallest step for a Gaussian source.

    Each alphabet leaves some bits for escapes, which say how many standard deviations it may cover.
    """
    best, finest = 1.0 if whole else 0.5, math.inf
    for half in range(2 if whole else 1, 255, 2 if whole else 1):
        room = bits - packed_bits(half)
        if room <= 0:
            continue
        low, high = 0.0, 16.0  # standard deviations that the alphabet covers
        for _ in range(50):
            cover = (low + high) / 2
            step = 2 * cover / (half + 1)
            outside = math.erfc(cover / math.sqrt(2))
            if 4 * outside * escape_nibbles(math.exp(-step * max(cover, 1.0))) > room:
                low = cover
            else:
                high = cover
        if 2 * high / (half + 1) < finest:
            best, finest = half / 2, 2 * high / (half + 1)
    return best


def packed_bits(half: int) -> float:
    """Bits a coordinate of packed digits 0 .. 2M (= `half`) and the escape in a full tile, with its size of escapes."""
    return 8 * (packing(half + 2).nbytes(TILE) + 2) / TILE
