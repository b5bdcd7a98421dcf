"""Kernels against the slow reference: packing, checksum, statistics, whole payloads."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ditherps import Address, Domain, Encoded, codec
from ditherps.codecs import Codec
from ditherps.codecs.base import HEADER
from ditherps.kernels import cpu, escapes, reference
from ditherps.kernels.alphabets import alphabet, digits_nbytes, pack_digits, unpack_digits
from ditherps.kernels.buffers import LINE_BYTES, buffer
from ditherps.kernels.checksum import CRC_TABLES, crc32_int16
from ditherps.kernels.packing import DIGITS, WIDE_FIELDS

ALPHABETS = [*range(2, 257), 257, 511, 512, 600, 1000, 4097, 65535]


def _round_trip(base: int, digits: NDArray[np.uint16]) -> tuple[bytes, NDArray[np.uint16]]:
    spare, fields, wide = np.empty(DIGITS, np.uint16), np.empty(DIGITS, np.uint16), np.empty(WIDE_FIELDS, np.uint64)
    buffer = np.zeros(DIGITS, np.uint16)
    buffer[: digits.size] = digits
    form = alphabet(base)
    out = np.full(form.nbytes(digits.size) + 1, 0xA5, np.uint8)
    assert digits_nbytes(form, digits.size) == out.size - 1
    pack_digits(form, buffer, digits.size, spare, fields, wide, out, 0)
    assert out[-1] == 0xA5
    packed = out[:-1].view()
    packed.flags.writeable = False
    back = np.empty(DIGITS, np.uint16)
    unpack_digits(form, packed, 0, digits.size, spare, fields, wide, back)
    return packed.tobytes(), back[: digits.size]


@pytest.mark.parametrize("count", [1, 7, 100, 4095, 4096])
def test_packing_round_trip_for_every_alphabet(count: int) -> None:
    rng = np.random.default_rng(count)
    for base in ALPHABETS:
        digits = rng.integers(0, base, count).astype(np.uint16)
        digits[: count // 3] = base - 1
        np.testing.assert_array_equal(_round_trip(base, digits)[1], digits, err_msg=str(base))


@pytest.mark.parametrize("base", [2, 3, 4, 5, 6, 7, 9, 15, 16, 20, 29, 64, 76, 104, 128, 255, 256, 300, 65535])
def test_packing_equals_reference(base: int) -> None:
    for count in (1, 13, 500):
        digits = np.random.default_rng(base).integers(0, base, count).astype(np.uint16)
        assert _round_trip(base, digits)[0] == reference.pack(digits.astype(np.int64), base)


@pytest.mark.parametrize(
    ("base", "bits"),
    [(2, 1), (3, 1.602), (4, 2), (5, 2.338), (7, 2.825), (15, 4), (16, 4), (256, 8), (511, 9), (512, 9)],
)
def test_packing_is_as_small_as_measured(base: int, bits: float) -> None:
    assert 8 * alphabet(base).nbytes(4096) / 4096 <= bits
    assert all(8 * alphabet(k).nbytes(4096) / 4096 <= np.log2(k) + 1 for k in ALPHABETS)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 4095, 4096])
def test_checksum_is_zlibs(count: int) -> None:
    values = np.random.default_rng(count).integers(-(2**40), 2**40, 4096)
    assert crc32_int16(values, count, CRC_TABLES) == zlib.crc32(values[:count].astype("<i2").tobytes())


@pytest.mark.parametrize("base", [3, 5, 7, 11, 16, 20, 200, 255, 257, 601, 65535])
def test_any_bytes_unpack_to_the_digits_of_the_reference(base: int) -> None:
    form, work = alphabet(base), cpu.workspace()
    for count in (1, 13, 500):
        data = np.random.default_rng(count).integers(0, 256, form.nbytes(count)).astype(np.uint8)
        data[: count // 3] = 255
        data.flags.writeable = False
        unpack_digits(form, data, 0, count, work.spare, work.fields, work.wide, work.digits)
        assert work.digits[:count].max() < base
        assert work.digits[:count].tolist() == reference.unpack(data.tobytes(), count, base)
        digits = work.digits[:count].astype(np.int64)
        assert reference.unpack(reference.pack(digits, base), count, base) == digits.tolist()


@pytest.mark.parametrize("shape", [1, 100, 4096, (64, 3)])
def test_buffers_are_zeros_that_share_no_cache_line(shape: int | tuple[int, ...]) -> None:
    made = [buffer(shape, kind) for kind in (np.uint8, np.uint16, np.float32, np.int64) for _ in range(3)]
    lines: set[int] = set()
    for array in made:
        assert array.shape == (shape if isinstance(shape, tuple) else (shape,))
        assert not array.any()
        first, last = array.ctypes.data, array.ctypes.data + array.nbytes - 1
        assert first % LINE_BYTES == 0
        mine = set(range(first // LINE_BYTES, last // LINE_BYTES + 1))
        assert not mine & lines
        lines |= mine


def test_numbers_in_nibbles_round_trip() -> None:
    for value in (0, 1, 7, 8, 63, 64, 300, 2**31, 2**32 - 1, 2**33 - 1):
        for begin in (0, 1):
            out = np.zeros(16, np.uint8)
            end = escapes.put_number(value, out, begin)
            frozen = out.view()
            frozen.flags.writeable = False
            assert escapes.get_number(frozen, begin) == (value, end)
            assert end - begin == len(reference._nibbles(value)) <= escapes.MOST_NIBBLES
            # Cut short there are zeros: never more than what was written, and always an end.
            assert escapes.get_number(frozen[: end >> 2], begin)[0] <= value
    for value in (0, 1, -1, 2**31 - 1, -(2**31)):
        assert escapes.unfolded(escapes.folded(value)) == value


@pytest.mark.parametrize("half", [1, 2, 126, 65534])
def test_escapes_round_trip_as_the_reference_writes_them(half: int) -> None:
    distances = [1, 2, 3, 4, 5, 36, 1000, 2**20, 2**31 - 3, 2**31 - 2, 2**31 - 1, 2**40]
    x = np.float32(-1.2345e-20)
    for distance in distances:
        for digit in (-distance, half + distance):
            out = np.zeros(8, np.uint8)
            end = escapes.put_escape(float(digit), half, int(x.view(np.uint32)), out, 1)
            data = out.view()
            data.flags.writeable = False
            expected = reference.escape_nibbles(x, digit if digit < 0 else digit - half)
            assert [int(data[i >> 1]) >> (4 * (i & 1)) & 15 for i in range(1, end)] == expected
            assert end - 1 <= escapes.ESCAPE_NIBBLES
            found, bits, behind = escapes.get_escape(data, 1, half)
            assert behind == end
            near = distance <= 2**31 - 2
            assert (bits == escapes.NOT_RAW) == near
            assert found == digit if near else bits == x.view(np.uint32)


def _vector(n: int, kind: str) -> NDArray[np.float32]:
    rng = np.random.default_rng(n)
    x = rng.standard_normal(n).astype(np.float32)
    if kind == "heavy":
        x = rng.standard_t(2, n).astype(np.float32)
    elif kind == "gaps":
        x[(np.arange(n) // 64) % 3 == 0] = 0
        x[4096:8192] = 0
    elif kind == "spikes":
        x *= np.float32(1e-6)
        x[::97] *= np.float32(1e9)
    elif kind == "tiny":
        x *= np.float32(1e-42)
    elif kind == "huge":
        x *= np.float32(1e36)
    return x


SCHEMES: list[tuple[str, dict[str, Any]]] = [
    ("dqsg", {"levels": 0.5}),
    ("dqsg", {"levels": 1}),
    ("dqsg", {"levels": 1.5, "bucket": 0}),
    ("dqsg", {"levels": 2, "bucket": 64}),
    ("dqsg", {"levels": 3}),
    ("dqsg", {"levels": 7.5, "bucket": 8192}),
    ("dqsg", {"levels": 63}),
    ("dqsg", {"levels": 64}),
    ("dqsg", {"levels": 127.5}),
    ("dqsg", {"levels": 300, "bucket": 256}),
    ("dqsg", {"levels": 1000.5, "bucket": 512}),
    ("dqsg", {"levels": 32767, "bucket": 0}),
    ("dqsg", {"step": "l2", "levels": 1}),
    ("dqsg", {"step": "l2", "levels": 300, "bucket": 512}),
    ("dqsg", {"step": "rms"}),
    ("dqsg", {"step": "rms", "levels": 0.5}),
    ("dqsg", {"step": "rms", "levels": 1.5}),
    ("dqsg", {"step": "rms", "levels": 3, "resolution": 0.5, "bucket": 128}),
    ("dqsg", {"step": "rms", "levels": 63, "resolution": 0.03}),
    ("dqsg", {"step": "rms", "levels": 100, "resolution": 0.01}),
    ("dqsg", {"step": "rms", "levels": 300, "resolution": 0.001, "bucket": 64}),
    ("dqsg", {"step": "rms", "levels": 4, "resolution": 1e-6, "bucket": 0}),
    ("dqsg", {"nmse": 0.1}),
    ("dqsg", {"nmse": 1e-7, "levels": 1, "bucket": 256}),
    ("dqsg", {"bits": 3}),
    ("dqsg", {"bits": 1.9, "levels": 0.5}),
    ("qsgd", {"levels": 1}),
    ("qsgd", {"step": "l2", "levels": 7}),
    ("qsgd", {"step": "l2", "levels": 200, "bucket": 64}),
    ("qsgd", {"step": "rms", "levels": 1, "resolution": 0.5}),
    ("qsgd", {"bits": 2.5}),
    ("maxnorm", {"bits": 2}),
    ("maxnorm", {"bits": 8}),
    ("maxnorm", {"bits": 15}),
    ("terngrad", {"clip": 0}),
]


@pytest.mark.parametrize("kind", ["normal", "heavy", "gaps", "spikes", "tiny", "huge"])
@pytest.mark.parametrize(("name", "options"), SCHEMES, ids=str)
def test_bytes_and_values_are_those_of_the_reference(name: str, options: dict[str, Any], kind: str) -> None:
    _compare(name, options, kind, 4096 + 1100)


@pytest.mark.parametrize("kind", ["normal", "gaps", "tiny"])
@pytest.mark.parametrize(
    "options",
    [{}, {"levels": 1.5, "ratio": 2}, {"ratio": 5, "bucket": 64}, {"step": "rms", "resolution": 0.3, "alpha": 0.7}],
    ids=str,
)
def test_ndqsg_writes_the_bytes_of_the_reference(options: dict[str, Any], kind: str) -> None:
    _compare("ndqsg", options, kind, 4096 + 1100)


def test_vectors_of_zeros_and_of_nothing_are_those_of_the_reference() -> None:
    for name, options in SCHEMES:
        for kind, n in (("normal", 0), ("normal", 1), ("gaps", 30)):
            _compare(name, options, kind, n)


def _compare(name: str, options: dict[str, Any], kind: str, n: int) -> None:
    address = Address(seed=99, round=4, sender=2, domain=Domain.UPDATE, start=1000)
    used = codec(name, **options)
    x = _vector(n, kind)
    encoded = used.encode(torch.from_numpy(x), address)
    scheme = _scheme(used, encoded)
    body, escaped = reference.encode(x, address, scheme)
    assert encoded.header.tail_bytes == escaped
    assert encoded.to_bytes()[HEADER.size :] == body
    assert encoded.nbytes <= used.max_nbytes(n)
    if not used.needs_side_information:
        np.testing.assert_array_equal(
            used.decode(encoded, address).numpy(), reference.decode(body, n, address, scheme), strict=True
        )


def _scheme(used: Codec, encoded: Encoded) -> reference.Scheme:
    """What the options mean, from their description."""
    chosen = used.options.model_dump()
    if used.name == "maxnorm":
        return reference.Scheme(levels=2 ** chosen["bits"] - 1, bucket=0, subtract=False)
    if used.name == "terngrad":
        return reference.Scheme(levels=1, bucket=0, subtract=False)
    given = chosen["bits"] is not None and encoded.coordinates > 0
    aimed = chosen["nmse"] is not None
    return reference.Scheme(
        levels=chosen["levels"],
        rule="rms" if chosen["step"] == "target" else chosen["step"],
        resolution=math.sqrt(12 * chosen["nmse"]) if aimed else chosen["resolution"] or 1.0,
        bucket=chosen["bucket"],
        escapes=chosen["step"] in ("rms", "target") and used.name != "ndqsg",
        subtract=used.name != "qsgd",
        ratio=chosen.get("ratio"),
        alpha=chosen.get("alpha", 1.0),
        step=encoded.data[HEADER.size :][:4].view(np.float32)[0] if given else None,
    )
