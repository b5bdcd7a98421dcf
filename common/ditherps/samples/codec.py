"""The sample codec: a worker's samples as digits beyond what the other end holds (proto/FORMAT.md, "Samples").

The dither of a sample is addressed by its id, never by a round, so that what was sent of it stays valid for ever, and a
finer level costs no more than the digits that are missing.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from ditherps.dither import Address, Domain, lanes
from ditherps.errors import OptionError, PayloadError, Reason, UserError
from ditherps.kernels.rans import LOWEST, put_symbols
from ditherps.kernels.sample_coder import Decoder, code_samples, mixture, symbol_entries
from ditherps.kernels.samples import MOST_LEVEL, coarsen, quantize, reconstruct
from ditherps.sampling import Ids
from ditherps.tasks.features import Features

NOTHING: Final = -1
"""The level of a sample of which nothing is held."""

MOST_CLASSES: Final = 1 << 16

_FORMAT: Final = 1
_HEADER: Final = struct.Struct("<BBHIIIII")
_CHECK_AT: Final = _HEADER.size - 4

Indices = NDArray[np.uint16]
"""Of features at some level: (n, features)."""


class Header(NamedTuple):
    """The fixed beginning of a payload; little-endian."""

    format: int
    level: int
    classes: int  # less one
    samples: int
    features: int
    known: int
    state: int
    check: int


class Batch(NamedTuple):
    """Samples at one level: labels (n,) int64 and indices (n, features) uint16."""

    labels: NDArray[np.int64]
    indices: Indices


class SampleCodec:
    """Encodes and decodes one worker's samples for one task; both ends build it from the job and the task alone."""

    def __init__(self, features: Features, classes: int, seed: int, sender: int) -> None:
        """For samples with these features and labels 0 .. classes - 1 of worker `sender` in the job with this seed.

        Raises:
            OptionError: more classes than a payload can name.
        """
        if not 1 <= classes <= MOST_CLASSES:
            raise OptionError("classes", classes, f"1 to {MOST_CLASSES}")
        self.features = features
        self.classes = classes
        self._seed = seed
        self._sender = sender
        low, high = (tuple(map(float, side)) for side in (features.low, features.high))
        declared = (features.shape, low, high, features.integer, classes, seed, sender)
        self._declared = zlib.crc32(repr(declared).encode())

    @property
    def deepest(self) -> int:
        """The deepest level: there integers are lossless."""
        return min((self.features.span - 1).bit_length(), MOST_LEVEL)

    def checked_level(self, level: int) -> int:
        """`level`, or OptionError where there is no such level."""
        if not 0 <= level <= self.deepest:
            raise OptionError("level", level, f"0 to {self.deepest} bits a feature")
        return level

    def lanes(self, ids: Ids) -> NDArray[np.uint16]:
        """The dither of samples: (n, features). Raises OptionError for ids beyond 32 bits."""
        out = np.empty((len(ids), self.features.count), np.uint16)
        for row, id_ in enumerate(ids.tolist()):
            out[row] = lanes(Address(self._seed, id_, self._sender, Domain.SAMPLE), self.features.count)
        return out

    def quantized(self, ids: Ids, features: Tensor, level: int) -> Indices:
        """Indices of stored features (n, *shape) at a level, directly.

        Raises:
            OptionError: there is no such level.
            UserError: the features are not what the task declares.
        """
        integers = self.features.integers(features)
        return self._at(integers, ids, np.full(len(ids), self.checked_level(level)))

    def coarser(self, ids: Ids, indices: Indices, finer: NDArray[np.int64], level: int) -> Indices:
        """Indices at `level` of samples that are held at levels that are as fine or `finer`, (n,)."""
        out = indices.copy()
        for lane, row, fine in zip(self.lanes(ids), out, finer.tolist(), strict=True):
            if fine > level:
                coarsen(row, lane, fine, level)
        return out

    def values(self, ids: Ids, indices: Indices, level: int) -> Tensor:
        """Samples as their indices at `level` tell them: float32 (n, *shape), in the units of stored features.

        The error is uniform over a step of range / 2^level, zero-mean to the 2^-17 of the range that a 16-bit dither
        leaves. Integers are exact at the deepest level where a step is at most one.
        """
        values = np.empty(indices.shape, np.float32)
        exact = self.features.integer and self.features.span <= 1 << level
        low = np.broadcast_to(np.array(self.features.low, np.float64), self.features.scale.shape)
        for lane, row, out in zip(self.lanes(ids), indices, values, strict=True):
            reconstruct(row, lane, level, self.features.span, exact, low, self.features.scale, out)
        return torch.from_numpy(values).reshape(len(values), *self.features.shape)

    def encode(self, ids: Ids, features: Tensor, labels: Tensor, held: NDArray[np.int64], level: int) -> bytes:
        """The digits beyond `held` up to `level`, and the labels of samples of which nothing is held.

        Args:
            ids: (n,) of the samples.
            features: (n, *shape), as stored.
            labels: (n,) int64.
            held: (n,) levels that the other end holds, `NOTHING` to level - 1.
            level: what it is to hold.

        Raises:
            OptionError: there is no such level.
            UserError: features or labels are not what the task declares.
        """
        held = self._checked_held(ids, held, level)
        integers = self.features.integers(features)
        names = labels.detach().cpu().to(torch.int64).numpy().copy()
        if len(integers) != len(ids) or names.shape != ids.shape:
            raise UserError(f"{len(ids)} samples, but {len(integers)} rows of features and {names.shape} labels")
        wrong = (names < 0) | (names >= self.classes)
        if wrong.any():
            raise UserError(f"a label is {names[wrong][0]}, but the task has classes 0 to {self.classes - 1}")
        digits = int((level - held).sum()) * self.features.count + len(ids) * self.classes.bit_length()
        places = np.empty(digits, np.uint16)
        none = Decoder(np.empty(0, np.uint16), np.empty(1, np.uint64), np.zeros(1, np.int64))
        written = self._code(integers, ids, names, held, level, none, self._at(integers, ids, held), places)
        words = np.empty(written + 1, np.uint16)
        states = np.full(1, LOWEST, np.uint64)
        top = put_symbols(places, written, *symbol_entries(), states, words, words.size)
        body = words[top:].astype("<u2").tobytes()
        known = self._known(ids, held)
        header = Header(_FORMAT, level, self.classes - 1, len(ids), self.features.count, known, int(states[0]), 0)
        return _sealed(_HEADER.pack(*header)[:_CHECK_AT], body)

    def decode(
        self, payload: bytes | bytearray | memoryview, ids: Ids, held: NDArray[np.int64], level: int, into: Batch
    ) -> None:
        """Bring samples from what is held of them to `level`.

        Args:
            payload: as received.
            ids: (n,) of the samples that were asked for.
            held: (n,) levels at which `into` holds them.
            level: that was asked for.
            into: what is held: indices at those levels and labels, or anything where nothing is held. Changed in place,
                to junk where the payload turns out to be damaged.

        Raises:
            PayloadError: the payload is damaged, or is not of these samples, this task, level and state of the cache.
        """
        held = self._checked_held(ids, held, level)
        data = memoryview(payload).cast("B")
        header = self._checked_header(data, len(ids), level)
        if header.known != self._known(ids, held):
            raise PayloadError(
                "the samples were encoded for another job, other ids or another state of the cache",
                Reason.CONTEXT_MISMATCH,
            )
        words = np.frombuffer(data[_HEADER.size :], "<u2").astype(np.uint16)
        decoder = Decoder(words, np.full(1, header.state, np.uint64), np.zeros(1, np.int64))
        no_integers = np.empty((len(ids), 0), np.int32)
        self._code(no_integers, ids, into.labels, held, level, decoder, into.indices, np.empty(0, np.uint16))
        if int(decoder.next[0]) != words.size or int(decoder.state[0]) != LOWEST:
            raise PayloadError("the digits of the samples do not end where their payload does")

    def max_nbytes(self, samples: int, level: int) -> int:
        """Upper bound of a payload's bytes: a word a digit, though a digit takes a bit or less."""
        return _HEADER.size + 2 * samples * ((level + 1) * self.features.count + self.classes.bit_length())

    def _checked_held(self, ids: Ids, held: NDArray[np.int64], level: int) -> NDArray[np.int64]:
        self.checked_level(level)
        held = np.ascontiguousarray(held, np.int64)
        if held.shape != ids.shape or (held.size and not NOTHING <= held.min() <= held.max() < level):
            raise OptionError(
                "held", held.tolist(), f"a level from {NOTHING} to {level - 1} for each of {len(ids)} ids"
            )
        return held

    def _checked_header(self, data: memoryview, samples: int, level: int) -> Header:
        """The header of a payload of so many samples at this level, or PayloadError."""
        if len(data) < _HEADER.size or (len(data) - _HEADER.size) % 2:
            raise PayloadError(f"{len(data)} bytes of samples are no whole payload", Reason.SIZE)
        header = Header(*_HEADER.unpack_from(data))
        if header.format != _FORMAT:
            raise PayloadError(f"samples have format {header.format}, this is {_FORMAT}")
        if header.check != _check(data[:_CHECK_AT], data[_HEADER.size :]):
            raise PayloadError("the samples do not match their checksum", Reason.DIGEST_MISMATCH)
        for what, found, expected in (
            ("samples", header.samples, samples),
            ("features", header.features, self.features.count),
            ("classes", header.classes + 1, self.classes),
            ("level", header.level, level),
        ):
            if found != expected:
                raise PayloadError(f"the payload says {what} = {found}, but {expected} was asked for", Reason.SIZE)
        if not LOWEST <= header.state < LOWEST << 16 or len(data) > self.max_nbytes(samples, level):
            raise PayloadError("the samples have an impossible state or size")
        return header

    def _at(self, integers: NDArray[np.int32], ids: Ids, levels: NDArray[np.int64]) -> Indices:
        """Indices at the level of each sample; zeros where that is `NOTHING`."""
        indices = np.zeros(integers.shape, np.uint16)
        for x, lane, level, row in zip(integers, self.lanes(ids), levels.tolist(), indices, strict=True):
            if level >= 0:
                quantize(x, lane, level, self.features.span, row)
        return indices

    def _known(self, ids: Ids, held: NDArray[np.int64]) -> int:
        """32 bits of what both ends must agree on beside the payload."""
        state = xxhash.xxh3_64(struct.pack("<I", self._declared))
        state.update(ids.astype("<i8").tobytes())
        state.update(held.astype("<i8").tobytes())
        return state.intdigest() & 0xFFFFFFFF

    def _code(
        self,
        integers: NDArray[np.int32],
        ids: Ids,
        labels: NDArray[np.int64],
        held: NDArray[np.int64],
        level: int,
        decoder: Decoder,
        indices: Indices,
        places: NDArray[np.uint16],
    ) -> int:
        form, span = self.features.planes, self.features.span
        learned, decoding = mixture(self.classes), integers.shape[1] == 0
        dithers = self.lanes(ids)
        return int(
            code_samples(
                *(integers, dithers, labels, held, level, form, span, self.classes),
                *(learned, decoding, decoder, indices, places),
            )
        )


def _check(header: bytes | memoryview, body: bytes | memoryview) -> int:
    state = xxhash.xxh3_64(header)
    state.update(body)
    return state.intdigest() & 0xFFFFFFFF


def _sealed(header: bytes, body: bytes) -> bytes:
    return header + struct.pack("<I", _check(header, body)) + body
