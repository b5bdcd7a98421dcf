"""What a run says to machines: JSON lines, TensorBoard's scalars, and health."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from ditherps.plots import read_records
from tests.service.harness import Cluster, run, wait_until


def test_json_lines_scalars_and_health_of_a_run(tmp_path: Path) -> None:
    cluster, board, socket = Cluster(tmp_path), tmp_path / "board", tmp_path / "s"
    try:
        cluster.server(
            "--workers", 2, "--rounds", 8, "--set", "quorum=0.5", "--codec", "dqsg", "--log-format", "json",
            "--tensorboard", board, "--health-socket", socket,
        )  # fmt: skip
        assert run(["health", f"unix:{socket}"]).returncode == 0
        assert run(["health", cluster.address]).returncode == 0
        assert run(["health", f"http://127.0.0.1:{cluster.metrics_port}/metrics"]).returncode == 0
        assert run(["health", "127.0.0.1:1"]).returncode == 6
        for index in range(2):
            cluster.worker(f"worker-{index}", "--log-format", "json")
        code, _, error = cluster.finish("server")
        assert code == 0, error
        told = [cluster.finish(f"worker-{index}")[2] for index in range(2)]
    finally:
        cluster.close()
    lines = [json.loads(line) for line in error.splitlines()]
    records = read_records(tmp_path)
    for record in records:
        of_round = [line for line in lines if line.get("round") == record["round"] and "worker" in line]
        assert {line["worker"] for line in of_round} == {"worker-0", "worker-1"}  # one line each, there or not
        assert len(of_round) == 2
        came = [line for line in of_round if line["message"].startswith("contribution")]
        assert sorted(line["worker"] for line in came) == [f"worker-{index}" for index in record["workers"]]
        assert sum(line["bytes"] for line in came) == record["uplink_payload_bytes"]
    for output in told:
        assert [json.loads(line) for line in output.splitlines()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(board))
    events.Reload()
    for name, field in (("loss/train", "train_loss"), ("accuracy/test", "test_accuracy")):
        expected = [(record["version"], record[field]) for record in records if record[field] is not None]
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(v, pytest.approx(x)) for v, x in expected]
    assert [e.value for e in events.Scalars("bits/up")] == [8 * record["uplink_bytes"] for record in records]


def test_a_failure_of_a_worker_is_in_the_log_with_its_reason(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    try:
        cluster.server(
            "--workers", 2, "--rounds", 100000, "--set", "quorum=0.5", "--set", "idle_timeout_seconds=5",
            "--set", "round_deadline_seconds=5", "--codec", "dqsg", "--log-format", "json",
        )  # fmt: skip
        for index in range(2):
            cluster.worker(f"worker-{index}")
        wait_until(lambda: len(read_records(tmp_path)) > 5, 150, "rounds")
        cluster.kill("worker-1")
        wait_until(
            lambda: any(record["absent"] for record in read_records(tmp_path)), what="a round without the worker"
        )
        cluster.processes["server"].terminate()
        _, _, error = cluster.finish("server")
    finally:
        cluster.close()
    absent = [line for line in map(json.loads, error.splitlines()) if line["message"].startswith("absent")]
    assert absent
    assert {(line["worker"], line["level"]) for line in absent} == {("worker-1", "warning")}
    assert {line["reason"] for line in absent} <= {"silent", "deadline"}
