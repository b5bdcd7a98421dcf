"""`mode = auto`: the arithmetic of bits, and what it says."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import numpy as np
import pytest

import ditherps
from ditherps.samples.choice import Plan, choose, hit_rate, most_sample_bits, nominal_bits
from ditherps.tasks import Features

MNIST = Plan(
    task="mnist",
    coordinates=266_610,
    gradient_bits=1.6,
    features=784,
    sample_bits=2.2,
    classes=10,
    batch_size=32,
    rounds=469,
    shard_samples=15_000,
)


def test_small_samples_of_a_large_model_travel_as_data() -> None:
    choice = choose(MNIST)
    assert choice.mode == "data"
    assert choice.data_bits == pytest.approx((32 * 469 - 8) / 469 * (784 * 2.2 + np.log2(10)), rel=1e-3)
    assert choice.gradient_bits == 266_610 * 1.6
    assert choice.sentence == (
        "mode = data: for mnist a worker's round takes about 55.3 kbit as data (32 of 32 samples of 784 features at "
        "2.2 bits) and 427 kbit as a gradient (266610 coordinates at 1.6 bits)"
    )


@pytest.mark.parametrize(
    ("changed", "mode"),
    [
        ({"batch_size": 2000}, "gradient"),
        ({"coordinates": 20_000}, "gradient"),
        ({"features": 150_528}, "gradient"),
        ({"refinement_bits": 1.0}, "data"),
        ({"refinement_bits": 1.6}, "gradient"),
        ({"gradient_bits": 0.1}, "gradient"),
        ({"gradient_bits": 0.1, "rounds": 4690, "cached": 1.0}, "data"),
        ({"gradient_bits": 0.1, "rounds": 4690, "cached": 0.0}, "gradient"),
    ],
)
def test_what_counts(changed: dict[str, float], mode: str) -> None:
    choice = choose(dataclasses.replace(MNIST, **changed))  # type: ignore[arg-type]
    assert choice.mode == mode
    assert choice.sentence.startswith(f"mode = {mode}: ")


def test_the_cache_spares_all_but_the_first_epoch() -> None:
    ten = dataclasses.replace(MNIST, rounds=4690)
    kept = choose(dataclasses.replace(ten, cached=1.0))
    assert kept.data_bits == pytest.approx(choose(ten).data_bits / 10, rel=1e-3)
    assert "3.2 of 32 samples" in kept.sentence


def test_refinement_stands_in_the_sentence() -> None:
    sentence = choose(dataclasses.replace(MNIST, refinement_bits=0.5)).sentence
    assert "at 2.2 bits and 133 kbit of refinement)" in sentence


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_the_hit_rate_is_that_of_a_cache(share: float) -> None:
    rng, samples, hits = np.random.default_rng(0), 1000, 0
    cache: OrderedDict[int, None] = OrderedDict()
    for epoch in range(6):
        for id_ in rng.permutation(samples).tolist():
            hits += epoch > 0 and id_ in cache
            cache[id_] = None
            cache.move_to_end(id_)
            if len(cache) > share * samples:
                cache.popitem(last=False)
    assert hits / (5 * samples) == pytest.approx(hit_rate(share), abs=0.02)


def test_bits_of_even_values() -> None:
    """The entropy of an index given its dither, over values that are spread evenly."""
    pixels = Features((1,))
    for level in (0, 1, 2, 4):
        bits = []
        for v in (np.arange(64) + 0.5) / 64:  # the dither that is left at this level
            counts = np.bincount(np.floor(np.arange(256) / (256 / 2**level) + v).astype(int))
            shares = counts[counts > 0] / 256
            bits.append(-(shares * np.log2(shares)).sum())
        assert most_sample_bits(pixels, level) == pytest.approx(np.mean(bits), abs=0.03)
    assert most_sample_bits(pixels, 8) == 8
    assert most_sample_bits(Features((1,), high=(1,)), 1) == 1


def test_nominal_bits() -> None:
    assert nominal_bits(ditherps.codec("none"), 10_000) == pytest.approx(32, rel=0.01)
    assert nominal_bits(ditherps.codec("dqsg"), 266_610) == pytest.approx(1.61, abs=0.01)
    assert nominal_bits(ditherps.codec("dqsg", coder="rans"), 266_610) == pytest.approx(2.1, abs=0.1)
