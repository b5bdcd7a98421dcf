"""Kernels against the slow reference: packing, checksum, statistics, whole payloads."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ditherps import Address, Domain, codec
from ditherps.codecs.base import HEADER
from ditherps.kernels import exceptions, reference
from ditherps.kernels.checksum import CRC_TABLES, crc32_int16
from ditherps.kernels.packing import DIGITS, WIDE_FIELDS, pack, packing, unpack

ALPHABETS = [*range(2, 257), 257, 1000, 4097, 65535]


def _round_trip(base: int, digits: NDArray[np.uint16]) -> tuple[bytes, NDArray[np.uint16]]:
    fields, wide = np.empty(DIGITS, np.uint16), np.empty(WIDE_FIELDS, np.uint64)
    buffer = np.zeros(DIGITS, np.uint16)
    buffer[: digits.size] = digits
    out = np.full(packing(base).nbytes(digits.size) + 1, 0xA5, np.uint8)
    form = (*packing(base),)
    pack(form, buffer, digits.size, fields, wide, out, 0)
    assert out[-1] == 0xA5
    packed = out[:-1].view()
    packed.flags.writeable = False
    back = np.empty(DIGITS, np.uint16)
    unpack(form, packed, 0, digits.size, fields, wide, back)
    return packed.tobytes(), back[: digits.size]


@pytest.mark.parametrize("count", [1, 7, 100, 4095, 4096])
def test_packing_round_trip_for_every_alphabet(count: int) -> None:
    rng = np.random.default_rng(count)
    for base in ALPHABETS:
        digits = rng.integers(0, base, count).astype(np.uint16)
        digits[: count // 3] = base - 1
        np.testing.assert_array_equal(_round_trip(base, digits)[1], digits, err_msg=str(base))


@pytest.mark.parametrize("base", [2, 3, 4, 5, 6, 7, 9, 15, 16, 20, 29, 64, 76, 104, 128, 255, 256, 300])
def test_packing_equals_reference(base: int) -> None:
    for count in (1, 13, 500):
        digits = np.random.default_rng(base).integers(0, base, count).astype(np.uint16)
        assert _round_trip(base, digits)[0] == reference.pack(digits.astype(np.int64), base)


@pytest.mark.parametrize(
    ("base", "bits"), [(2, 1), (3, 1.602), (4, 2), (5, 2.338), (7, 2.825), (15, 4), (16, 4), (256, 8)]
)
def test_packing_is_as_small_as_measured(base: int, bits: float) -> None:
    assert 8 * packing(base).nbytes(4096) / 4096 <= bits
    assert all(8 * packing(k).nbytes(4096) / 4096 <= np.log2(k) + 1 for k in range(2, 257))


@pytest.mark.parametrize("base", [3, 5, 7, 11, 200])
def test_any_bytes_unpack_to_digits_of_the_alphabet(base: int) -> None:
    fields, wide, digits = np.empty(DIGITS, np.uint16), np.empty(WIDE_FIELDS, np.uint64), np.empty(DIGITS, np.uint16)
    data = np.random.default_rng(0).integers(0, 256, packing(base).nbytes(4096)).astype(np.uint8)
    data[:100] = 255
    data.flags.writeable = False
    unpack((*packing(base),), data, 0, 4096, fields, wide, digits)
    assert digits[:4096].max() < base


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 4095, 4096])
def test_checksum_is_zlibs(count: int) -> None:
    values = np.random.default_rng(count).integers(-(2**40), 2**40, 4096)
    assert crc32_int16(values, count, CRC_TABLES) == zlib.crc32(values[:count].astype("<i2").tobytes())


def test_varints_round_trip() -> None:
    out = np.zeros(16, np.uint8)
    for value in (0, 1, 127, 128, 300, 2**31, 2**36, 2**62):
        end = exceptions.put_varint(value, out, 1)
        frozen = out.view()
        frozen.flags.writeable = False
        assert exceptions.get_varint(frozen, 1, end) == (value, end)
        assert exceptions.get_varint(frozen, 1, end - 1)[1] == -1


def _vector(n: int, kind: str) -> NDArray[np.float32]:
    rng = np.random.default_rng(n)
    x = rng.standard_normal(n).astype(np.float32)
    if kind == "heavy":
        x = rng.standard_t(2, n).astype(np.float32)
    elif kind == "gaps":
        x[(np.arange(n) // 64) % 3 == 0] = 0
        x[4096:8192] = 0
    elif kind == "tiny":
        x *= np.float32(1e-42)
    elif kind == "huge":
        x *= np.float32(1e37)
    return x


SCHEMES: list[dict[str, Any]] = [
    {"levels": 0.5},
    {"levels": 1},
    {"levels": 1.5, "bucket": 0},
    {"levels": 2, "bucket": 64},
    {"levels": 3},
    {"levels": 7.5, "bucket": 8192},
    {"levels": 64},
    {"levels": 1000.5, "bucket": 512},
    {"step": "rms", "levels": 1.5},
    {"step": "rms", "levels": 3, "resolution": 0.5, "bucket": 128},
    {"step": "rms", "levels": 100, "resolution": 0.01},
    {"step": "rms", "levels": 4, "resolution": 1e-9, "bucket": 0},
]


@pytest.mark.parametrize("kind", ["normal", "heavy", "gaps", "tiny", "huge"])
@pytest.mark.parametrize("options", SCHEMES, ids=str)
def test_dqsg_writes_the_bytes_of_the_reference(options: dict[str, Any], kind: str) -> None:
    _compare("dqsg", options, kind, 4096 + 2100)


@pytest.mark.parametrize("kind", ["normal", "gaps", "tiny"])
@pytest.mark.parametrize(
    "options",
    [{}, {"levels": 1.5, "ratio": 2}, {"ratio": 5, "bucket": 64}, {"step": "rms", "resolution": 0.3, "alpha": 0.7}],
    ids=str,
)
def test_ndqsg_writes_the_bytes_of_the_reference(options: dict[str, Any], kind: str) -> None:
    _compare("ndqsg", options, kind, 4096 + 2100)


def _compare(name: str, options: dict[str, Any], kind: str, n: int) -> None:
    address = Address(seed=99, round=4, sender=2, domain=Domain.UPDATE, start=1000)
    used = codec(name, **options)
    x = _vector(n, kind)
    encoded = used.encode(torch.from_numpy(x), address)
    chosen = used.options.model_dump()
    scheme = reference.Scheme(
        levels=chosen["levels"],
        rms=chosen["step"] == "rms",
        resolution=chosen["resolution"] or 1.0,
        bucket=chosen["bucket"],
        ratio=chosen.get("ratio"),
        alpha=chosen.get("alpha", 1.0),
    )
    body, exceptions = reference.encode(x, address, scheme)
    assert encoded.header.tail_bytes == len(exceptions)
    assert encoded.to_bytes()[HEADER.size :] == body + exceptions
