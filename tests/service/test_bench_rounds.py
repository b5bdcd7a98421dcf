"""`ditherps bench rounds`: real processes, nothing computed, and a codec for each direction."""

from __future__ import annotations

import pytest

from ditherps.bench.rounds import measure
from ditherps.errors import OptionError

COORDINATES = 20_000


@pytest.mark.slow
def test_each_direction_has_its_codec() -> None:
    record = measure("dqsg:levels=1.5/none", workers=1, rounds=6, coordinates=COORDINATES)
    assert (record["codec"], record["uplink_codec"], record["downlink_codec"]) == (
        "dqsg:levels=1.5/none", "dqsg:levels=1.5", "none",
    )  # fmt: skip
    assert 2 <= 8 * record["uplink_bytes"] / COORDINATES < 3
    assert 32 <= 8 * record["downlink_bytes"] / COORDINATES < 33
    assert record["step_encode_seconds"] == 0
    assert 0 < record["seconds_min"] <= record["seconds_median"] <= record["seconds_max"]


def test_a_wrong_name_is_refused_before_anything_starts() -> None:
    with pytest.raises(OptionError, match="UP or UP/DOWN"):
        measure("dqsg//none", workers=1, rounds=6, coordinates=10)
