"""Memory that kernels work in."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

LINE_BYTES = 64  # of a cache, and of the widest vector

T = TypeVar("T", bound=np.generic)


def buffer(shape: int | tuple[int, ...], kind: type[T]) -> NDArray[T]:
    """Zeros that share no cache line with anything else.

    A vector that lies across two lines costs two accesses: sums that do take half as long again. And what two threads
    write to one line, they wait for.
    """
    nbytes = math.prod(shape if isinstance(shape, tuple) else (shape,)) * np.dtype(kind).itemsize
    memory = np.zeros(-(-nbytes // LINE_BYTES) * LINE_BYTES + LINE_BYTES, np.uint8)
    at = -memory.ctypes.data % LINE_BYTES
    return memory[at : at + nbytes].view(kind).reshape(shape)
