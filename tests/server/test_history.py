"""The steps that the server keeps, and the cheapest way through them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ditherps
from ditherps.codecs import Encoded
from ditherps.downlink import step_address
from ditherps_server.history import Step, StepHistory, Way, cheapest


def encoded(coordinates: int) -> Encoded:
    """A payload of 32 + 4 * coordinates bytes."""
    return ditherps.codec("none").encode(torch.zeros(coordinates), step_address(1, 0))


def steps(*sizes: int, first: int = 0) -> list[Step]:
    return [
        Step(version, encoded((size - 32) // 4), 1.0, bytes([version])) for version, size in enumerate(sizes, first)
    ]


def filled(*sizes: int, most_steps: int = 1000, most_bytes: int = 1 << 20, first: int = 0) -> StepHistory:
    history = StepHistory(most_steps, most_bytes)
    for step in steps(*sizes, first=first):
        history.add(step)
    return history


def test_all_between_two_versions_or_nothing() -> None:
    history = filled(40, 44, 48, first=5)
    found = history.between(6, 8)
    assert found is not None
    assert [(step.version, step.nbytes) for step in found] == [(6, 44), (7, 48)]
    for version in range(5, 9):
        assert history.between(version, version) == ()
    assert history.between(99, 99) == ()  # who is there needs nothing
    for first, last in ((4, 8), (5, 9), (7, 6), (0, 3)):
        assert history.between(first, last) is None
    assert (history.digest_at(6), history.digest_at(8)) == (b"\x06", None)


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=30), st.integers(0, 12), st.integers(0, 400), st.integers(0, 100)
)
def test_it_keeps_the_newest_within_both_limits(sizes: list[int], most: int, most_bytes: int, first: int) -> None:
    sizes = [32 + 4 * size for size in sizes]
    history = filled(*sizes, most_steps=most, most_bytes=most_bytes, first=first)
    end = first + len(sizes)
    fit = sum(total <= most_bytes for total in itertools.accumulate(reversed(sizes)))
    kept = min(most, fit)
    assert (len(history), history.nbytes) == (kept, sum(sizes[len(sizes) - kept :]))
    assert history.between(end - kept, end) is not None
    if kept < len(sizes):
        assert history.between(end - kept - 1, end) is None


def test_a_gap_begins_anew() -> None:
    history = filled(40, 40)
    history.add(steps(40, first=7)[0])
    assert (len(history), history.between(0, 2)) == (1, None)
    assert history.between(7, 8) is not None


@pytest.mark.parametrize(
    ("held", "snapshots", "expected"),
    [
        (9, [(10, 100)], (9, False)),  # 40 + 1 bytes
        (8, [(10, 100)], (8, False)),  # 82
        (7, [(10, 100)], (10, True)),  # 123 > 100
        (7, [(10, 123)], (7, False)),  # equal: nothing whole needs to be sent
        (10, [(10, 100)], (10, False)),  # nothing at all
        (None, [(10, 100)], (10, True)),
        (None, [(10, 100), (8, 17)], (8, True)),  # 17 + 82 < 100
        (None, [(10, 100), (8, 18)], (10, True)),
        (9, [(10, 100), (9, 0)], (9, False)),
        (0, [(10, 500), (0, 1)], (0, False)),
        (4, [(10, 900), (3, 10)], (4, False)),
        (11, [(10, 100)], (10, True)),  # of a server's later life
    ],
)
def test_the_fewest_bytes(held: int | None, snapshots: list[tuple[int, int]], expected: tuple[int, bool]) -> None:
    history = filled(*[40] * 10)
    way = cheapest(history, held, 10, snapshots, 1)
    assert (way.first, way.snapshot) == expected
    assert [step.version for step in way.steps] == list(range(way.first, 10))


def test_what_is_forgotten_is_no_way() -> None:
    history = filled(*[40] * 10, most_steps=3)
    assert cheapest(history, 6, 10, [(10, 10**6)], 1) == Way(10, True, ())
    assert cheapest(history, None, 10, [(10, 10**6), (5, 1)], 1) == Way(10, True, ())
    assert cheapest(history, 7, 10, [(10, 10**6), (5, 1)], 1).first == 7
