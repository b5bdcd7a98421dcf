"""The dither stream: published vectors, golden vectors, random access, ranges, injectivity."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditherps import dither
from ditherps.dither import MAX_COORDINATES, SERVER, Address, Domain
from ditherps.errors import OptionError, UserError
from ditherps.kernels import philox, reference

GOLDEN = Path(__file__).parent / "golden" / "dither_v1.json"
ADDRESSES = 10**7  # in all, over all domains (issue 3, bar 5)
PIECE = 1 << 15  # coordinates at a time, so that the reference's arrays stay in the cache

KNOWN: list[tuple[tuple[int, int, int, int], tuple[int, int], str]] = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_published_vectors_reference(counter: tuple[int, int, int, int], key: tuple[int, int], expected: str) -> None:
    words = reference.philox(tuple(np.array([c], np.uint64) for c in counter), key)
    assert " ".join(f"{int(w[0]):08x}" for w in words) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_published_vectors_kernel(counter: tuple[int, int, int, int], key: tuple[int, int], expected: str) -> None:
    tile, column = divmod(counter[0], philox.COLUMNS)
    lanes = np.empty(philox.TILE, np.uint16)
    philox.philox_tile((*key, counter[1], counter[2], counter[3], 0), tile, lanes, np.empty(0, np.float32), 0)
    eight = lanes[column :: philox.COLUMNS]
    assert " ".join(f"{int(eight[2 * w]) | int(eight[2 * w + 1]) << 16:08x}" for w in range(4)) == expected


def _golden_addresses() -> list[Address]:
    plain = [Address(seed=7, round=3, sender=1, domain=domain) for domain in Domain]
    edges = [Address(0, 0, 0, Domain.UPDATE, start=start) for start in (0, 1, 511, 512, 4090, 4095, 4096, 1 << 20)]
    large = [Address(2**64 - 1, 2**32 - 1, SERVER, Domain.DOWNLINK, 2**24 - 1, start) for start in (2**35 - 40, 2**34)]
    attempts = [Address(1 << 33, 5, 2, Domain.UPDATE, attempt) for attempt in (0, 1, 255, 1 << 23)]
    return plain + edges + large + attempts


def test_golden_vectors() -> None:
    """Forty lanes of each address; the file is only rewritten on purpose."""
    actual = [
        {
            "seed": a.seed,
            "round": a.round,
            "sender": a.sender,
            "domain": int(a.domain),
            "attempt": a.attempt,
            "start": a.start,
            "lanes": dither.lanes(a, 40).tolist(),
        }
        for a in _golden_addresses()
    ]
    if os.environ.get("DITHERPS_WRITE_GOLDEN") == "1":
        GOLDEN.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in actual) + "\n]\n")
    assert actual == json.loads(GOLDEN.read_text())
    for address, entry in zip(_golden_addresses(), actual, strict=True):
        np.testing.assert_array_equal(reference.lanes_at(address, np.arange(40)), entry["lanes"])


def random_address(rng: np.random.Generator, domain: Domain, count: int) -> Address:
    """Fields over their whole ranges, both ends among them."""

    def drawn(bits: int) -> int:
        ends = (0, 1, 2**bits - 1)
        place = int(rng.integers(0, 20))
        return ends[place] if place < 3 else int(rng.integers(0, ends[2], dtype=np.uint64, endpoint=True))

    start = min(drawn(35), MAX_COORDINATES - count)
    return Address(drawn(64), drawn(32), drawn(32), domain, drawn(24), start)


def test_reference_equals_kernel_over_all_domains() -> None:
    """Bit for bit on `ADDRESSES` coordinates: nine tenths in sequence, the rest at random places."""
    rng = np.random.default_rng(0)
    compared = 0
    domains = list(Domain)
    while compared < ADDRESSES:
        domain = domains[compared // PIECE % len(domains)]
        address = random_address(rng, domain, PIECE)
        if compared // PIECE % 10:
            np.testing.assert_array_equal(dither.lanes(address, PIECE), reference.lanes_at(address, np.arange(PIECE)))
        else:
            places = rng.integers(0, MAX_COORDINATES - address.start, PIECE)
            np.testing.assert_array_equal(dither.lanes_at(address, places), reference.lanes_at(address, places))
        compared += PIECE


@pytest.mark.parametrize("start", [0, 1, 4095, 4096, 12345, MAX_COORDINATES - 20000])
def test_random_access_equals_sequential(start: int) -> None:
    address = Address(2**40 + 9, 3, 1, Domain.SAMPLE, 5, start)
    positions = np.random.default_rng(start).integers(0, 20000, (7, 300))
    np.testing.assert_array_equal(dither.lanes_at(address, positions), dither.lanes(address, 20000)[positions])
    indices = positions // 4
    np.testing.assert_array_equal(dither.words_at(address, indices), dither.words(address, 5000)[indices])


def test_words_are_four_lanes() -> None:
    address = Address(1, 2, 3, Domain.ORDER, start=7)
    lanes = dither.lanes(address, 40).astype(object).reshape(10, 4)
    assert dither.words(address, 10).tolist() == [int(a | b << 16 | c << 32 | d << 48) for a, b, c, d in lanes]


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 4097, 10000])
def test_start_shifts_the_stream(count: int) -> None:
    whole = dither.lanes(Address(1, 2, 3, Domain.UPDATE), 15000)
    for start in (1, 511, 4096, 5000):
        part = dither.lanes(Address(1, 2, 3, Domain.UPDATE, start=start), count)
        np.testing.assert_array_equal(part, whole[start : start + count])


def test_dither_is_exact_and_centred() -> None:
    address = Address(1, 2, 3, Domain.UPDATE)
    u, lanes = dither.dither(address, 100000), dither.lanes(address, 100000)
    np.testing.assert_array_equal(u.astype(np.float64), (lanes + 0.5) / 65536 - 0.5)
    assert np.abs(u).max() < 0.5
    assert abs(u.mean(dtype=np.float64)) < 4 / np.sqrt(12 * u.size)


def test_permutation_and_uniforms() -> None:
    address = Address(1, 2, 3, Domain.ORDER)
    np.testing.assert_array_equal(np.sort(dither.permutation(address, 1000)), np.arange(1000))
    assert dither.permutation(address, 0).tolist() == []
    uniforms = dither.uniforms(address, 10000)
    assert uniforms.min() > 0
    assert uniforms.max() < 1
    assert abs(uniforms.mean() - 0.5) < 4 / np.sqrt(12 * uniforms.size)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 2**64),
        ("seed", -1),
        ("round", 2**32),
        ("sender", 2**32),
        ("attempt", 2**24),
        ("start", 2**35),
        ("round", 1.5),
        ("domain", 200),
    ],
)
def test_fields_that_do_not_fit_are_refused_by_name(field: str, value: object) -> None:
    fields: dict[str, object] = {"seed": 1, "round": 1, "sender": 1, "domain": Domain.UPDATE, field: value}
    with pytest.raises(OptionError, match=field):
        Address(**fields)  # type: ignore[arg-type]


def test_coordinates_beyond_the_counter_are_refused() -> None:
    last = Address(1, 1, 1, Domain.UPDATE, start=MAX_COORDINATES - 1)
    assert dither.lanes(last, 1).size == 1
    with pytest.raises(UserError):
        dither.lanes(last, 2)
    for position in (1, -1):
        with pytest.raises(UserError):
            dither.lanes_at(last, [position])


fields_strategy = st.tuples(
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from(list(Domain)),
    st.integers(0, 2**24 - 1),
    st.integers(0, MAX_COORDINATES - 1),
)


@settings(max_examples=300, deadline=None)
@given(fields_strategy, fields_strategy)
def test_distinct_addresses_never_share_counter_and_lane(
    a: tuple[int, int, Domain, int, int], b: tuple[int, int, Domain, int, int]
) -> None:
    places = []
    for round_, sender, domain, attempt, start in (a, b):
        counter, lane = reference.place(Address(1, round_, sender, domain, attempt, start), np.zeros(1, np.int64))
        assert all(int(c[0]) < 2**32 for c in counter)
        places.append((*(int(c[0]) for c in counter), int(lane[0])))
    assert (places[0] == places[1]) == (a == b)


def test_neighbouring_coordinates_never_share_counter_and_lane() -> None:
    counter, lane = reference.place(Address(1, 2, 3, Domain.UPDATE), np.arange(100000))
    assert len(set(zip(counter[0].tolist(), lane.tolist(), strict=True))) == 100000
