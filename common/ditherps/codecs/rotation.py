"""What the codecs that rotate share: the option `block`, what may be rotated, and where the signs come from."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from ditherps.codecs.base import BadInput
from ditherps.dither import TILE, Address, Domain
from ditherps.errors import OptionError
from ditherps.kernels import cpu, hadamard
from ditherps.kernels.philox import Stream

_LARGEST_BLOCK = 1 << 20
_BLOCKS = f"a power of two from {TILE} to {_LARGEST_BLOCK}: coordinates that are mixed"
_LARGEST_INPUT_BITS = int(np.float32(hadamard.LARGEST_INPUT).view(np.int32))


def _checked(block: int) -> int:
    if not TILE <= block <= _LARGEST_BLOCK or block & (block - 1):
        raise OptionError("block", block, _BLOCKS)
    return block


Block = Annotated[int, Field(description=_BLOCKS), AfterValidator(_checked)]
"""Type of the option `block`."""

DEFAULT_BLOCK = 65536


def check_rotatable(x: NDArray[np.float32], block: int) -> None:
    """Raise BadInput for the first block of x that holds NaN, infinity or values too large to rotate."""
    bits = x.view(np.int32)
    if cpu.largest_bits(bits, 0, x.size) <= _LARGEST_INPUT_BITS:
        return
    for lo in range(0, x.size, block):
        hi = min(lo + block, x.size)
        if cpu.largest_bits(bits, lo, hi) > _LARGEST_INPUT_BITS:
            raise BadInput(lo, hi, "too large: beyond 2^72 its rotation could overflow float32")


def signs_of(address: Address, coordinates: int) -> Stream:
    """The stream of the signs for a vector of this length at this address."""
    return dataclasses.replace(address, domain=Domain.ROTATION).stream(coordinates)
