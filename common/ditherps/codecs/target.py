"""The `target` rule for bits: the step with which a vector takes a given number of bits a coordinate.

One pass gathers statistics; from these the expected bits of any step follow, and the finest step that fits is taken.
All of it is integers, table look-ups and IEEE arithmetic, so both the step and the bytes are the same on every machine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ditherps.codecs.base import BadInput
from ditherps.codecs.steps import StepOptions
from ditherps.codecs.suited import magnitudes
from ditherps.dither import TILE
from ditherps.entropy.family import SCALES, SCALES_PER_OCTAVE, SHAPES, SPIKES, family, logarithms, root
from ditherps.kernels import cpu
from ditherps.kernels.coder import CHUNK, HEAD, HEADROOM
from ditherps.kernels.rans import LANES
from ditherps.kernels.statistics import fit_tiles, model_bits
from ditherps.kernels.tables import CELLS, ENTRIES

FINENESS = 16  # steps tried between two neighbouring scales
_OCTAVE = FINENESS * SCALES_PER_OCTAVE
_OCTAVES = 20  # around the rms, within which steps are looked for
_OVERHEAD = 8 * (HEAD + 8 + 3 * LANES) / CHUNK + 10 / TILE  # of chunks: heads, what states waste, parameters
_ESCAPE_BITS = 10.0


def step_for_bits(x: NDArray[np.float32], options: StepOptions, *, subtract: bool) -> float:
    """The one step for all of x that takes about `options.bits` a coordinate; 0 for zeros.

    With `coder=rans` the bits are those of the models that suit its tiles, within some 2 % where these fit; with
    `coder=fixed` those of the packed alphabet and of the escapes that |x|'s histogram predicts.

    Raises:
        BadInput: x is not finite.
    """
    bits = x.view(np.int32)
    largest = int(cpu.largest_bits(bits, 0, x.size)) if x.size else 0
    if largest >= cpu.INFINITY_BITS:
        raise BadInput(0, x.size, "not finite")
    if largest == 0:
        return 0.0
    rms = float(np.sqrt(cpu.sum_of_squares(x, 0, x.size, cpu.workspace().sums) / x.size))
    cost: Callable[[int], float]
    if options.coder == "rans":
        cost = _coded_cost(x, rms, subtract)
    else:
        seen, half = magnitudes((x,)), round(2 * (options.levels or 0.5))

        def cost(place: int) -> float:
            return seen.bits(half, rms * _power(place))

    low, high = -_OCTAVES * _OCTAVE, _OCTAVES * _OCTAVE  # in parts of an octave; bits fall as the step grows
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) > (options.bits or 0.0) else (low, middle)
    # Between two steps tried, bits are nearly a line.
    fine, coarse = cost(low), cost(high)
    part = min(max((fine - (options.bits or 0.0)) / (fine - coarse), 0.0), 1.0) if fine > coarse else 1.0
    step = float(cpu.rounded_up(rms * (_power(low) + part * (_power(high) - _power(low))), 1.0))
    size = float(np.array(largest, np.int32).view(np.float32))
    reach = HEADROOM if options.coder == "rans" else (options.levels or 0.5) + 2.0
    if step * reach >= cpu.LARGEST or size + step >= cpu.LARGEST:
        raise BadInput(0, x.size, "too large: its reconstruction could overflow float32")
    return step


def _power(place: int) -> float:
    """2^(place / parts of an octave), the same everywhere."""
    octave, part = divmod(place, _OCTAVE)
    return _parts()[part] * 2.0**octave


@functools.cache
def _parts() -> list[float]:
    return [root(_OCTAVE, 1 << (52 * _OCTAVE + part)) * 2.0**-52 for part in range(_OCTAVE)]


class _coded_cost:  # noqa: N801 (a function that remembers)
    """Bits a coordinate that the tiles' models expect for a step of rms * `_power(place)`."""

    def __init__(self, x: NDArray[np.float32], rms: float, subtract: bool) -> None:
        rows = np.empty((-(-x.size // TILE), 4), np.int64)
        fit_tiles(x, rms, family(), rows)
        rows = rows[rows[:, 0] >= 0]
        keys = (rows[:, 0] * SHAPES + rows[:, 1]) * SPIKES + rows[:, 2]
        self._keys, place = np.unique(keys, return_inverse=True)
        self._counts = np.bincount(place, weights=rows[:, 3].astype(np.float64), minlength=self._keys.size)
        self._size = x.size
        self._subtract = subtract
        self._known: dict[tuple[int, int, int], float] = {}
        self._cumulative, self._entries = np.empty(CELLS + 2, np.int64), np.empty(ENTRIES, np.uint32)

    def __call__(self, place: int) -> float:
        whole, part = divmod(place, FINENESS)
        total = 0.0
        for key, count in zip(self._keys.tolist(), self._counts.tolist(), strict=True):
            rest, spike = divmod(key, SPIKES)
            scale, shape = divmod(rest, SHAPES)
            here, beyond = (self._model(scale - whole - more, shape, spike) for more in (0, 1))
            total += count * (here + (beyond - here) * part / FINENESS)
        return total / self._size + _OVERHEAD

    def _model(self, scale: int, shape: int, spike: int) -> float:
        key = (min(max(scale, 0), SCALES - 1), shape, spike)
        if key not in self._known:
            self._known[key] = float(
                model_bits(*key, self._subtract, logarithms(), _ESCAPE_BITS, family(), self._cumulative, self._entries)
            )
        return self._known[key]
