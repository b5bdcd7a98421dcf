"""A server that is killed and goes on from its checkpoint, and what its workers hold meanwhile."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service.harness import Cluster, wait_until

ROUNDS = 5000  # more than there will be
JOB = (
    "--task", "digits", "--workers", 4, "--rounds", ROUNDS, "--codec", "dqsg", "--set", "downlink.digest_every=1",
    "--set", "quorum=0.5", "--set", "round_deadline_seconds=20", "--set", "idle_timeout_seconds=20",
)  # fmt: skip
HOLDS = re.compile(r"holds version=(\d+) digest=([0-9a-f]{32})")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path / "run")
    (tmp_path / "run").mkdir()
    yield cluster
    cluster.close()


def records(cluster: Cluster) -> list[dict[str, Any]]:
    from ditherps.plots import read_records

    path = cluster.run_dir / "rounds.jsonl"
    return read_records(cluster.run_dir) if path.exists() and path.read_text().endswith("\n") else []


def begin(cluster: Cluster, index: int) -> None:
    """Start a worker whose log goes on in one file over all of its lives."""
    with (cluster.run_dir.parent / f"worker-{index}.log").open("a") as log:
        cluster.worker(f"worker-{index}", "--verbose", stderr=log)


def reached(cluster: Cluster, version: int) -> None:
    """Returns when the round that makes this version has closed."""
    wait_until(lambda: (found := records(cluster)) and found[-1]["version"] >= version, 90, f"version {version}")


def takes_part(cluster: Cluster, index: int) -> None:
    """Returns when this worker has contributed to the newest round."""
    wait_until(lambda: (found := records(cluster)) and index in found[-1]["workers"], 90, f"worker {index}")


@pytest.mark.slow
def test_w_has_one_digest_on_all_in_a_run_with_joins_leaves_and_a_restart(cluster: Cluster, tmp_path: Path) -> None:
    cluster.server(*JOB, "--checkpoint-every", 1)
    for index in (0, 1, 2, 3):
        begin(cluster, index)
    reached(cluster, 5)
    cluster.kill("worker-3")
    reached(cluster, 9)
    cluster.kill("server")
    cluster.server(*JOB, "--checkpoint-every", 1, "--resume")
    begin(cluster, 3)
    takes_part(cluster, 3)
    cluster.kill("worker-1")
    reached(cluster, records(cluster)[-1]["version"] + 5)
    begin(cluster, 1)
    takes_part(cluster, 1)
    reached(cluster, records(cluster)[-1]["version"] + 5)
    cluster.close()

    rounds = records(cluster)
    assert [record["version"] for record in rounds] == list(range(1, len(rounds) + 1))
    server = {record["version"]: record["w_digest"] for record in rounds}
    shown = 0
    for index in range(4):
        for version, digest in HOLDS.findall((tmp_path / f"worker-{index}.log").read_text()):
            assert server[int(version)] == digest, (index, version)
            shown += 1
    # Version 0 is not shown by a digest of its own, the last one is not pulled.
    took_part = sum(len(record["workers"]) for record in rounds)
    assert shown > 0.9 * took_part - 8
    assert {len(record["workers"]) for record in rounds} >= {3, 4}
