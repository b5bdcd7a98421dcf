"""A server that is killed with -9 at any moment, and resumed: the run ends as if nothing had happened.

Its workers are never touched: they find the server again by themselves.
"""

from __future__ import annotations

import random
import signal
import time
from typing import Any

import pytest

from tests.faults.points import command, fired
from tests.faults.runs import Run
from tests.service.harness import Cluster

JOB: dict[str, Any] = {"workers": 3, "codec": "ndqsg", "optimizer": {"lr": 0.05, "momentum": 0.9}, "evaluate_every": 50}
CHECKPOINT = ("--checkpoint-every", 5)

POINTS = [
    # A checkpoint: written but not in place, when it is the first of a life and later; in place, its folder unsynced.
    "kill:before:pathlib:Path.replace@checkpoint.safetensors:2",
    "kill:before:pathlib:Path.replace@checkpoint.safetensors:1",
    "kill:after:pathlib:Path.replace@checkpoint.safetensors:2",
    # A contribution: whole but not counted; counted but not acknowledged.
    "kill:before:ditherps_server.coordinator:Coordinator.deliver:8",
    "kill:after:ditherps_server.coordinator:Coordinator.deliver:8",
    # The redo log: a contribution or a member list not yet in it, and in it, but nobody knows; cut, or about to be.
    "kill:before:ditherps_server.redo:RedoLog._write:9",
    "kill:after:ditherps_server.redo:RedoLog._write:10",
    "kill:after:ditherps_server.coordinator:Coordinator._write_closed:3",
    "kill:before:ditherps_server.redo:RedoLog.begin:2",
    "kill:after:ditherps_server.redo:RedoLog.begin:2",
    # A round: applied but not recorded; recorded but nobody told.
    "kill:after:ditherps_server.updater:Updater.apply:4",
    "kill:after:ditherps_server.records:Recorder.add:6",
]
SOME_POINTS = (POINTS[0], POINTS[4], POINTS[7], POINTS[8], POINTS[10])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_server_killed_at_random_moments(cluster: Cluster, faults_in_full: bool) -> None:
    kills = 50 if faults_in_full else 6
    choice = random.Random(kills)
    run = Run(cluster, rounds=20 * kills, **JOB)
    run.pace(0.05)
    run.server(*CHECKPOINT)
    run.workers()
    cluster.reached(1)
    for _ in range(kills):
        if choice.random() < 0.8:  # while rounds go on
            cluster.await_server()
            version = cluster.records()[-1]["version"] if cluster.records() else 0
            cluster.reached(version + 1)
            time.sleep(choice.uniform(0.0, 0.5))
        else:  # while it starts, or waits for its workers
            time.sleep(choice.uniform(0.0, 2.0))
        process = cluster.processes["server"]
        cluster.kill("server")
        assert process.returncode == -signal.SIGKILL
        run.begin_server(*CHECKPOINT, "--resume")
    cluster.await_server()
    run.pace(0.0)
    result = run.ended_well()
    assert result["model_sha256"] == run.expected()
    assert result["contributions"] == run.job.config.rounds * run.job.config.workers
    assert result["digest_mismatches"] == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_server_killed_at_named_points(cluster: Cluster, faults_in_full: bool) -> None:
    """One life after another of one run, each with its own point."""
    points = POINTS if faults_in_full else SOME_POINTS
    run = Run(cluster, rounds=20 * len(points), **JOB)
    for number, point in enumerate(points):
        marker = run.folder / f"marker-{number}"
        run.begin_server(*CHECKPOINT, *(["--resume"] if number else []), program=command(marker, point))
        if number == 0:
            cluster.await_server()
            run.workers()
        assert cluster.finish("server")[0] == -signal.SIGKILL, point
        assert fired(marker) == [point]
    run.server(*CHECKPOINT, "--resume")
    result = run.ended_well()
    assert result["model_sha256"] == run.expected()
    assert result["contributions"] == run.job.config.rounds * run.job.config.workers
