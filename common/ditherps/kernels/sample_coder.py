"""Coding of data samples: the digits of each feature, one by one, by what is known of it and its neighbours.

A feature's integer x is known to lie in its cell of the level that the other end holds, at first in 0 .. span - 1. The next
binary digit of t halves the cell at an integer `middle`, which both ends know, since they know the dither: the digit says
whether x >= middle. Where the cell ends before, or begins behind it, nothing travels. Otherwise the digit is coded with a
probability that a mixture of contexts gives (`kernels.mixing`), starting afresh in each payload, by the coder of
`kernels.rans` with a single state. So a payload from nothing to level l, and one from level k to l, are the same thing.

What a decoder meets in damaged words is some other digit, never an impossible one.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.jit import Int, inlined, kernel
from ditherps.kernels.mixing import MOST_SEEN, ONE, RATE, SQUASH, STRETCH, WEIGHT_ONE, squash, stretch
from ditherps.kernels.rans import LOWEST, SLOT_BITS, SLOTS
from ditherps.kernels.samples import MOST_LEVEL, cell_of, first_in

CONTEXTS: Final = 5
PLACES: Final = 8192  # of a context's table
INPUTS: Final = CONTEXTS + 2  # two guesses besides
WEIGHT: Final = WEIGHT_ONE * 7 // 32  # of a context at first
GUESS_WEIGHT: Final = WEIGHT_ONE * 7 // 64
LEARNING: Final = 14
ACTIVITIES: Final = 8
UNKNOWN: Final = -1
RIM: Final = 2  # of neighbours around an image
LABEL_SEEN: Final = 2  # times that each label counts as seen at first
GRAIN: Final = 12  # bits of a value among neighbours, whatever the span


class Mixture(NamedTuple):
    """What is learned within a payload."""

    probabilities: NDArray[np.uint16]  # (CONTEXTS, PLACES), in 2^-16
    seen: NDArray[np.uint8]  # (CONTEXTS, PLACES)
    weights: NDArray[np.int64]  # (2 * (MOST_LEVEL + 1), INPUTS), in 2^-16
    deviations: NDArray[np.int64]  # (2, ACTIVITIES) of x from the two predictions, in 2^-4 of a neighbour's unit
    labels: NDArray[np.int64]  # times that a label fell below and above each border between classes: (2, classes)
    inputs: NDArray[np.int64]
    places: NDArray[np.int64]


def mixture(classes: int) -> Mixture:
    """One that has learned nothing."""
    weights = np.full((2 * (MOST_LEVEL + 1), INPUTS), WEIGHT, np.int64)
    weights[:, CONTEXTS:] = GUESS_WEIGHT
    labels = np.zeros((2, max(classes, 1)), np.int64)
    pending = [(0, classes)]
    while pending:
        lo, hi = pending.pop()
        if hi - lo > 1:
            middle = (lo + hi) // 2
            labels[:, middle] = LABEL_SEEN * (middle - lo), LABEL_SEEN * (hi - middle)
            pending += [(lo, middle), (middle, hi)]
    return Mixture(
        probabilities=np.zeros((CONTEXTS, PLACES), np.uint16),
        seen=np.zeros((CONTEXTS, PLACES), np.uint8),
        weights=weights,
        deviations=np.tile(16 * (24 + 40 * np.arange(ACTIVITIES, dtype=np.int64)), (2, 1)),
        labels=labels,
        inputs=np.zeros(INPUTS, np.int64),
        places=np.zeros(CONTEXTS, np.int64),
    )


def symbol_entries() -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
    """Entries of the coder and their reciprocals; 2 p + bit is the place of a bit that is one in p of 4096 cases."""
    entries = np.zeros(2 * SLOTS, np.uint32)
    p = np.arange(1, SLOTS, dtype=np.uint32)
    entries[3::2] = p << 16
    entries[2::2] = p | (SLOTS - p) << 16
    frequencies = np.maximum(entries >> 16, 1).astype(np.uint64)
    return entries, (np.uint64((1 << 43) - 1) // frequencies) + np.uint64(1)


class Decoder(NamedTuple):
    """Where a decoder stands; nothing of it is used in encoding."""

    words: NDArray[np.uint16]
    state: NDArray[np.uint64]  # (1,)
    next: NDArray[np.int64]  # (1,)


@inlined
def next_bit(p: Int, decoder: Decoder) -> Int:
    """Decode a bit that is one in p of 4096 cases; beyond the last word zeros are read."""
    x = decoder.state[0]
    slot = np.int64(x & np.uint64(SLOTS - 1))
    bit = np.int64(slot < p)
    freq, start = (p, 0) if bit else (SLOTS - p, p)
    x = np.uint64(freq) * (x >> np.uint64(SLOT_BITS)) + np.uint64(slot - start)
    if x < np.uint64(LOWEST):
        at = decoder.next[0]
        x <<= np.uint64(16)
        if at < decoder.words.size:
            x |= np.uint64(decoder.words[at])
        decoder.next[0] = at + 1
    decoder.state[0] = x
    return bit


@kernel
def code_label(
    label: Int, classes: Int, labels: NDArray[np.int64], decoding: bool, decoder: Decoder, out: NDArray[np.uint16], at: Int
) -> tuple[Int, Int]:
    """Code by halving the classes, with the frequencies of this payload so far: (label, next place)."""
    lo, hi = np.int64(0), np.int64(classes)
    while hi - lo > 1:
        middle = (lo + hi) // 2
        below, above = labels[0, middle], labels[1, middle]
        p = min(max((above << SLOT_BITS) // (below + above), np.int64(1)), np.int64(SLOTS - 1))
        if decoding:
            bit = next_bit(p, decoder)
        else:
            bit = np.int64(label >= middle)
            out[at] = np.uint16(2 * p + bit)
            at += 1
        labels[bit, middle] += 1
        if bit:
            lo = middle
        else:
            hi = middle
    return lo, at


@inlined
def guess(lo: Int, middle: Int, hi: Int, mean: Int, deviation: Int, bottom: bool, top: bool) -> Int:
    """P(x >= middle) for lo <= x < hi under a logistic distribution; at bottom and top it has the rest of the mass."""
    below = np.int64(0) if bottom else squash(((lo - mean) << 8) // deviation, SQUASH)
    above = np.int64(ONE) if top else squash(((hi - mean) << 8) // deviation, SQUASH)
    between = min(max(squash(((middle - mean) << 8) // deviation, SQUASH), below), above)
    return min(max(((above - between + 1) << 16) // (above - below + 2), np.int64(32)), np.int64(ONE - 32))


@inlined
def grade(difference: Int) -> Int:
    """A signed difference in nine grades."""
    size = abs(difference)
    grade_ = (size >= 24) + (size >= 96) + (size >= 320) + (size >= 1000)
    return np.int64(4 + grade_ if difference >= 0 else max(3 - grade_, 0))


@kernel
def code_samples(
    integers: NDArray[np.int32],
    lanes: NDArray[np.uint16],
    labels: NDArray[np.int64],
    held: NDArray[np.int64],
    level: Int,
    shape: tuple[int, int, int],
    span: Int,
    classes: Int,
    learned: Mixture,
    decoding: bool,
    decoder: Decoder,
    indices: NDArray[np.uint16],
    out: NDArray[np.uint16],
) -> Int:
    """Code the digits beyond each sample's `held` level (-1: none) up to `level`; return how many bits went to `out`.

    Args:
        integers: (n, features) to encode; not looked at in decoding.
        lanes: (n, features) of the samples' dithers.
        labels: (n,); coded, or filled in, where nothing is held.
        held: (n,) levels below `level`.
        level: 0 .. MOST_LEVEL.
        shape: channels, rows and columns of the features.
        span: of the integers.
        classes: of labels.
        learned: nothing yet.
        decoding: read digits from `decoder`; otherwise write their places among `symbol_entries` to `out`.
        decoder: at the first word.
        indices: (n, features); in decoding those that are held, which become those at `level`.
        out: room for a place a digit.
    """
    channels, rows, columns = shape
    scale = (np.int64(1) << (GRAIN + 20)) // span  # of values to those of neighbours, in 2^-20
    known = np.zeros((channels, rows + RIM + 1, columns + 2 * RIM), np.int64)
    probabilities, seen = learned.probabilities, learned.seen
    inputs, places, deviations = learned.inputs, learned.places, learned.deviations
    written: Int = np.int64(0)
    for n in range(integers.shape[0]):
        before = held[n]
        if before < 0:
            labels[n], written = code_label(labels[n], classes, learned.labels, decoding, decoder, out, written)
        known[:] = 0
        for channel in range(channels):
            for row in range(rows):
                for column in range(columns):
                    value = np.int64(UNKNOWN)
                    if before >= 0:
                        i = (channel * rows + row) * columns + column
                        odd = 2 * np.int64(lanes[n, i]) + 1
                        if decoding:
                            cell = np.int64(indices[n, i]) + (odd >> (17 - before))
                        else:
                            cell = cell_of(np.int64(integers[n, i]), odd, before, span)
                        lo = max(first_in(cell, odd, before, span), np.int64(0))
                        hi = min(first_in(cell + 1, odd, before, span), np.int64(span))
                        value = ((lo + hi - 1) * scale) >> 21
                    known[channel, row + RIM, column + RIM] = value
        for channel in range(channels):
            here = known[channel]
            other = known[max(channel - 1, 0)]
            for row in range(rows):
                for column in range(columns):
                    i = (channel * rows + row) * columns + column
                    y, x = row + RIM, column + RIM
                    # What is known around it; beyond the border the nearest that there is.
                    west, north = here[y, x - 1], here[y - 1, x]
                    northwest, northeast = here[y - 1, x - 1], here[y - 1, x + 1]
                    west2, north2 = here[y, x - 2], here[y - 2, x]
                    if column + 1 == columns:
                        northeast = north
                    if row == 0:
                        north = northwest = northeast = west
                    if row < 2:
                        north2 = north
                    if column == 0:
                        west = northwest = north
                    if column < 2:
                        west2 = west
                    if before >= 0:
                        east = here[y, x + 1] if column + 1 < columns else west
                        south = here[y + 1, x] if row + 1 < rows else north
                        mean = (west + north + east + south) >> 2
                        change = abs(west - east) + abs(north - south)
                    else:
                        east = south = np.int64(UNKNOWN)
                        mean = (west + north) // 2 + ((northeast - northwest) >> 2)
                        mean = min(max(mean, np.int64(0)), np.int64((1 << GRAIN) - 1))
                        change = abs(west - northwest) + abs(north - northwest) + abs(north - northeast)
                    activity = 0
                    for border in range(3, 3 + ACTIVITIES - 1):
                        activity += change >= 1 << border
                    if channel:
                        beside = mean2 = other[y, x]
                        if row and column:
                            mean2 += (west - other[y, x - 1] + north - other[y - 1, x]) >> 1
                            mean2 = min(max(mean2, np.int64(0)), np.int64((1 << GRAIN) - 1))
                    else:
                        beside, mean2 = northeast, (west + north + northwest + northeast) >> 2
                    deviation = max(deviations[0, activity] >> 4, np.int64(4))
                    deviation2 = max(deviations[1, activity] >> 4, np.int64(4))
                    band = i % (rows * columns) * 256 // (rows * columns)

                    odd = 2 * np.int64(lanes[n, i]) + 1
                    cell, lo, hi = np.int64(0), np.int64(0), np.int64(span)
                    if before >= 0:
                        if decoding:
                            cell = np.int64(indices[n, i]) + (odd >> (17 - before))
                        else:
                            cell = cell_of(np.int64(integers[n, i]), odd, before, span)
                        lo = max(first_in(cell, odd, before, span), lo)
                        hi = min(first_in(cell + 1, odd, before, span), hi)
                    for digit in range(before + 1, level + 1):
                        middle = first_in(2 * cell + 1, odd, digit, span)
                        if middle <= lo:
                            cell = 2 * cell + 1
                            continue
                        if middle >= hi:
                            cell = 2 * cell
                            continue
                        bottom, top = lo == 0, hi == span
                        at = (middle * scale) >> 20
                        lowest, highest = (lo * scale) >> 20, (hi * scale) >> 20
                        inputs[CONTEXTS] = guess(lowest, at, highest, mean, deviation, bottom, top)
                        inputs[CONTEXTS + 1] = guess(lowest, at, highest, mean2, deviation2, bottom, top)
                        z = np.int64(bottom)
                        from_mean = min(max((at - mean) * 8 // (deviation + 4) + 16, np.int64(0)), np.int64(31))
                        places[0] = ((activity * 32 + from_mean) * 2 + z) * 8 + min(digit, 7)
                        places[1] = (((at >> 8) * 8 + (west >> 9)) * 8 + (north >> 9)) * 2 + z
                        places[2] = (band * 16 + (at >> 8)) * 2 + z
                        above = np.int64(west >= at)
                        for neighbour in (north, northwest, northeast, west2, north2, east, south):
                            above = 2 * above + np.int64(neighbour >= at)
                        places[3] = above * 16 + (at >> 9) * 2 + z
                        places[4] = ((grade(beside - at) * 9 + grade(west - at)) * 9 + grade(north - at)) * 2 + z
                        places[4] = places[4] * 4 + 2 * np.int64(channel > 0) + np.int64(digit > before + 1)
                        for k in range(CONTEXTS):
                            place = places[k]
                            if seen[k, place] == 0:
                                first = inputs[CONTEXTS + 1] if k == 4 and channel else inputs[CONTEXTS]
                                probabilities[k, place] = np.uint16(first)
                            inputs[k] = stretch(np.int64(probabilities[k, place]), STRETCH)
                        for k in range(CONTEXTS, INPUTS):
                            inputs[k] = stretch(inputs[k], STRETCH)
                        weights = learned.weights[2 * digit + z]
                        total = np.int64(0)
                        for k in range(INPUTS):
                            total += inputs[k] * weights[k]
                        p = min(max(squash(total >> 16, SQUASH) >> 4, np.int64(1)), np.int64(SLOTS - 1))
                        if decoding:
                            bit = next_bit(p, decoder)
                        else:
                            bit = np.int64(integers[n, i] >= middle)
                            out[written] = np.uint16(2 * p + bit)
                            written += 1
                        error = (bit * SLOTS - p) * LEARNING
                        for k in range(INPUTS):
                            weights[k] += (inputs[k] * error + (1 << 15)) >> 16
                        for k in range(CONTEXTS):
                            place = places[k]
                            old, times = np.int64(probabilities[k, place]), np.int64(seen[k, place])
                            probabilities[k, place] = np.uint16(old + ((bit * (ONE - 1) - old) * RATE[times] >> 16))
                            seen[k, place] = np.uint8(min(times + 1, np.int64(MOST_SEEN)))
                        cell = 2 * cell + bit
                        if bit:
                            lo = middle
                        else:
                            hi = middle
                    indices[n, i] = np.uint16(cell - (odd >> (17 - level)))
                    value = ((lo + hi - 1) * scale) >> 21
                    here[y, x] = value
                    deviations[0, activity] += ((abs(value - mean) << 4) - deviations[0, activity]) >> 5
                    deviations[1, activity] += ((abs(value - mean2) << 4) - deviations[1, activity]) >> 5
    return written
