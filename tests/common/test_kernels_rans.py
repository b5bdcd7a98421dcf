"""The coder's rows as vectors against the same loops one symbol at a time: equal bits for any table and any words."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ditherps import Address, Domain, codec
from ditherps.bench.codecs import AVX2_CPU, AVX2_FEATURES
from ditherps.kernels import rans, rans_wide
from ditherps.kernels.chunk_encoder import place_symbols
from ditherps.kernels.coder import DECODE, ENCODE, Coder, coder, use_explicit, use_model
from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.symbols import get_symbols, put_symbols
from ditherps.kernels.tables import CELLS, ESCAPE_SLOTS
from ditherps.kernels.vectors import WIDE, WIDTH, load, quotient, same, store

wide = pytest.mark.skipif(not WIDE, reason="needs a processor with AVX-512")

# (scale, shape, spike): few symbols and many, with and without classes.
FAMILY = [(76, 6, 0), (84, 6, 0), (90, 3, 7), (60, 0, 12), (100, 6, 0), (110, 7, 0), (130, 6, 0)]
SPANS = [(0, 100, 12), (0, 3, 2), (2, 40, 30), (3, 90, 80), (4, 60, 100), (4, 128, 1), (4, 16, 224)]


def explicit(class_bits: int, first: int, count: int, seed: int = 0) -> Coder:
    """The coder with tables of random slots in `count` cells from `first` on."""
    work, rng = coder(), np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(count, 0.3)) * (rans.SLOTS - ESCAPE_SLOTS)
    work.slots[:] = 0
    work.slots[first : first + count] = np.floor(shares)
    work.slots[first + count // 2] += rans.SLOTS - ESCAPE_SLOTS - work.slots.sum()
    for purpose in (ENCODE, DECODE):
        use_explicit(np.int64(class_bits), purpose, work)
    return work


def states(seed: int) -> NDArray[np.uint64]:
    return np.random.default_rng(seed).integers(rans.LOWEST, 1 << 31, rans.LANES).astype(np.uint64)


@wide
@pytest.mark.timeout(60)
def test_the_quotient_is_right_or_one_less_for_every_state_and_frequency() -> None:
    @kernel
    def farthest(freq: Int, dividends: NDArray[np.uint32], out: NDArray[np.uint32]) -> None:
        divisor = same(freq)
        for i in range(0, dividends.size, WIDTH):
            store(out, i, quotient(load(dividends, i), divisor))

    rng = np.random.default_rng(1)
    out = np.empty(6 * 512, np.uint32)
    for freq in range(1, rans.SLOTS + 1):
        # Around multiples, the largest ones among them, is where it could fail.
        q = np.concatenate((rng.integers(0, 1 << 19, 1000), [(1 << 19) - 1, (1 << 19) - 2, 0, 1, 2, 3] * 4))
        x = np.concatenate((q * freq, q * freq + freq - 1, np.maximum(q * freq - 1, 0)))[: out.size].astype(np.uint32)
        farthest(np.int64(freq), x, out)
        less = x.astype(np.int64) // freq - out.astype(np.int64)
        assert less.min() >= 0, freq
        assert less.max() <= 1, freq


def check(work: Coder, class_bits: int, bound: int, low_bits: int, seed: int) -> None:
    """Symbols of the model in `work` are coded and decoded alike, also where words are not what was encoded."""
    rng = np.random.default_rng(seed)
    for count in (4096, 4095, 1000, 17, 16, 15, 1):
        work.lanes[:] = rng.integers(0, 1 << 16, work.lanes.size)
        half = (CELLS // 2) >> class_bits
        work.indices[:] = np.clip(rng.standard_t(2, work.indices.size) * half / 6, -3 * half, 3 * half)
        place_symbols(np.int64(count), np.int64(class_bits), np.int64(low_bits), np.int64(bound), work)
        coded = work.entries[work.places[:count]] >> 16 != 0
        classes = (work.lanes.astype(np.int64) << class_bits) >> 16
        work.places[:count][~coded] = rans.PAD - classes[:count][~coded]
        ways = []
        for end in (rans.PAD + CELLS + 1, rans.PAD + 1):
            after, words = states(seed), np.zeros(8192, np.uint16)
            top = put_symbols(
                work.places, np.int64(count), work.entries, work.reciprocals, np.int64(rans.PAD + 1), np.int64(end),
                after, words, np.int64(words.size),
            )  # fmt: skip
            ways.append((int(top), words[top:].tobytes(), after.tobytes()))
        after, words = states(seed), np.zeros(8192, np.uint16)
        top = rans.put_symbols(
            work.places, np.int64(count), work.entries, work.reciprocals, after, words, np.int64(words.size)
        )
        assert ways == [(int(top), words[top:].tobytes(), after.tobytes())] * 2
        source = words[top:]
        for given in (source, source[: len(source) // 2], rng.integers(0, 1 << 16, 5000).astype(np.uint16), words[:0]):
            decode_both_ways(work, class_bits, count, given, after)


def decode_both_ways(
    work: Coder, class_bits: int, count: int, words: NDArray[np.uint16], first: NDArray[np.uint64]
) -> None:
    lanes, symbols, scratch = work.lanes[:count], np.empty(count, np.uint16), np.empty(count, np.uint8)
    groups = rans_wide.fill_rows(np.int64(class_bits), work.entries, work.rows)
    after = first.copy()
    last = get_symbols(
        lanes, np.int64(count), np.int64(class_bits), work.nearest, work.entries, work.rows, groups, after, words,
        np.int64(0), scratch, symbols,
    )  # fmt: skip
    expected, cells = first.copy(), np.empty(count, np.uint16)
    classes = ((lanes.astype(np.int64) << class_bits) >> 16).astype(np.uint8)
    expected_last = rans.get_symbols(
        classes, np.int64(count), np.int64(class_bits), work.nearest, work.entries, expected, words, np.int64(0), cells
    )
    assert last == expected_last
    np.testing.assert_array_equal(after, expected)
    np.testing.assert_array_equal(symbols, cells >> class_bits)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("row", FAMILY, ids=str)
def test_models_of_the_family(row: tuple[int, int, int]) -> None:
    work = coder()
    for dithered in (True, False):
        work.model[:] = -1
        for purpose in (ENCODE, DECODE):
            class_bits, low_bits, bound = use_model(np.array(row), dithered, purpose, work)
        check(work, int(class_bits), int(bound), int(low_bits and 1), seed=row[0])


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("class_bits", "first", "count"), SPANS)
def test_explicit_models(class_bits: int, first: int, count: int) -> None:
    for seed in range(3):
        check(explicit(class_bits, first, count, seed), class_bits, (1 << class_bits) - 1, 0, seed)


PAYLOADS: list[tuple[str, dict[str, Any]]] = [
    ("dqsg", {"resolution": resolution}) for resolution in (3.0, 1.6, 1.0, 0.5, 0.2, 0.01)
] + [("qsgd", {"bits": 2}), ("dqsg", {"bits": 1.5, "reconstruct": "matched"}), ("dqsg", {"bucket": 64})]  # fmt: skip


def digest() -> str:
    """Of payloads and what they decode to."""
    found = hashlib.sha256()
    for name, options in PAYLOADS:
        used = codec(name, coder="rans", **options)
        for n in (5000, 300_001):
            x = torch.from_numpy(np.random.default_rng(n).laplace(size=n).astype(np.float32))
            address = Address(seed=3, round=1, sender=2, domain=Domain.UPDATE, start=7)
            encoded = used.encode(x, address)
            found.update(encoded.to_bytes())
            found.update(used.decode(encoded, address).numpy().tobytes())
    return found.hexdigest()


@wide
@pytest.mark.slow  # all kernels are compiled once more, for another processor
@pytest.mark.timeout(600)
def test_payloads_are_the_same_without_vectors(tmp_path: Path) -> None:
    limited = {"NUMBA_CPU_NAME": AVX2_CPU, "NUMBA_CPU_FEATURES": AVX2_FEATURES, "NUMBA_CACHE_DIR": str(tmp_path)}
    program = (
        "from ditherps.kernels.vectors import WIDE; from tests.common.test_kernels_rans import digest; "
        "print(WIDE, digest())"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | limited, cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", digest()]
