"""What a server lacks, in few bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditherps.errors import OptionError, PayloadError
from ditherps.samples.codec import NOTHING
from ditherps.samples.need import Need, distinct


@given(st.integers(0, 15), st.data())
def test_it_arrives_as_it_was_meant(level: int, data: st.DataObject) -> None:
    held = np.array(data.draw(st.lists(st.integers(NOTHING, level), max_size=40)), np.int64)
    need = Need(held, level)
    sent = need.to_bytes()
    again = Need.from_bytes(sent, len(held), level)
    np.testing.assert_array_equal(again.held, held)
    assert bool(again) == bool((held < level).any())
    np.testing.assert_array_equal(again.lacking, held < level)
    assert len(sent) <= 1 + (len(held) * (level + 1).bit_length() + 7) // 8


def test_the_usual_needs_are_tiny() -> None:
    assert Need(np.full(1000, 2), 2).to_bytes() == b""
    assert len(Need(np.full(1000, NOTHING), 2).to_bytes()) == 1
    assert len(Need(np.array([NOTHING, 2] * 16), 2).to_bytes()) == 9


@pytest.mark.parametrize(
    "data", [b"\x04", b"\xfe", b"\xff\0", b"\xff" + b"\0" * 4, b"\xff\xff\xff\xff", b"\xff\0\0\0", b"\0\0\0\0"]
)
def test_anything_else_is_refused(data: bytes) -> None:
    """Nine samples at level 2: two bits each, in three bytes, of which the upper six bits are zero."""
    if data == b"\xff\0\0\0":
        assert (Need.from_bytes(data, 9, 2).held == NOTHING).all()
        data = b"\xff\0\0\x04"
    with pytest.raises(PayloadError):
        Need.from_bytes(data, 9, 2)


def test_a_need_of_nobody_says_nothing() -> None:
    assert Need(np.empty(0, np.int64), 3).to_bytes() == b""
    with pytest.raises(PayloadError):
        Need.from_bytes(b"\0", 0, 3)


def test_levels_beyond_what_is_asked_for_are_no_need() -> None:
    for held in ([3], [-2]):
        with pytest.raises(OptionError, match="held"):
            Need(np.array(held), 2)


def test_a_batch_names_each_sample_once() -> None:
    ids, where = distinct(np.array([7, 3, 7, 9, 3]))
    assert ids.tolist() == [3, 7, 9]
    assert ids[where].tolist() == [7, 3, 7, 9, 3]
