"""Mode `data` as whole runs of real processes: what they end with, whatever the server keeps, and what they send."""

from __future__ import annotations

from typing import Any

import pytest

from ditherps_server.cache import ENTRY_BYTES
from tests.faults.conftest import _deterministic as _deterministic
from tests.faults.conftest import cluster as cluster
from tests.faults.runs import Run
from tests.service.harness import Cluster

pytestmark = pytest.mark.timeout(300)

TWO_EPOCHS: dict[str, Any] = {
    # A worker's 721 samples are seven batches.
    "task": "digits", "mode": "data", "workers": 2, "batch_size": 103, "rounds": 14, "evaluate_every": 14,
}  # fmt: skip
TINY: dict[str, Any] = {"task": "tests.tiny:Tiny", "mode": "data", "workers": 2, "batch_size": 8, "rounds": 20}
TINY_ENTRY_BYTES = ENTRY_BYTES + 12


def finished(run: Run, *order: int) -> dict[str, Any]:
    """The result of a whole run, whose workers start in this order."""
    run.server()
    for index in order or range(run.job.config.workers):
        run.worker(index)
    return run.ended_well()


def epochs_payload(run: Run, rounds: int) -> list[int]:
    """Bytes of payload of each so many rounds."""
    payload = [record["uplink_payload_bytes"] for record in run.cluster.records()]
    return [sum(payload[first : first + rounds]) for first in range(0, len(payload), rounds)]


@pytest.mark.slow
class TestDigits:
    def test_what_is_held_is_not_sent_again(self, cluster: Cluster) -> None:
        run = Run(cluster, **TWO_EPOCHS)
        result = finished(run)
        assert result["model_sha256"] == run.expected()
        first, second = epochs_payload(run, 7)
        assert first > 2 * 721 * 8
        assert second <= 0.05 * first
        assert result["uplink_payload_bytes"] == first + second

    def test_without_a_cache_the_model_is_the_same(self, cluster: Cluster) -> None:
        run = Run(cluster, **TWO_EPOCHS, data={"cache_bytes": 0})
        assert finished(run, 1, 0)["model_sha256"] == run.expected()
        assert run.expected() == Run(cluster, **TWO_EPOCHS).expected()
        first, second = epochs_payload(run, 7)
        assert second == pytest.approx(first, rel=0.02)

    @pytest.mark.parametrize("rule", ["weighted_mean", "median"])
    def test_refined(self, cluster: Cluster, rule: str) -> None:
        """And by a robust rule."""
        options = {**TWO_EPOCHS, "workers": 3, "rounds": 10, "aggregation": {"name": rule}}
        run = Run(cluster, **options, data={"refine": "dqsg", "probe_every": 3})
        assert finished(run, 2, 0, 1)["model_sha256"] == run.expected()


@pytest.mark.parametrize("model", ["norm", "wide"])
@pytest.mark.parametrize(
    "data",
    [
        {"level": 3, "cache_bytes": 40 * TINY_ENTRY_BYTES},
        {"refine": "dqsg:levels=1", "keep": 0.5, "probe_every": 1},
        {"keep": 0.125},  # of eight samples often one, and sometimes none
    ],
    ids=["small cache", "refined and gated", "gated"],
)
def test_buffers_dropout_and_augmentation(cluster: Cluster, model: str, data: dict[str, Any]) -> None:
    run = Run(cluster, **TINY, model=model, data=data)
    assert finished(run)["model_sha256"] == run.expected()
