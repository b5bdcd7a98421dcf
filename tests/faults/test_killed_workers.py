"""Workers that are killed with -9 and started again, while the server goes on."""

from __future__ import annotations

import random
import signal
from typing import Any

import pytest

from tests.faults.runs import Run
from tests.service.harness import Cluster, wait_until

JOB: dict[str, Any] = {
    "workers": 4, "optimizer": {"lr": 0.05, "momentum": 0.9}, "evaluate_every": 50, "idle_timeout_seconds": 3.0,
}  # fmt: skip
CODECS = ["ndqsg", "dqsg"]


def killed(run: Run, index: int) -> None:
    """Kill a worker."""
    name = run.job.config.member_table[index]
    process = run.cluster.processes[name]
    assert process.poll() is None
    run.cluster.kill(name)
    assert process.returncode == -signal.SIGKILL


def in_newest(run: Run, index: int) -> bool:
    """Whether this worker took part in the round that closed last."""
    records = run.cluster.records()
    return bool(records) and index in records[-1]["workers"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("codec", CODECS)
def test_with_a_quorum_of_all_each_round_waits_for_the_killed(
    cluster: Cluster, faults_in_full: bool, codec: str
) -> None:
    kills = 12 if faults_in_full else 2
    choice = random.Random(kills)
    run = Run(cluster, rounds=15 * kills, codec=codec, **JOB)
    run.pace(0.05)
    run.server()
    run.workers()
    reach = 0
    for _ in range(kills):
        reach += choice.randrange(2, 10)
        cluster.reached(reach)
        index = choice.randrange(4)
        killed(run, index)
        run.worker(index)
    run.pace(0.0)
    result = run.ended_well()
    assert [record["workers"] for record in cluster.records()] == [[0, 1, 2, 3]] * run.job.config.rounds
    assert result["model_sha256"] == run.expected()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("codec", CODECS)
def test_with_a_quorum_of_three_quarters_rounds_go_on_and_say_who_was_absent(
    cluster: Cluster, faults_in_full: bool, codec: str
) -> None:
    """Who is killed while a round is open is absent with a reason; who is away when one opens is not invited to it.

    Where roles have a quorum each, two of two, an attempt without one of them is given up at its deadline, and what
    workers encode in other roles has another attempt's dither.
    """
    kills = 8 if faults_in_full else 2
    choice = random.Random(kills)
    run = Run(cluster, rounds=400 * kills, codec=codec, quorum=0.75, round_deadline_seconds=8.0, **JOB)
    run.pace(0.1)
    run.server()
    run.workers()
    for kill in range(kills):
        index = choice.randrange(4)
        wait_until(lambda i=index: in_newest(run, i), 120, f"worker {index} taking part")
        cluster.reached(cluster.records()[-1]["version"] + choice.randrange(1, 4))
        killed(run, index)
        wait_until(lambda i=index: not in_newest(run, i), 60, f"a round without worker {index}")
        run.worker(index)
        if kill == kills - 1:
            wait_until(lambda i=index: in_newest(run, i), 120, f"worker {index} taking part")
    run.pace(0.0)
    result = run.ended_well()
    records = cluster.records()
    without = [record for record in records if len(record["workers"]) < 4]
    assert len(without) >= kills
    assert all(len(record["workers"]) >= 3 for record in records)
    for record in records:  # nobody is both in and absent, and whoever is absent has a reason
        assert not set(record["workers"]) & set(map(int, record["absent"]))
        assert set(record["absent"].values()) <= {"silent", "deadline", "left"}
    print(f"rounds without one: {len(without)}; attempts beyond the first: {sum(r['attempt'] > 0 for r in records)}")
    if codec == "dqsg":
        assert sum(bool(record["absent"]) for record in records) >= 1
    assert result["model_sha256"] == run.expected(records)
    assert result["model_sha256"] != run.expected()
