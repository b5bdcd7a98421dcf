"""Data samples, readably and slowly: what proto/FORMAT.md ("Samples") says, in Python's own integers and fractions."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor
from typing import Final

from ditherps.kernels.mixing import REACH, SQUASH, STRETCH

_STEPS: Final = (24, 96, 320, 1000)


def t_of(x: int, lane: int, span: int) -> Fraction:
    """t = x / span + u + 1/2."""
    return Fraction(x, span) + Fraction(2 * lane + 1, 1 << 17)


def index(x: int, lane: int, level: int, span: int) -> int:
    """Cells of the level between that of zero and that of x."""
    return floor((1 << level) * t_of(x, lane, span)) - floor((1 << level) * t_of(0, lane, span))


def value(index_: int, lane: int, level: int, span: int) -> Fraction:
    """The middle of a cell: ((q + 1/2) / 2^level - 1/2 - u) span."""
    cell = index_ + floor((1 << level) * t_of(0, lane, span))
    return ((cell + Fraction(1, 2)) / (1 << level) - Fraction(2 * lane + 1, 1 << 17)) * span


def squash(x: int) -> int:
    """2^16 / (1 + e^(-x / 256))."""
    return int(SQUASH[min(max(x, -REACH), REACH) + REACH])


def stretch(p: int) -> int:
    """The inverse of `squash`."""
    return int(STRETCH[p // 16])


@dataclass
class Rans:
    """The coder's state, and words that are still to come."""

    state: int
    words: list[int]

    def bit(self, p: int) -> int:
        """The next bit, one in p of 4096 cases."""
        slot = self.state % 4096
        one = slot < p
        start, frequency = (0, p) if one else (p, 4096 - p)
        self.state = frequency * (self.state // 4096) + slot - start
        if self.state < 1 << 15:
            self.state = self.state << 16 | (self.words.pop(0) if self.words else 0)
        return int(one)


@dataclass
class Counter:
    """How often a bit was one, as far as it is remembered."""

    p: int
    seen: int = 0

    def learn(self, bit: int) -> None:
        """One more."""
        rate = 2 * 65536 // (2 * self.seen + 3)
        self.p += (bit * 65535 - self.p) * rate >> 16
        self.seen = min(self.seen + 1, 255)


@dataclass(frozen=True)
class Around:
    """What is known around a feature."""

    neighbours: tuple[int, ...]  # west, north, northwest, northeast, west of west, north of north, east, south
    beside: int
    means: tuple[int, int]
    activity: int


@dataclass
class Reader:
    """Decodes samples; `sizes` are channels, rows, columns."""

    coder: Rans
    sizes: tuple[int, int, int]
    span: int
    classes: int
    label_counts: dict[tuple[int, int], int] = field(default_factory=dict)
    counters: dict[tuple[int, ...], Counter] = field(default_factory=dict)
    weights: dict[tuple[int, bool], list[int]] = field(default_factory=dict)
    deviations: list[list[int]] = field(default_factory=lambda: [[16 * (24 + 40 * a) for a in range(8)] for _ in "12"])

    def label(self) -> int:
        """A label: halves of the classes, by how often they came."""
        lo, hi = 0, self.classes
        while hi - lo > 1:
            middle = (lo + hi) // 2
            below = self.label_counts.get((middle, 0), 2 * (middle - lo))
            above = self.label_counts.get((middle, 1), 2 * (hi - middle))
            bit = self.coder.bit(min(max(4096 * above // (below + above), 1), 4095))
            self.label_counts[middle, bit] = (below, above)[bit] + 1
            self.label_counts.setdefault((middle, 1 - bit), (below, above)[1 - bit])
            lo, hi = (middle, hi) if bit else (lo, middle)
        return lo

    def first(self, cell: int, lane: int, level: int) -> int:
        """The smallest integer in a cell."""
        return ceil((Fraction(cell, 1 << level) - Fraction(2 * lane + 1, 1 << 17)) * self.span)

    def unit(self, lo: int, hi: int) -> int:
        """The middle of lo .. hi - 1 in 4096ths of the range."""
        return (lo + hi - 1) * (2**32 // self.span) // 2**21

    def sample(self, lanes: list[int], held: int, indices: list[int], level: int) -> list[int]:
        """Indices at `level`, from those at level `held`, or -1."""
        _, rows, columns = self.sizes
        plane = rows * columns
        cells, known = [], []
        for lane, index_ in zip(lanes, indices, strict=True):
            cell, lo, hi = 0, 0, self.span
            if held >= 0:
                cell = index_ + floor((1 << held) * t_of(0, lane, self.span))
                lo = max(self.first(cell, lane, held), 0)
                hi = min(self.first(cell + 1, lane, held), self.span)
            cells.append((cell, lo, hi))
            known.append(self.unit(lo, hi))
        result = []
        for i, (lane, (cell, lo, hi)) in enumerate(zip(lanes, cells, strict=True)):
            channel, row, column = i // plane, i % plane // columns, i % columns
            around = self.around(known, channel, row, column, held >= 0)
            for digit in range(held + 1, level + 1):
                middle = self.first(2 * cell + 1, lane, digit)
                if middle <= lo or middle >= hi:
                    cell = 2 * cell + (middle <= lo)
                    continue
                bit = self.digit(lo, middle, hi, digit, digit > held + 1, i % plane * 256 // plane, channel > 0, around)
                cell = 2 * cell + bit
                lo, hi = (middle, hi) if bit else (lo, middle)
            result.append(cell - floor((1 << level) * t_of(0, lane, self.span)))
            known[i] = self.unit(lo, hi)
            for deviations, mean in zip(self.deviations, around.means, strict=True):
                old = deviations[around.activity]
                deviations[around.activity] += (16 * abs(known[i] - mean) - old) >> 5
        return result

    def around(self, known: list[int], channel: int, row: int, column: int, complete: bool) -> Around:
        """Neighbours and predictions; beyond the border stands the nearest that there is."""
        _, rows, columns = self.sizes

        def at(up: int, left: int, channel_: int = channel) -> int:
            return known[(channel_ * rows + row - up) * columns + column - left]

        west = at(0, 1) if column else at(1, 0) if row else 0
        north = at(1, 0) if row else west
        northwest = at(1, 1) if row and column else north
        northeast = at(1, -1) if row and column + 1 < columns else north
        west2 = at(0, 2) if column > 1 else west
        north2 = at(2, 0) if row > 1 else north
        east, south = -1, -1
        if complete:
            east = at(0, -1) if column + 1 < columns else west
            south = at(-1, 0) if row + 1 < rows else north
            mean = (west + north + east + south) // 4
            change = abs(west - east) + abs(north - south)
        else:
            mean = min(max((west + north) // 2 + (northeast - northwest) // 4, 0), 4095)
            change = abs(west - northwest) + abs(north - northwest) + abs(north - northeast)
        beside, mean2 = northeast, (west + north + northwest + northeast) // 4
        if channel:
            beside = mean2 = at(0, 0, channel - 1)
            if row and column:
                mean2 += (west - at(0, 1, channel - 1) + north - at(1, 0, channel - 1)) // 2
                mean2 = min(max(mean2, 0), 4095)
        neighbours = (west, north, northwest, northeast, west2, north2, east, south)
        return Around(neighbours, beside, (mean, mean2), sum(change >= 2**bits for bits in range(3, 10)))

    def digit(
        self, lo: int, middle: int, hi: int, digit: int, begun: bool, band: int, colour: bool, around: Around
    ) -> int:
        """The next digit of a feature that lies in lo .. hi - 1."""
        bottom, top = lo == 0, hi == self.span
        low, at, high = (border * (2**32 // self.span) // 2**20 for border in (lo, middle, hi))
        deviations = [max(line[around.activity] // 16, 4) for line in self.deviations]
        guesses = [
            self.guess(low, at, high, mean, deviation, bottom, top)
            for mean, deviation in zip(around.means, deviations, strict=True)
        ]
        distance = min(max((at - around.means[0]) * 8 // (deviations[0] + 4) + 16, 0), 31)
        west, north = around.neighbours[:2]
        above = tuple(neighbour >= at for neighbour in around.neighbours)
        grades = tuple(grade(neighbour - at) for neighbour in (around.beside, west, north))
        contexts: list[tuple[int, ...]] = [
            (0, around.activity, distance, bottom, min(digit, 7)),
            (1, at // 256, west // 512, north // 512, bottom),
            (2, band, at // 256, bottom),
            (3, *above, at // 512, bottom),
            (4, *grades, bottom, colour, begun),
        ]
        counters = [
            self.counters.setdefault(context, Counter(guesses[context[0] == 4 and colour])) for context in contexts
        ]
        inputs = [stretch(p) for p in (*(counter.p for counter in counters), *guesses)]
        weights = self.weights.setdefault((digit, bottom), [65536 * 7 // 32] * 5 + [65536 * 7 // 64] * 2)
        total = sum(weight * one for weight, one in zip(weights, inputs, strict=True)) >> 16
        p = min(max(squash(total) // 16, 1), 4095)
        bit = self.coder.bit(p)
        for k, one in enumerate(inputs):
            weights[k] += (one * (4096 * bit - p) * 14 + 32768) >> 16
        for counter in counters:
            counter.learn(bit)
        return bit

    @staticmethod
    def guess(low: int, at: int, high: int, mean: int, deviation: int, bottom: bool, top: bool) -> int:
        """P(x >= middle) under a logistic distribution."""
        below = 0 if bottom else squash(256 * (low - mean) // deviation)
        above = 65536 if top else squash(256 * (high - mean) // deviation)
        between = min(max(squash(256 * (at - mean) // deviation), below), above)
        return min(max((above - between + 1) * 65536 // (above - below + 2), 32), 65536 - 32)


def grade(difference: int) -> int:
    """A signed difference in nine grades."""
    steps = sum(abs(difference) >= step for step in _STEPS)
    return 4 + steps if difference >= 0 else 3 - min(steps, 3)
