"""What a second thread gains: a codec's encoding and decoding, beside a loop that only computes, in the same run.

Threads of a shared machine may be halves of one core, or have other work: only the ratio of the two gains says whether
a codec's threads wait for each other or for memory. Each time is the fastest of several runs: what else the machine
does can only add to one, and adds to that of two threads more often.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditherps.bench.quality import round_address
from ditherps.codecs import Codec, Encoded
from ditherps.dither import TILE
from ditherps.kernels.buffers import buffer
from ditherps.kernels.jit import kernel
from ditherps.kernels.philox import Stream, philox_tile
from ditherps.pool import on_threads

_TILES_A_PIECE = 2048  # a millisecond or two of dither: of many small pieces no thread waits long for another's last
_PIECES_A_THREAD = 32
_SPAN = 32 * TILE  # coordinates of one task at least, as where the server adds up


@kernel
def _compute(stream: Stream, tiles: int, out: NDArray[np.uint16], nothing: NDArray[np.float32]) -> None:
    """Make the dither of `tiles` tiles, one over the other: arithmetic alone, in a core's nearest cache."""
    for tile in range(tiles):
        philox_tile(stream, tile, out, nothing, 0)


def _piece(_: int) -> None:
    _compute(round_address(0).stream(0), _TILES_A_PIECE, buffer(TILE, np.uint16), np.empty(0, np.float32))


def timed(action: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def spans(used: Codec, coordinates: int) -> list[tuple[int, int]]:
    """The vector in pieces that decode alone, each a multiple of the codec's chunk."""
    unit = -(-_SPAN // used.chunk_coordinates) * used.chunk_coordinates
    return [(lo, min(lo + unit, coordinates)) for lo in range(0, coordinates, unit)]


def gains(used: Codec, x: Tensor, encoded: Encoded, side: Tensor, threads: int, repeats: int) -> dict[str, Any]:
    """How many times faster `threads` threads are than one: the fastest of each, taken in turn.

    Args:
        used: the codec.
        x: what is encoded.
        encoded: x in round 0.
        side: what the server knows.
        threads: at least 2.
        repeats: of each timing, three times as often: the fastest of few runs scatters.

    Returns:
        `compute_gain` of a loop without memory, `accumulate_gain` and `encode_gain`; that is about 1 where the codec
        has no use for a pool.
    """
    pieces = range(_PIECES_A_THREAD * threads)
    into, address, parts = torch.zeros(x.numel()), round_address(0), spans(used, x.numel())

    def add(span: tuple[int, int]) -> None:
        lo, hi = span
        known = side[lo:hi] if used.needs_side_information else None
        used.accumulate(encoded, address, into[lo:hi], 0.5, span, side_information=known)

    with ThreadPoolExecutor(threads) as pool:

        def both(work: Callable[[Any], object], over: Sequence[Any]) -> tuple[Callable[[], object], ...]:
            return lambda: on_threads(None, work, over), lambda: on_threads(pool, work, over)

        pairs = {
            "compute_gain": both(_piece, pieces),
            "encode_gain": (lambda: used.encode(x, address), lambda: used.encode(x, address, pool=pool)),
            "accumulate_gain": both(add, parts),
        }
        for pair in pairs.values():
            for action in pair:
                action()  # kernels load, and every thread gets its own room
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
        for _ in range(3 * repeats):
            for name, (one, many) in pairs.items():
                seconds[name].append((timed(one), timed(many)))
    result: dict[str, Any] = {"threads": threads}
    for name, times in seconds.items():
        one, many = (min(column) for column in zip(*times, strict=True))
        result[name] = one / many
    return result
