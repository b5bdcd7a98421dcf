"""From a tile's parameters to the coder's tables, in integers: both ends compute the same (proto/FORMAT.md, "Models").

One cumulative distribution serves every dither class. With C classes, class c holds the dithers u around
(c + 1/2) / C - 1/2, and the symbol of index q begins, in units of the step, at q - 1/2 - u. So the borders of all
symbols under all classes lie on one grid of `CELLS` cells of width 1/C, those of class c at every C-th place:
q begins at place C * (q + H) - c, H = CELLS / 2 / C. `cumulative[place]` is the share of slots below it, and a slot's
cell gives the symbol of any class by an integer division. Indices beyond the grid, or with no slot, are escapes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.entropy.family import SCALE_ORIGIN, SCALES, SCALES_PER_OCTAVE, SPIKES, Family
from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.rans import PAD, RECIPROCAL_BITS, SLOTS

CELLS = 256
ENTRIES = PAD + CELLS + 1
ESCAPE_SLOTS = 1
MAX_LOW_BITS = 12
FILL = 16
OFFSET_BITS = 6
OFFSETS = 1 << OFFSET_BITS  # parts of the dither's range with an offset each
SLACK = 2.0 ** (1 / 48)  # of a tile's statistics before its parameters change
_LARGEST_Z = 64 << 20
_EIGHTH = 1 << 17
_BASE = (1023 + 17) << 5  # of the upper bits of a double: where z + 1/8 = 1/8 begins
_POINTS = 16  # of the average where no dither is known


@kernel
def scale_of(mean: float, family: Family) -> Int:
    """The index of the scale nearest to `mean`, in octaves."""
    bits = np.float64(mean).view(np.int64)
    mantissa = np.int64(bits & ((1 << 52) - 1) | (1023 << 52)).view(np.float64)
    scale = SCALES_PER_OCTAVE * ((bits >> 52) - 1023) + SCALE_ORIGIN
    for border in family.mantissas:
        scale += mantissa >= border
    return min(max(scale, np.int64(0)), np.int64(SCALES - 1))


@kernel
def shape_of(ratio: float, family: Family) -> Int:
    """The index of the shape whose (E|Z|)^2 / E Z^2 is nearest."""
    shape: Int = np.int64(0)
    for border in family.ratios:
        shape += ratio >= border
    return shape


@kernel
def fit(
    count: Int,
    nonzero: Int,
    total: float,
    squares: float,
    row: NDArray[np.int64],
    last: NDArray[np.int64],
    family: Family,
) -> None:
    """`row` = scale, shape and spike for `count` values t, some of them zero, with these sums of |t| and t^2.

    What `last`, the tile coded before, has is kept where it is nearly as good: that saves bits and tables.
    """
    mean = total / nonzero
    ratio = mean * mean * nonzero / squares
    share = (count - nonzero) * 65536 // count
    spikes = family.spikes
    row[0] = (
        last[0]
        if scale_of(mean / SLACK, family) <= last[0] <= scale_of(mean * SLACK, family)
        else scale_of(mean, family)
    )
    row[1] = (
        last[1]
        if shape_of(ratio / SLACK, family) <= last[1] <= shape_of(ratio * SLACK, family)
        else shape_of(ratio, family)
    )
    place = min(last[2], np.int64(SPIKES - 2))
    if place and spikes[place - 1] < share < spikes[place + 1]:
        row[2] = place
        return
    row[2] = 0
    for i in range(1, SPIKES):
        row[2] += 2 * share >= spikes[i - 1] + spikes[i]


@kernel
def resolution_of(scale: Int, shape: Int, dithered: bool, family: Family) -> tuple[Int, Int]:
    """(class bits, low bits): many dither classes where the grid then still reaches far beyond all but
    `TAIL_PROBABILITY`, fewer for finer steps, which gain less from them, and at last bits that are sent apart."""
    reach = scale - SCALE_ORIGIN + family.reach[shape]
    if dithered and reach <= 58:
        return np.int64(4 - (reach > 22) - (reach > 34) - (reach > 46)), np.int64(0)
    low = (reach - 78 + SCALES_PER_OCTAVE - 1) // SCALES_PER_OCTAVE
    return np.int64(0), min(max(low, np.int64(0)), np.int64(MAX_LOW_BITS))


@kernel
def tail_of(z: Int, row: NDArray[np.uint32]) -> Int:
    """2^31 P(Z > z) for z in units of 2^-20, interpolated between the family's lines."""
    bits = np.float64(min(z, np.int64(_LARGEST_Z)) + _EIGHTH).view(np.int64)
    line = (bits >> 47) - _BASE
    part = (bits >> 31) & 0xFFFF
    above = np.int64(row[line])
    return above - (((above - np.int64(row[line + 1])) * part) >> 16)


