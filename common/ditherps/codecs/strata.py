"""What `randk` and `globalrandk` share: one coordinate from each of k strata, scaled by the stratum's size, none else.

Every coordinate of a stratum has the same chance, 1 / (size of the stratum), and the value that travels is scaled by
that size: the scheme is unbiased, and it loses what a Rand-K of any k coordinates loses, n/k - 1 of the vector's square
(up to k/4n more where k does not divide n). Both ends derive the choice from the dither stream under
`Domain.COORDINATES`: no index travels. That the choice is exact, and why spans can be decoded alone, is said in
`kernels/strata.py`.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditherps.codecs.base import HEADER, BadInput, Codec, Context, Encoded, Span
from ditherps.dither import SERVER, TILE, Address, Domain
from ditherps.errors import PayloadError, Reason
from ditherps.kernels import cpu, strata
from ditherps.kernels.alphabets import alphabet, digits_nbytes
from ditherps.kernels.philox import Stream

_LARGEST = 2.0**127  # of a value times its stratum's size
_LARGEST_BF16_BITS = 0x7F7F0000


def share(fraction: float, coordinates: int) -> int:
    """k = max(1, ceil(fraction * n)) of n coordinates; `fraction` counts as the decimal number that it is shown as."""
    return min(coordinates, max(1, math.ceil(Fraction(repr(fraction)) * coordinates)))


class Index(NamedTuple):
    """The section of a checked payload: its values, or its digits and their norm."""

    values: NDArray[Any]
    norm: np.float64


class StrataCodec(Codec):
    """Header, then the chosen values in the order of coordinates: float32, bfloat16, or a norm and packed digits.

    Attributes:
        shared: the choice is the same for all senders of a round, else each sender's own.
        levels: 0 for values as they are, else they are rounded at random to multiples of norm / levels.
        item: type of values as they are.
    """

    shared: ClassVar[bool]
    levels: int = 0
    item: type[np.float32] | type[np.uint16] = np.float32

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._resolve()
        self._form = alphabet(2 * self.levels + 1) if self.levels else alphabet(2)

    def for_model(self) -> Codec:
        """The largest coordinates instead of random ones, which would leave w 1 / fraction rounds behind."""
        from ditherps.codecs import codec  # the registry imports this module's subclasses

        return codec("topk", **self.options.model_dump(include={"fraction", "values"}, exclude_none=True))

    @abstractmethod
    def _resolve(self) -> None:
        """Set `levels` and `item` from the options."""

    @abstractmethod
    def chosen(self, coordinates: int) -> int:
        """k: how many coordinates of a vector of this length travel."""

    def _choice(self, address: Address, coordinates: int) -> Stream:
        """The stream that chooses the coordinates of a vector at this address."""
        sender = SERVER if self.shared else address.sender
        return dataclasses.replace(address, domain=Domain.COORDINATES, sender=sender).stream(coordinates)

    def max_nbytes(self, coordinates: int) -> int:
        """Exactly what a vector takes whose chosen values are not all zero."""
        k = self.chosen(coordinates)
        if not self.levels:
            return HEADER.size + np.dtype(self.item).itemsize * k
        whole, rest = divmod(k, TILE)
        return HEADER.size + 4 + int(whole * digits_nbytes(self._form, TILE) + digits_nbytes(self._form, rest))

    def expected_squared_error(self, encoded: Encoded) -> float:
        """NaN: the error lies in the coordinates that do not travel."""
        return math.nan

    def _encode(self, x: NDArray[np.float32], address: Address, context: Context) -> Encoded:
        n, k = x.size, self.chosen(x.size)
        if cpu.largest_bits(x.view(np.int32), 0, n) >= cpu.INFINITY_BITS:
            raise BadInput(0, n, "not finite")
        values, places = np.empty(k, np.float32), np.empty(k, np.int64)
        strata.gather(x, self._choice(address, n), values, places)
        largest = np.int32(cpu.largest_bits(values.view(np.int32), 0, k))
        norm = np.float64(largest.view(np.float32))
        if not self._fits(norm, n) or (self.item is np.uint16 and largest > _LARGEST_BF16_BITS):
            raise BadInput(0, n, f"too large: scaled by {-(-n // k)} it could overflow float32")
        data = np.empty(self.max_nbytes(n) if norm or not self.levels else HEADER.size + 4, np.uint8)
        section = data[HEADER.size :]
        if not self.levels and self.item is np.float32:
            section.view(np.float32)[:] = values
        elif not self.levels:
            strata.round_bf16(values.view(np.uint32), places, address.stream(n), section.view(np.uint16))
        else:
            section[:4].view(np.float32)[0] = norm
            if norm:
                strata.quantize_chosen(
                    values, places, norm, self.levels, self._form, address.stream(n), section[4:], cpu.workspace()
                )
        return self._finished(data, n, context)

    def _fits(self, largest: np.float64, coordinates: int) -> bool:
        """Whether a value of this magnitude, scaled, is one that float32 holds."""
        k = self.chosen(coordinates)
        return not k or bool(largest * -(-coordinates // k) <= _LARGEST)

    def _index(self, encoded: Encoded) -> Index:
        n, section = encoded.coordinates, encoded.data[HEADER.size :]
        expected = self.max_nbytes(n)
        norm = np.float64(0)
        values: NDArray[Any] = section
        if self.levels:
            if section.size < 4:
                raise PayloadError(f"payload of {encoded.nbytes} bytes has no room for its norm", Reason.SIZE)
            norm, values = np.float64(section[:4].view(np.float32)[0]), section[4:]
            expected = expected if norm else HEADER.size + 4
        if encoded.nbytes != expected or encoded.header.tail_bytes:
            raise PayloadError(f"payload has {encoded.nbytes} bytes, expected {expected}", Reason.SIZE)
        largest = norm
        if not self.levels:
            values = section.view(self.item)
            largest = self._largest(values)
        if not (largest >= 0.0 and self._fits(largest, n)):
            raise PayloadError("payload holds a value that is not finite or out of range", Reason.NON_FINITE)
        return Index(values, norm)

    def _largest(self, values: NDArray[Any]) -> np.float64:
        """The largest magnitude among values as they are; NaN or infinity where one is."""
        if self.item is np.uint16:
            bits = np.int32(cpu.largest_bf16_bits(values) << 16)
        else:
            bits = np.int32(cpu.largest_bits(values.view(np.int32), 0, values.size))
        return np.float64(bits.view(np.float32))

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
        n, lo = encoded.coordinates, span[0]
        choice, work = self._choice(address, n), cpu.workspace()
        if not self.levels and self.item is np.float32:
            strata.add_float32(index.values, n, choice, lo, into, weight)
        elif not self.levels:
            strata.add_bf16(index.values, n, choice, lo, into, weight, work)
        elif index.norm:
            k, form = self.chosen(n), self._form
            strata.add_quantized(index.values, k, index.norm, self.levels, form, n, choice, lo, into, weight, work)
        return 0
