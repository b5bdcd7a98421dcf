"""Wire bytes, as the service counts them, against the TCP payload that a counting proxy sees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.link import link_to
from tests.service.harness import Cluster


def compare(tmp_path: Path, *job: object) -> tuple[float, float, dict[str, float]]:
    """Relative excess of what the proxy saw over wire bytes, up and down, and the figures."""
    cluster = Cluster(tmp_path)
    try:
        cluster.server("--workers", 2, *job)
        with link_to(cluster.address) as proxy:
            for index in range(2):
                cluster.worker(f"worker-{index}", server=proxy.address)
            result = cluster.result()
            for index in range(2):
                assert cluster.finish(f"worker-{index}")[0] == 0
    finally:
        cluster.close()
    figures = {
        "seen_up": proxy.uplink_bytes, "seen_down": proxy.downlink_bytes,
        "wire_up": result["uplink_bytes"], "wire_down": result["downlink_bytes"],
    }  # fmt: skip
    print(figures)
    return (
        proxy.uplink_bytes / result["uplink_bytes"] - 1,
        proxy.downlink_bytes / result["downlink_bytes"] - 1,
        figures,
    )


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("DITHERPS_DATA"), reason="DITHERPS_DATA does not say where mnist is")
@pytest.mark.parametrize("codec", ["dqsg", "none"])
def test_wire_bytes_are_what_a_proxy_sees_on_mnist(tmp_path: Path, codec: str) -> None:
    up, down, _ = compare(tmp_path, "--task", "mnist", "--codec", codec, "--rounds", 60)
    assert abs(up) < 0.02
    assert abs(down) < 0.02


def test_wire_bytes_are_close_to_what_a_proxy_sees_on_digits(tmp_path: Path) -> None:
    """The model is small, so the constant for each RPC weighs: it must be right to a few dozen bytes a round."""
    rounds = 60
    _, _, figures = compare(tmp_path, "--task", "digits", "--codec", "dqsg", "--rounds", rounds)
    for direction in ("up", "down"):
        difference = figures[f"seen_{direction}"] - figures[f"wire_{direction}"]
        assert abs(difference) < 60 * 2 * rounds, figures