@kernel
def fill_cumulative(
    scale: Int,
    shape: Int,
    spike: Int,
    class_bits: Int,
    low_bits: Int,
    dithered: bool,
    family: Family,
    cumulative: NDArray[np.int64],
) -> Int:
    """Fill `cumulative[:CELLS + 1]`; return the place B: a symbol that begins at b is coded where
    B < b < max(N - C - B, 129), N = 257, or 256 with low bits.

    Place j stands for the border x = (j - 128 - 1/2) / C of the symbols that begin there, the average over a class, in
    steps; with low bits, of which half a step is a small part, for x = (j - 128) * 2^low. Without a known dither it is
    the average over all dithers.
    """
    row = family.tails[shape]
    octave = (scale - SCALE_ORIGIN + 10 * SCALES_PER_OCTAVE) // SCALES_PER_OCTAVE - 10
    unit = np.int64(family.octave[scale - SCALE_ORIGIN - SCALES_PER_OCTAVE * octave])
    others = np.int64(65536) - family.spikes[spike]
    span = np.int64(SLOTS - ESCAPE_SLOTS)
    averaged = not dithered and low_bits == 0
    down = 12 + octave + class_bits + 1 + 4 * averaged
    for j in range(CELLS // 2 + 1):
        steps = CELLS // 2 - j
        if averaged:
            tail: Int = np.int64(0)
            for point in range(_POINTS):
                tail += tail_of((np.int64(2 * _POINTS * steps + 2 * point + 1) * unit) >> down, row)
            tail >>= 4
        else:
            tail = tail_of(((np.int64(steps) << (low_bits + 1)) + (low_bits == 0)) * unit >> down, row)
        cumulative[j] = ESCAPE_SLOTS + ((tail * others * span + (np.int64(1) << 46)) >> 47)
    classes = np.int64(1) << class_bits
    last: Int = classes - 1  # begins below the grid: not coded
    for b in range(classes, CELLS // 2 + 1 - classes):
        if cumulative[b] == cumulative[b + classes]:
            last = np.int64(b)
    for j in range(min(last + classes, np.int64(CELLS // 2)) + 1):
        cumulative[j] = ESCAPE_SLOTS
    if low_bits:
        for j in range(CELLS // 2):
            cumulative[CELLS - j] = SLOTS + ESCAPE_SLOTS - cumulative[j]
        cumulative[CELLS + 1] = SLOTS
    else:
        for j in range(CELLS // 2 + 1):
            cumulative[CELLS + 1 - j] = SLOTS + ESCAPE_SLOTS - cumulative[j]
    return last


@kernel
def fill_entries(cumulative: NDArray[np.int64], class_bits: Int, entries: NDArray[np.uint32]) -> None:
    """`entries[PAD + place]` = start | freq << 16 of the symbol that begins there; up to place 0 that of escapes."""
    classes = np.int64(1) << class_bits
    for place in range(PAD + 1):
        entries[place] = ESCAPE_SLOTS << 16
    for b in range(1, CELLS + 1):
        start = cumulative[b]
        entries[PAD + b] = np.uint32(start | (cumulative[min(b + classes, np.int64(CELLS))] - start) << 16)


@kernel
def fill_reciprocals(entries: NDArray[np.uint32], reciprocals: NDArray[np.uint64]) -> None:
    """ceil(2^43 / freq) of each entry that has a frequency.

    Exact: a quotient that is not whole lies at least 1 / freq below the next integer, and a double errs by less.
    """
    for place in range(ENTRIES):
        reciprocals[place] = np.uint64(np.ceil(2.0**RECIPROCAL_BITS / max(np.float64(entries[place] >> 16), 1.0)))


@kernel
def fill_nearest(cumulative: NDArray[np.int64], nearest: NDArray[np.uint8]) -> None:
    """The cell of each slot, 0 for those of escapes; `FILL` bytes behind the last slot are scratch."""
    for slot in range(FILL):
        nearest[slot] = 0
    for j in range(CELLS):
        at = cumulative[j]
        while at < cumulative[j + 1]:
            block = nearest[at : at + FILL]
            for i in range(FILL):  # what is too much is overwritten by the next cell
                block[i] = np.uint8(j)
            at += FILL


@kernel
def fill_offsets(
    scale: Int, shape: Int, spike: Int, class_bits: Int, family: Family, offsets: NDArray[np.int32]
) -> None:
    """`offsets[lane // 1024]` = 2^17 E[q | u] for the dither u in the middle of these lanes, by the tile's model.

    q - E[q | u] estimates x / step without bias, since E[q | u] is odd in u: its mean over the dither is zero whatever
    x is. Of all functions of u it leaves the least squared error, since it is the mean of q - x given u. For fine steps
    it is the dither itself, times the share of values that are not zeros.
    """
    row = family.tails[shape]
    octave = (scale - SCALE_ORIGIN + 10 * SCALES_PER_OCTAVE) // SCALES_PER_OCTAVE - 10
    unit = np.int64(family.octave[scale - SCALE_ORIGIN - SCALES_PER_OCTAVE * octave])
    others = np.int64(65536) - family.spikes[spike]
    down = 12 + octave + 7
    half = OFFSETS // 2
    for place in range(half):
        dither = np.int64(2 * place + 1)  # of OFFSETS * 2
        mean: Int = np.int64(0)  # 2^31 E[q | u], without the zeros
        if class_bits >= 3:
            for k in range(1, CELLS // 2 >> class_bits):
                border = np.int64((2 * k - 1) * OFFSETS)
                mean += tail_of((border - dither) * unit >> down, row) - tail_of((border + dither) * unit >> down, row)
        else:
            mean = dither << (31 - OFFSET_BITS - 1)
        value = np.int32((mean * others + (np.int64(1) << 29)) >> 30)
        offsets[half + place] = value
        offsets[half - 1 - place] = -value
