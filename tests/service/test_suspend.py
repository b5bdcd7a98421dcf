"""Servers that have to go, and workers that do: real processes, signals, exit codes, and who finishes the run."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ditherps.config import JobConfig
from ditherps.errors import ExitCode, Reason
from ditherps.gradient import make_deterministic
from ditherps.status import fetch_status
from ditherps.tasks import load_task
from ditherps.v1 import parameter_server_pb2 as pb
from tests.service.harness import Cluster, last_json, wait_until
from tests.service.simulation import simulated
from tests.service.test_local import job_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # each starts three or more processes

ROUNDS = 120
JOB = ("--task", "digits", "--workers", 2, "--rounds", ROUNDS, "--codec", "dqsg")
CHECKPOINT = "checkpoint.safetensors"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


@pytest.fixture
def _as_a_worker() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    make_deterministic(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def begin(cluster: Cluster, *server: object) -> None:
    """A server and two workers in the middle of their rounds."""
    cluster.server(*JOB, *server)
    join(cluster)
    in_its_rounds(cluster)


def join(cluster: Cluster, server: str = "") -> None:
    """Start two workers, whose logs are files, and whose patience outlasts a busy machine's start of a server."""
    config = cluster.run_dir / "worker.toml"
    config.write_text("[worker]\nconnect_timeout_seconds = 240\n")
    for name in ("worker-0", "worker-1"):
        with (cluster.run_dir / f"{name}.log").open("a") as log:
            cluster.worker(name, "--config", config, server=server, stderr=log)


def in_its_rounds(cluster: Cluster) -> None:
    wait_until(lambda: fetch_status(cluster.address).round >= 3, what="three rounds")


def waits_for(cluster: Cluster, part: str) -> pb.StatusResponse:
    """The server's status, once it says that it waits for this."""

    def status() -> pb.StatusResponse | None:
        found = fetch_status(cluster.address)
        return found if part in found.waiting_for else None

    found: pb.StatusResponse = wait_until(status, 30, part)
    return found


def hold(cluster: Cluster) -> int:
    """Stop worker-1 in the middle of a round, which stays open; its number."""
    cluster.processes["worker-1"].send_signal(signal.SIGSTOP)
    return waits_for(cluster, "contributions: 1 of 2 are here; missing: worker-1").round


def log_of(cluster: Cluster, name: str) -> str:
    return (cluster.run_dir / f"{name}.log").read_text()


def result(cluster: Cluster) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((cluster.run_dir / "result.json").read_text())
    return value


def resumed(cluster: Cluster) -> dict[str, Any]:
    """The result of the run, which another server and the same workers bring to its end."""
    cluster.server(*JOB, "--resume")
    found = cluster.result()
    assert [cluster.finish(name)[0] for name in ("worker-0", "worker-1")] == [0, 0]
    return found


@pytest.mark.usefixtures("_as_a_worker")
def test_sigterm_lets_the_open_round_close_and_the_next_server_goes_on(cluster: Cluster) -> None:
    begin(cluster)
    open_round = hold(cluster)
    cluster.processes["server"].send_signal(signal.SIGTERM)
    said = waits_for(cluster, "; the run is suspended in ")
    assert said.round == open_round
    cluster.processes["worker-1"].send_signal(signal.SIGCONT)
    code, output, error = cluster.finish("server")
    assert code == ExitCode.OK, error
    first = last_json(output)
    assert (first["reason"], first["rounds"]) == ("suspended", open_round + 1)
    assert result(cluster) == first
    assert (cluster.run_dir / CHECKPOINT).exists()
    # Ten seconds without a server; nobody starts the workers again.
    gone = time.monotonic()
    wait_until(lambda: time.monotonic() > gone + 10, what="ten seconds")
    last = resumed(cluster)
    assert (last["reason"], last["rounds"]) == ("finished", ROUNDS)
    job: JobConfig = job_of(cluster.run_dir)
    assert last["model_sha256"] == simulated(job, load_task("digits"))
    for name in ("worker-0", "worker-1"):
        log = log_of(cluster, name)
        assert log.count("has suspended the run and may be back") == 1
        assert log.count("trying again") == 1
        assert "Traceback" not in log


def test_a_round_that_does_not_close_is_left_open(cluster: Cluster) -> None:
    begin(cluster, "--grace-seconds", 1)
    open_round = hold(cluster)
    began = time.time()
    cluster.processes["server"].send_signal(signal.SIGTERM)
    code, output, error = cluster.finish("server")
    assert code == ExitCode.OK, error
    saved = (cluster.run_dir / CHECKPOINT).stat().st_mtime
    assert 1 <= saved - began < 4
    found = last_json(output)
    assert (found["reason"], found["rounds"]) == ("suspended", open_round)
    cluster.processes["worker-1"].send_signal(signal.SIGCONT)
    assert resumed(cluster)["rounds"] == ROUNDS


def test_a_second_signal_ends_at_once(cluster: Cluster) -> None:
    begin(cluster, "--grace-seconds", 100)
    hold(cluster)
    server = cluster.processes["server"]
    server.send_signal(signal.SIGTERM)
    waits_for(cluster, "; the run is suspended in ")
    server.send_signal(signal.SIGTERM)
    assert cluster.finish("server", 20)[0] == -signal.SIGTERM


def test_a_run_whose_workers_are_all_killed_ends_and_frees_its_port(cluster: Cluster) -> None:
    idle, empty = 4.0, 6.0
    join(cluster, f"@{cluster.run_dir / 'server.json'}")  # they load what they need before the server waits for them
    cluster.server(*JOB, "--set", f"idle_timeout_seconds={idle}", "--set", f"join_timeout_seconds={empty}")
    in_its_rounds(cluster)
    killed = time.time()
    for name in ("worker-0", "worker-1"):
        cluster.kill(name)
    waits_for(cluster, "workers: none is here")
    code, output, error = cluster.finish("server")
    assert code == ExitCode.JOIN_TIMEOUT
    ended = (cluster.run_dir / "result.json").stat().st_mtime  # drawing the plots may take long on a busy machine
    assert empty < ended - killed < idle + empty + 5
    assert error.splitlines()[-1].endswith("too few workers were here for join_timeout_seconds")
    assert output == ""
    assert result(cluster)["reason"] == Reason.JOIN_TIMEOUT
    with socket.create_server(("127.0.0.1", int(cluster.address.rpartition(":")[2]))):
        pass
    assert (cluster.run_dir / CHECKPOINT).exists()


def test_a_worker_that_is_asked_to_end_leaves(cluster: Cluster) -> None:
    """And one that was interrupted says so."""
    begin(cluster, "--set", "quorum=0.5", "--rounds", 100_000)
    cluster.processes["worker-1"].send_signal(signal.SIGTERM)
    assert cluster.finish("worker-1")[0] == ExitCode.OK
    cluster.processes["worker-0"].send_signal(signal.SIGINT)
    assert cluster.finish("worker-0")[0] == ExitCode.INTERRUPTED
    states = [member.state for member in fetch_status(cluster.address).members]
    assert states == ["interrupted", "interrupted"]
