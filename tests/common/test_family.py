"""The shipped family of models: the file, and the constants beside it, are what their formulas say."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import special, stats

from ditherps.entropy import family as module
from ditherps.entropy.family import (
    BETAS,
    LINES,
    LOGARITHMS,
    OCTAVES,
    SCALES_PER_OCTAVE,
    SHAPES,
    SPIKES,
    TAIL_PROBABILITY,
    family,
    generate,
    logarithms,
    root,
    spikes,
)


def unit_mean(beta: float) -> float:
    """E|Z| of the density proportional to exp(-|z|^beta)."""
    return float(special.gamma(2 / beta) / special.gamma(1 / beta))


def test_the_file_is_what_its_formula_gives() -> None:
    tails = family().tails
    assert tails.dtype == np.uint32
    assert tails.shape == (SHAPES, OCTAVES * LINES + 2)
    # Another SciPy may round an entry the other way; what decides about bytes is the file.
    assert np.abs(tails.astype(np.int64) - generate().astype(np.int64)).max() <= 1
    assert np.all(np.diff(tails.astype(np.int64), axis=1) <= 0)
    np.testing.assert_array_equal(tails[:, 0], 1 << 30)  # half lies above zero
    assert tails.max() == 1 << 30


@pytest.mark.parametrize("shape", range(SHAPES))
def test_tails_are_those_of_a_generalised_gaussian_of_mean_one(shape: int) -> None:
    """By another function of SciPy than the one that made the file."""
    beta = BETAS[shape]
    line = np.arange(OCTAVES * LINES + 2)
    z = 2.0 ** (line // LINES - 3) * (1 + line % LINES / LINES) - 0.125
    expected = stats.gennorm.sf(z * unit_mean(beta), beta) * 2.0**31
    assert np.abs(family().tails[shape] - expected).max() <= 1.001


def test_reaches_follow_from_the_shapes() -> None:
    for beta, reach in zip(BETAS, family().reach, strict=True):
        z = special.gammainccinv(1 / beta, TAIL_PROBABILITY) ** (1 / beta) / unit_mean(beta)
        assert reach == round(12 * math.log2(z))


def test_ratios_are_half_way_between_the_shapes() -> None:
    own = [unit_mean(beta) ** 2 / (special.gamma(3 / beta) / special.gamma(1 / beta)) for beta in BETAS]
    assert own == sorted(own)
    assert len(family().ratios) == SHAPES - 1
    for border, below, above in zip(family().ratios, own[:-1], own[1:], strict=True):
        assert abs(border - (below + above) / 2) < 1e-4


def test_a_gaussian_and_a_laplace_are_among_the_shapes() -> None:
    """The ratio (E|Z|)^2 / E Z^2 of a Gaussian is 2 / pi, of a Laplace 1/2."""
    own = np.searchsorted(family().ratios, [2 / math.pi, 0.5])
    assert [BETAS[i] for i in own] == [2.0, 1.0]


def test_octaves_are_powers_rounded_down() -> None:
    octave = [int(value) for value in family().octave]
    assert len(octave) == SCALES_PER_OCTAVE
    assert octave[0] == 1 << 32
    for i, value in enumerate(octave):
        power = 1 << (32 * 12 - i)  # the twelfth power of what is rounded
        assert value**12 <= power < (value + 1) ** 12


def test_mantissas_are_the_borders_between_scales() -> None:
    mantissas = family().mantissas
    assert len(mantissas) == SCALES_PER_OCTAVE
    for i, value in enumerate(mantissas):
        exact = Fraction(float(value)) ** 24
        assert exact <= 2 ** (2 * i + 1) < (Fraction(float(value)) + Fraction(1, 2**52)) ** 24
    np.testing.assert_allclose(mantissas, 2.0 ** ((np.arange(12) + 0.5) / 12), rtol=1e-15)


def test_spikes_are_thirty_seconds_then_half_octaves() -> None:
    shares = spikes() / 65536
    assert len(shares) == SPIKES
    np.testing.assert_array_equal(shares[:32], np.arange(32) / 32)
    np.testing.assert_allclose(1 - shares[32:], 2.0 ** -(5.5 + 0.5 * np.arange(16)), atol=2.0**-16)
    assert np.all(np.diff(shares) > 0)
    np.testing.assert_array_equal(family().spikes, spikes())


def test_root_is_the_integer_root() -> None:
    rng = np.random.default_rng(0)
    for degree in (2, 3, 12, 24):
        for bits in (1, 5, 60, 400):
            value = int(rng.integers(1, 2**62)) >> max(62 - bits, 0) << max(bits - 62, 0) or 1
            found = root(degree, value)
            assert found**degree <= value < (found + 1) ** degree
    assert [root(3, value) for value in (1, 7, 8, 26, 27, 28)] == [1, 1, 2, 2, 3, 3]


def test_logarithms() -> None:
    table = logarithms()
    assert table.shape == (LOGARITHMS + 1,)
    assert table[0] == 0
    exact = np.log2(np.arange(1, LOGARITHMS + 1))
    assert np.abs(table[1:] - exact).max() < 2.0**-19
    powers = 1 << np.arange(13)
    np.testing.assert_array_equal(table[powers], np.arange(13))
    assert np.all(np.diff(table[1:]) > 0)
    np.testing.assert_array_equal(table * 2.0**20, np.rint(table * 2.0**20))


def test_the_family_is_read_once() -> None:
    assert family() is family()
    assert module._FILE.stat().st_size < 16384


@pytest.mark.parametrize("shape", range(SHAPES))
def test_interpolation_between_lines_is_fine_enough(shape: int) -> None:
    """A straight line between neighbours errs by less than half a slot of 4096, but for the peak of the sharpest."""
    beta = BETAS[shape]
    tails = family().tails[shape].astype(np.float64) / 2.0**31
    line = np.arange(OCTAVES * LINES)
    middle = 2.0 ** (line // LINES - 3) * (1 + (line % LINES + 0.5) / LINES) - 0.125
    exact = stats.gennorm.sf(middle * unit_mean(beta), beta)
    error = np.abs((tails[:-2] + tails[1:-1]) / 2 - exact)
    assert error[4:].max() < 0.5 / 4096
    assert error.max() < 4 / 4096
