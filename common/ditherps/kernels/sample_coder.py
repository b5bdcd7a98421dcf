"""Coding of data samples: the digits of each feature, one by one, by what is known of it and its neighbours.

A feature's integer x is known to lie in its cell of the level that the other end holds, at first in 0 .. span - 1. The
next binary digit of t halves the cell at an integer `middle`, which both ends know, since they know the dither: the
digit says whether x >= middle. Where the cell ends before, or begins behind it, nothing travels. Otherwise the digit is
coded with a probability that a mixture of contexts gives (`kernels.mixing`), starting afresh in each payload, by the
coder of `kernels.rans` with a single state. So a payload from nothing to level l, and one from level k to l, are the
same thing.

What a decoder meets in damaged words is some other digit, never an impossible one.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.jit import Int, inlined, kernel
from ditherps.kernels.mixing import MOST_SEEN, ONE, RATE, WEIGHT_ONE, squash, stretch
from ditherps.kernels.rans import LOWEST, SLOT_BITS, SLOTS
from ditherps.kernels.samples import FINE, MOST_LEVEL, first_in

CONTEXTS: Final = 5
PLACES: Final = 8192  # of a context's table
INPUTS: Final = CONTEXTS + 2  # two guesses besides
WEIGHT: Final = WEIGHT_ONE * 7 // 32  # of a context at first
GUESS_WEIGHT: Final = WEIGHT_ONE * 7 // 64
LEARNING: Final = 14
ACTIVITIES: Final = 8
UNKNOWN: Final = -1  # of a neighbour that is still to come
RIM: Final = 2  # of neighbours around an image
LABEL_SEEN: Final = 2  # times that each label counts as seen at first
GRAIN: Final = 12  # bits of a value among neighbours, whatever the span
NEIGHBOURS: Final = 8
BESIDE, MEAN, MEAN2, ACTIVITY = 8, 9, 10, 11  # places behind the neighbours
AROUND: Final = 12


class Mixture(NamedTuple):
    """What is learned within a payload."""

    probabilities: NDArray[np.uint16]  # (CONTEXTS, PLACES), in 2^-16
    seen: NDArray[np.uint8]  # (CONTEXTS, PLACES)
    weights: NDArray[np.int64]  # (2 * (MOST_LEVEL + 1), INPUTS), in 2^-16
    deviations: NDArray[np.int64]  # (2, ACTIVITIES) of x from the two predictions, in 2^-4 of a neighbour's unit
    labels: NDArray[np.int64]  # times that a label fell below and above each border between classes: (2, classes)
    inputs: NDArray[np.int64]  # of the bit that is being coded
    places: NDArray[np.int64]
    around: NDArray[np.int64]  # what is known around the feature that is being coded


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
        around=np.zeros(AROUND, np.int64),
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
    start = (1 - bit) * p
    freq = bit * p + (1 - bit) * (SLOTS - p)
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
    label: Int,
    classes: Int,
    seen: NDArray[np.int64],
    decoding: bool,
    decoder: Decoder,
    out: NDArray[np.uint16],
    at: Int,
) -> tuple[Int, Int]:
    """Code by halving the classes, with the frequencies of this payload so far: (label, next place of `out`)."""
    lo, hi = np.int64(0), np.int64(classes)
    while hi - lo > 1:
        middle = (lo + hi) // 2
        below, above = seen[0, middle], seen[1, middle]
        p = min(max((above << SLOT_BITS) // (below + above), np.int64(1)), np.int64(SLOTS - 1))
        if decoding:
            bit = next_bit(p, decoder)
        else:
            bit = np.int64(label >= middle)
            out[at] = np.uint16(2 * p + bit)
            at += 1
        seen[bit, middle] += 1
        if bit:
            lo = middle
        else:
            hi = middle
    return lo, at


@inlined
def look_around(
    here: NDArray[np.int64],
    other: NDArray[np.int64],
    row: Int,
    column: Int,
    first_channel: bool,
    complete: bool,
    around: NDArray[np.int64],
) -> None:
    """Fill `around`: neighbours, two predictions of the value, and how much it changes there.

    `here` and `other` are this channel and the one before, with a rim; `complete`: all of `here` is known already,
    though what is still to come only coarsely.
    """
    y, x = row + RIM, column + RIM
    last_row, last_column = here.shape[0] - RIM - 2, here.shape[1] - 2 * RIM - 1
    west, west2 = here[y, x - 1], here[y, x - 2]
    north, north2 = here[y - 1, x], here[y - 2, x]
    northwest, northeast = here[y - 1, x - 1], here[y - 1, x + 1]
    # Beyond the border stands the nearest that there is.
    if column == last_column:
        northeast = north
    if row == 0:
        north = northwest = northeast = west
    if row < 2:
        north2 = north
    if column == 0:
        west = northwest = north
    if column < 2:
        west2 = west
    largest = np.int64((1 << GRAIN) - 1)
    if complete:
        east = here[y, x + 1] if column < last_column else west
        south = here[y + 1, x] if row < last_row else north
        mean = (west + north + east + south) >> 2
        change = abs(west - east) + abs(north - south)
    else:
        east = south = np.int64(UNKNOWN)
        mean = min(max(((west + north) >> 1) + ((northeast - northwest) >> 2), np.int64(0)), largest)
        change = abs(west - northwest) + abs(north - northwest) + abs(north - northeast)
    if first_channel:
        beside, mean2 = northeast, (west + north + northwest + northeast) >> 2
    else:
        beside = mean2 = other[y, x]
        if row and column:
            mean2 += (west - other[y, x - 1] + north - other[y - 1, x]) >> 1
            mean2 = min(max(mean2, np.int64(0)), largest)
    activity = np.int64(0)
    for bits in range(3, 3 + ACTIVITIES - 1):
        activity += change >= 1 << bits
    around[0], around[1], around[2], around[3] = west, north, northwest, northeast
    around[4], around[5], around[6], around[7] = west2, north2, east, south
    around[BESIDE], around[MEAN], around[MEAN2], around[ACTIVITY] = beside, mean, mean2, activity


@inlined
def guess(lo: Int, middle: Int, hi: Int, mean: Int, deviation: Int, bottom: bool, top: bool) -> Int:
    """P(x >= middle) for lo <= x < hi under a logistic distribution; at bottom and top it has the rest of the mass."""
    below: Int = np.int64(0) if bottom else squash(((lo - mean) << 8) // deviation)
    above: Int = np.int64(ONE) if top else squash(((hi - mean) << 8) // deviation)
    between = min(max(squash(((middle - mean) << 8) // deviation), below), above)
    return min(max(((above - between + 1) << 16) // (above - below + 2), np.int64(32)), np.int64(ONE - 32))


@inlined
def grade(difference: Int) -> Int:
    """A signed difference in nine grades."""
    size = max(difference, -difference)
    steps = np.int64(size >= 24) + np.int64(size >= 96) + np.int64(size >= 320) + np.int64(size >= 1000)
    return np.int64(4 + steps if difference >= 0 else 3 - min(steps, np.int64(3)))


@inlined
def predict(
    lo: Int,
    middle: Int,
    hi: Int,
    bottom: bool,
    top: bool,
    digit: Int,
    begun: bool,
    band: Int,
    colour: bool,
    learned: Mixture,
) -> Int:
    """P(x >= middle) in 4096 cases; lo, middle and hi in the units of neighbours.

    Args:
        lo, middle, hi: of the cell that x lies in.
        bottom, top: whether the cell reaches to the ends of the range.
        digit: the level that the digit leads to.
        begun: whether a digit of this feature was coded before.
        band: which 256th of its plane the feature lies in.
        colour: whether there is a channel before this one.
        learned: `inputs` and `places` are filled for `learn`.
    """
    inputs, places, around = learned.inputs, learned.places, learned.around
    activity = around[ACTIVITY]
    deviation = max(learned.deviations[0, activity] >> 4, np.int64(4))
    deviation2 = max(learned.deviations[1, activity] >> 4, np.int64(4))
    guess1 = guess(lo, middle, hi, around[MEAN], deviation, bottom, top)
    guess2 = guess(lo, middle, hi, around[MEAN2], deviation2, bottom, top)
    zero = np.int64(bottom)
    distance = min(max((middle - around[MEAN]) * 8 // (deviation + 4) + 16, np.int64(0)), np.int64(31))
    places[0] = ((activity * 32 + distance) * 2 + zero) * 8 + min(digit, np.int64(7))
    places[1] = (((middle >> 8) * 8 + (around[0] >> 9)) * 8 + (around[1] >> 9)) * 2 + zero
    places[2] = (band * 16 + (middle >> 8)) * 2 + zero
    above = np.int64(0)
    for k in range(NEIGHBOURS):
        above = 2 * above + np.int64(around[k] >= middle)
    places[3] = above * 16 + (middle >> 9) * 2 + zero
    grades = grade(around[BESIDE] - middle) * 9 + grade(around[0] - middle)
    places[4] = (((grades * 9 + grade(around[1] - middle)) * 2 + zero) * 2 + np.int64(colour)) * 2 + np.int64(begun)
    for k in range(CONTEXTS):
        place = places[k]
        if learned.seen[k, place] == 0:
            learned.probabilities[k, place] = np.uint16(guess2 if k == CONTEXTS - 1 and colour else guess1)
        inputs[k] = stretch(np.int64(learned.probabilities[k, place]))
    inputs[CONTEXTS], inputs[CONTEXTS + 1] = stretch(guess1), stretch(guess2)
    weights = learned.weights[2 * digit + zero]
    total = np.int64(0)
    for k in range(INPUTS):
        total += inputs[k] * weights[k]
    return min(max(squash(total >> 16) >> 4, np.int64(1)), np.int64(SLOTS - 1))


@inlined
def learn(bit: Int, p: Int, digit: Int, bottom: bool, learned: Mixture) -> None:
    """Move weights and counters towards the bit that came where `predict` had given p."""
    weights = learned.weights[2 * digit + np.int64(bottom)]
    error = (bit * SLOTS - p) * LEARNING
    for k in range(INPUTS):
        weights[k] += (learned.inputs[k] * error + (1 << 15)) >> 16
    for k in range(CONTEXTS):
        place = learned.places[k]
        old, times = np.int64(learned.probabilities[k, place]), np.int64(learned.seen[k, place])
        learned.probabilities[k, place] = np.uint16(old + ((bit * (ONE - 1) - old) * RATE[times] >> 16))
        learned.seen[k, place] = np.uint8(min(times + 1, np.int64(MOST_SEEN)))


@kernel
def placed(channels: Int, rows: Int, columns: Int) -> NDArray[np.int32]:
    """Channel, row, column and band of each feature, which would take five divisions each time: (features, 4)."""
    out = np.empty((channels * rows * columns, 4), np.int32)
    i = 0
    for channel in range(channels):
        for row in range(rows):
            for column in range(columns):
                band = (row * columns + column) * 256 // (rows * columns)
                out[i, 0], out[i, 1], out[i, 2], out[i, 3] = channel, row, column, band
                i += 1
    return out


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
        indices: (n, features) at the levels that are held, or anything where none is; they become those at `level`.
        out: room for a place a digit.
    """
    channels, rows, columns = shape
    scale = (np.int64(1) << (GRAIN + 20)) // span  # of integers to the units of neighbours, in 2^-20
    known = np.zeros((channels, rows + RIM + 1, columns + 2 * RIM), np.int64)
    where = placed(channels, rows, columns)
    features = where.shape[0]
    cells = np.zeros((features, 3), np.int64)  # of each feature: its cell, and where that begins and ends
    written: Int = np.int64(0)
    for n in range(lanes.shape[0]):
        before = held[n]
        if before < 0:
            labels[n], written = code_label(labels[n], classes, learned.labels, decoding, decoder, out, written)
        for i in range(features):
            cells[i, 0], cells[i, 1], cells[i, 2] = 0, 0, span
            if before >= 0:
                odd = 2 * np.int64(lanes[n, i]) + 1
                cell = np.int64(indices[n, i]) + (odd >> (FINE - before))
                cells[i, 0] = cell
                cells[i, 1] = max(first_in(cell, odd, before, span), np.int64(0))
                cells[i, 2] = min(first_in(cell + 1, odd, before, span), np.int64(span))
            value = ((cells[i, 1] + cells[i, 2] - 1) * scale) >> 21
            known[where[i, 0], where[i, 1] + RIM, where[i, 2] + RIM] = value
        for i in range(features):
            channel, row, column = np.int64(where[i, 0]), np.int64(where[i, 1]), np.int64(where[i, 2])
            here = known[channel]
            look_around(
                here,
                known[max(channel - 1, np.int64(0))],
                row,
                column,
                bool(channel == 0),
                bool(before >= 0),
                learned.around,
            )
            odd = 2 * np.int64(lanes[n, i]) + 1
            cell, lo, hi = cells[i, 0], cells[i, 1], cells[i, 2]
            for digit in range(before + 1, level + 1):
                middle = first_in(2 * cell + 1, odd, digit, span)
                if middle <= lo:
                    cell = 2 * cell + 1
                    continue
                if middle >= hi:
                    cell = 2 * cell
                    continue
                bottom = bool(lo == 0)
                p = predict(
                    (lo * scale) >> 20,
                    (middle * scale) >> 20,
                    (hi * scale) >> 20,
                    bottom,
                    bool(hi == span),
                    digit,
                    bool(digit > before + 1),
                    np.int64(where[i, 3]),
                    bool(channel > 0),
                    learned,
                )
                if decoding:
                    bit = next_bit(p, decoder)
                else:
                    bit = np.int64(integers[n, i] >= middle)
                    out[written] = np.uint16(2 * p + bit)
                    written += 1
                learn(bit, p, digit, bottom, learned)
                cell = 2 * cell + bit
                if bit:
                    lo = middle
                else:
                    hi = middle
            indices[n, i] = np.uint16(cell - (odd >> (FINE - level)))
            value = ((lo + hi - 1) * scale) >> 21
            here[row + RIM, column + RIM] = value
            activity = learned.around[ACTIVITY]
            for k in range(2):
                error = abs(value - learned.around[MEAN + k])
                learned.deviations[k, activity] += ((error << 4) - learned.deviations[k, activity]) >> 5
    return written
