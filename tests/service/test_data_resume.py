"""Mode `data` in a server that goes on: with the samples that it holds or without them, the run ends as one loop."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ditherps.errors import ExitCode
from ditherps_server.samplefiles import wipe
from tests.faults.conftest import _deterministic as _deterministic
from tests.faults.conftest import cluster as cluster
from tests.faults.points import command as at
from tests.faults.points import fired
from tests.faults.runs import PACED, Run
from tests.service.harness import Cluster, last_json
from tests.service.harness import run as command

pytestmark = pytest.mark.timeout(300)

ROUNDS, EPOCH = 24, 7
"""A worker has fifty samples: after seven rounds of eight each has been taken."""
JOB: dict[str, Any] = {
    "task": PACED, "model": "norm", "mode": "data", "workers": 2, "batch_size": 8, "rounds": ROUNDS,
    "optimizer": {"lr": 0.05, "momentum": 0.9}, "evaluate_every": ROUNDS, "idle_timeout_seconds": 20,
}  # fmt: skip
HEADER_BYTES = 24
REFINED: dict[str, Any] = {"refine": "dqsg:coder=rans", "keep": 0.5, "probe_every": 5}


class DataRun(Run):
    """A run whose gradients, which the server computes, take as long as a test wants."""

    def begin_server(self, *arguments: object, **options: Any) -> None:
        """Start the server."""
        super().begin_server("--data-dir", self.folder, "--checkpoint-every", 5, *arguments, **options)

    def to(self, version: int) -> None:
        """Start all, and leave them in the middle of their rounds."""
        self.pace(0.01 if self.job.config.data.keep < 1 else 0.05)  # there every sample's loss is one of its own
        self.server()
        self.workers()
        self.cluster.reached(version)

    def resumed(self, *arguments: object) -> dict[str, Any]:
        """Another server goes on, to the end."""
        self.server("--resume", *arguments)
        self.pace(0.0)
        return self.ended_well()

    @property
    def payload(self) -> list[int]:
        """Bytes of each round, by its number."""
        return [record["uplink_payload_bytes"] for record in self.cluster.records()]

    @property
    def said(self) -> str:
        """What the servers have written."""
        return self.log("server").read_text()


def digits_bytes(run: DataRun) -> int:
    """Of the samples that were sent, without the headers of their payloads."""
    return sum(payload - 2 * HEADER_BYTES for payload in run.payload if payload)


def left(folder: Path) -> list[str]:
    """Files in which there may be samples."""
    return sorted(path.name for pattern in ("samples*", "redo*") for path in folder.glob(pattern))


@pytest.mark.slow
@pytest.mark.parametrize("data", [{}, REFINED], ids=["plain", "refined and gated"])
def test_a_server_killed_at_random_moments(cluster: Cluster, data: dict[str, Any]) -> None:
    choice = random.Random(3)
    run = DataRun(cluster, **{**JOB, "rounds": 40}, data=data)
    run.to(2)
    for _ in range(4):
        cluster.reached(cluster.records()[-1]["version"] + 1)
        time.sleep(choice.uniform(0.0, 0.5))
        cluster.kill("server")
        run.server("--resume")
    run.pace(0.0)
    result = run.ended_well()
    assert result["model_sha256"] == run.expected()
    assert result["contributions"] == 2 * 40
    assert "are sent again" not in run.said
    assert left(cluster.run_dir) == []
    if not data:
        assert sum(run.payload[EPOCH:]) == 0


POINTS = [
    # The samples of a checkpoint: written but not in place; in place, but not the checkpoint; both, and the older ones.
    "kill:before:pathlib:Path.replace@samples-:2",
    "kill:after:pathlib:Path.replace@samples-:2",
    "kill:before:ditherps_server.samplefiles:SampleFiles.forget:2",
    "kill:before:ditherps_server.redo:RedoLog.begin:2",
    # A round: written down as closed but not applied; applied, but its samples are nowhere yet.
    "kill:before:ditherps_server.updater:Updater.apply:4",
    "kill:before:ditherps_server.sampled:SampledUpdates.entered:4",
    # At the end: nothing of the job may be left.
    "kill:before:ditherps_server.samplefiles:SampleFiles.end:1",
]


@pytest.mark.slow
def test_a_server_killed_at_named_points(cluster: Cluster) -> None:
    """One life after another of one run, each with its own point; room for half of the samples."""
    run = DataRun(cluster, **{**JOB, "rounds": 10 * len(POINTS)}, data={**REFINED, "cache_bytes": 50 * (256 + 12)})
    for number, point in enumerate(POINTS):
        marker = run.folder / f"marker-{number}"
        run.begin_server(*(["--resume"] if number else []), program=at(marker, point))
        if number == 0:
            cluster.await_server()
            run.workers()
        assert cluster.finish("server")[0] == -signal.SIGKILL, point
        assert fired(marker) == [point]
    assert left(cluster.run_dir) != []
    run.begin_server("--resume")  # which finds the result, and what was left behind
    assert cluster.result()["model_sha256"] == run.expected()
    assert "are sent again" not in run.said
    assert left(cluster.run_dir) == []


@pytest.mark.parametrize("how", ["wiped", "damaged", "missing"])
def test_samples_that_are_not_there_any_more_are_sent_again(cluster: Cluster, how: str) -> None:
    run = DataRun(cluster, **JOB)
    run.to(EPOCH + 2)
    cluster.kill("server")
    found = left(cluster.run_dir)
    (samples,) = cluster.run_dir.glob("samples-*.safetensors")
    assert found == ["redo.bin", samples.name]
    if how == "wiped":
        done = command(["wipe", cluster.run_dir])
        assert (done.returncode, done.stdout) == (0, "2 files removed\n")
        assert left(cluster.run_dir) == []
    elif how == "damaged":
        content = bytearray(samples.read_bytes())
        content[-9] ^= 4
        samples.write_bytes(content)
    else:
        samples.unlink()
    result = run.resumed()
    assert result["model_sha256"] == run.expected()
    assert run.said.count("are sent again") == 1
    assert "Traceback" not in run.said
    assert sum(run.payload[EPOCH:]) > 0.7 * sum(run.payload[:EPOCH])
    assert sum(run.payload[-3:]) == 0
    assert left(cluster.run_dir) == []


def test_a_server_that_is_suspended(cluster: Cluster, tmp_path: Path) -> None:
    """And keeps its samples in a folder of their own."""
    run = DataRun(cluster, **JOB, data=REFINED)
    cache = tmp_path / "cache"
    run.pace(0.01)
    run.server("--cache-dir", cache)
    run.workers()
    cluster.reached(EPOCH + 2)
    cluster.processes["server"].send_signal(signal.SIGTERM)
    code, output, _ = cluster.finish("server")
    assert (code, last_json(output)["reason"]) == (ExitCode.OK, "suspended")
    assert list(cache.iterdir()) == []  # nobody but the server finds what is there
    assert run.resumed("--cache-dir", cache)["model_sha256"] == run.expected()
    assert "are sent again" not in run.said
    assert left(cluster.run_dir) == left(cache) == []


def test_a_worker_that_is_killed_and_comes_back(cluster: Cluster) -> None:
    run = DataRun(cluster, **JOB, data=REFINED)
    run.to(EPOCH)
    cluster.kill("worker-1")
    run.worker(1)
    cluster.reached(EPOCH + 3)
    run.pace(0.0)
    assert run.ended_well()["model_sha256"] == run.expected()


@pytest.mark.parametrize("wiped", [False, True])
def test_without_a_redo_log(cluster: Cluster, wiped: bool) -> None:
    run = DataRun(cluster, **JOB)
    run.pace(0.05)
    run.server("--durability", "none")
    run.workers()
    cluster.reached(EPOCH + 1)
    cluster.kill("server")
    if wiped:
        assert wipe(cluster.run_dir) == 1
    assert run.resumed("--durability", "none")["model_sha256"] == run.expected()
    assert left(cluster.run_dir) == []


@pytest.mark.slow
def test_the_next_job_begins_with_what_was_kept(cluster: Cluster) -> None:
    run = DataRun(cluster, **JOB)
    run.server("--keep-cache")
    run.workers()
    first = run.ended_well()
    assert left(cluster.run_dir) == ["samples-of-seed-1.safetensors"]
    whole = digits_bytes(run)
    assert whole > 0
    again = DataRun(cluster, **JOB)
    again.server("--keep-cache")
    again.workers()
    assert again.ended_well()["model_sha256"] == first["model_sha256"] == again.expected()
    assert sum(again.payload) == 0
    # A finer level of what is held: the digits that are missing, and no more.
    finer = DataRun(cluster, **JOB, data={"level": 3})
    finer.server()
    finer.workers()
    assert finer.ended_well()["model_sha256"] == finer.expected()
    assert 0 < digits_bytes(finer) < 0.5 * whole
    assert left(cluster.run_dir) == []
