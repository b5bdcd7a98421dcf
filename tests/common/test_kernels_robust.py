"""Sorting networks sort, middles are those of sorted columns, distances and norms are those of float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from ditherps.dither import TILE
from ditherps.kernels import robust

Block = NDArray[np.float32]


def drawn(rows: int, columns: int, seed: int = 0) -> Block:
    """Normal values of very different sizes, with ties among the senders."""
    draw = np.random.default_rng(seed)
    block = draw.normal(size=(rows, columns)) * 10.0 ** draw.integers(-6, 6, columns)
    block[:, ::3] = draw.integers(-2, 3, (rows, len(range(0, columns, 3))))
    return block.astype(np.float32)


def middle(block: Block, first: int, last: int) -> Block:
    out = np.full(block.shape[1], np.nan, np.float32)
    pairs = robust.sorting_network(len(block), first, last)
    robust.middle_mean(np.ascontiguousarray(block).view(np.int32), pairs, np.int64(first), np.int64(last), out)
    return out


def reference(block: Block, first: int, last: int) -> Block:
    """Column by column: sort, add from the lowest on, divide."""
    result = []
    for column in block.T.tolist():
        total = 0.0
        for value in sorted(column)[first:last]:
            total += value
        result.append(total / (last - first))
    return np.array(result, np.float32)


@pytest.mark.parametrize("rows", range(1, 11))
def test_a_network_puts_every_wanted_rank_in_its_place(rows: int) -> None:
    """All columns of zeros and ones: a network that sorts these sorts everything (Knuth 5.3.4, theorem Z)."""
    columns = np.array(list(itertools.product((0, 1), repeat=rows)))
    for first, last in [(0, rows), ((rows - 1) // 2, rows // 2 + 1), (min(1, rows - 1), rows)]:
        found = columns.copy()
        for low, high in robust.sorting_network(rows, first, last):
            found[:, [low, high]] = np.sort(found[:, [low, high]], axis=1)
        assert (found[:, first:last] == np.sort(columns, axis=1)[:, first:last]).all()


def test_a_median_takes_fewer_exchanges_than_sorting() -> None:
    assert len(robust.sorting_network(8, 0, 8)) == 19
    assert len(robust.sorting_network(9, 4, 5)) < len(robust.sorting_network(9, 0, 9))
    assert robust.sorting_network(1, 0, 1).shape == (0, 2)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 13, 32])
@pytest.mark.parametrize("columns", [1, robust.STRIP - 1, robust.STRIP, 3 * robust.STRIP + 7])
def test_the_middle_is_the_references_bit_for_bit(rows: int, columns: int) -> None:
    block = drawn(rows, columns)
    before = block.copy()
    for cut in {0, (rows - 1) // 2, (rows - 1) // 3}:
        assert middle(block, cut, rows - cut).tobytes() == reference(block, cut, rows - cut).tobytes()
    np.testing.assert_array_equal(block, before)


@pytest.mark.parametrize("rows", [3, 4, 7, 8])
def test_the_median_is_numpys(rows: int) -> None:
    block, cut = drawn(rows, 1000), (rows - 1) // 2
    np.testing.assert_array_equal(middle(block, cut, rows - cut), np.median(block.astype(np.float64), 0).astype("f4"))


def test_permuting_the_senders_changes_no_bit() -> None:
    block = drawn(7, 999)
    block[2, ::5], block[3, ::5] = 0.0, -0.0
    block[4, ::7] = np.nan
    block[5, ::7] = -np.inf
    draw = np.random.default_rng(1)
    for cut in (0, 1, 3):
        first = middle(block, cut, 7 - cut)
        for _ in range(10):
            assert middle(block[draw.permutation(7)], cut, 7 - cut).tobytes() == first.tobytes()


def test_what_is_not_a_number_is_cut_with_the_largest() -> None:
    block = np.array([[1], [np.nan], [2], [-np.inf], [3]], np.float32)
    assert middle(block, 1, 4).tolist() == [2.0]
    assert middle(block, 2, 3).tolist() == [2.0]
    assert np.isinf(middle(block, 0, 2)).all()


def test_large_values_do_not_overflow_on_the_way() -> None:
    block = np.full((4, 3), np.finfo(np.float32).max, np.float32)
    assert middle(block, 0, 4).tolist() == block[0].tolist()


@pytest.mark.parametrize("columns", [1, 63, 64, 65, TILE, 2 * TILE + 100])
def test_distances_and_norms_by_tile(columns: int) -> None:
    block = drawn(4, columns)
    tiles = -(-columns // TILE)
    distances, norms = np.full((tiles, 4, 4), np.nan), np.full((tiles, 4), np.nan)
    robust.squared_distances(block, distances)
    robust.squared_norms(block, norms)
    for tile in range(tiles):
        part = block[:, tile * TILE : (tile + 1) * TILE].astype(np.float64)
        np.testing.assert_allclose(norms[tile], (part**2).sum(1), rtol=1e-12)
        apart = ((part[:, None] - part[None]) ** 2).sum(2)
        np.testing.assert_allclose(distances[tile], np.tril(apart), rtol=1e-12)
        np.testing.assert_allclose(distances[tile] + distances[tile].T, apart, rtol=1e-12)
