"""`ditherps bench fleet`: one real server process, and many light workers on channels of their own."""

from __future__ import annotations

import pytest

from ditherps_worker.bench import CONNECTION_BYTES, measure

COORDINATES, WORKERS, ROUNDS = 20_000, 40, 5


@pytest.mark.slow  # a server process, and kernels to load in both
@pytest.mark.timeout(240)
def test_every_round_closes_with_all_workers() -> None:
    record = measure("ndqsg/dqsg:levels=1", WORKERS, ROUNDS, COORDINATES)  # raises where a round lacks one
    assert (record["workers"], record["rounds"]) == (WORKERS, ROUNDS)
    # Each pushes a whole contribution in every round, and pulls the step of w that the round before made.
    assert 1.0 <= 8 * record["contribution_bytes"] / COORDINATES < 4
    assert record["uplink_bytes"] > WORKERS * record["contribution_bytes"]
    assert record["downlink_bytes"] > WORKERS * 1.58 * COORDINATES / 8
    assert 0 < record["seconds_median"] <= record["seconds_max"]
    assert record["cpu_seconds"] > 0
    # Generous: figures belong to the benchmark.
    grown = record["peak_bytes"] - record["idle_bytes"]
    assert 0 <= grown < (64 << 20) + WORKERS * (record["contribution_bytes"] + CONNECTION_BYTES)
