"""Whole runs as a person starts them: real processes, what they leave behind, and how they end."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from ditherps.config import JobConfig
from ditherps.errors import ExitCode, OptionError
from ditherps.gradient import make_deterministic
from ditherps.layout import Layout, model_sha256
from ditherps.plots import read_records
from ditherps.tasks import Task, load_task
from tests.service.harness import Cluster, environment, last_json, run, wait_until
from tests.service.simulation import simulated
from tests.tiny import Tiny

PROMISED = {
    "task", "codec", "workers", "rounds", "seconds", "test_accuracy", "test_loss", "uplink_bytes", "downlink_bytes",
    "total_bytes", "uplink_bits_per_coordinate", "uplink_kbit_per_worker_round", "compression_vs_float32",
    "model_sha256",
}  # fmt: skip


def processes(run_dir: Path) -> list[str]:
    """Command lines of the processes that belong to a run folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if str(run_dir).encode() in line:
            found.append(line.replace(b"\0", b" ").decode())
    return found


def saved_sha256(run_dir: Path, layout: Layout) -> tuple[str, str]:
    """The SHA-256 of a saved model, and what its metadata says that it is."""
    with safe_open(run_dir / "model.safetensors", framework="pt") as file:
        flat = torch.cat([file.get_tensor(spec.name).reshape(-1) for spec in layout.parameters])
        buffers = b"".join(file.get_tensor(spec.name).numpy().tobytes() for spec in layout.buffers)
        return model_sha256(flat, buffers), file.metadata()["model_sha256"]


def job_of(run_dir: Path) -> JobConfig:
    return JobConfig.model_validate(tomllib.loads((run_dir / "job.toml").read_text()))


def check_run(run_dir: Path, result: dict[str, Any], task: Task) -> list[dict[str, Any]]:
    """What holds of every finished run; returns its records."""
    job, records = job_of(run_dir), read_records(run_dir)
    layout = Layout.of(task.build(job.model or None, job.seed))
    assert set(result) >= PROMISED
    assert result["rounds"] == job.rounds == len(records)
    assert [record["round"] for record in records] == list(range(job.rounds))
    # Bytes: what stands in the records adds up, and what came after the last round (evaluation, end) is little.
    for direction in ("uplink", "downlink"):
        spent = sum(record[f"{direction}_bytes"] for record in records)
        assert spent == records[-1][f"{direction}_total_bytes"]
        after = result[f"{direction}_bytes"] - spent
        assert 0 <= after <= 1000 * job.workers
        assert sum(r[f"{direction}_payload_bytes"] for r in records) <= result[f"{direction}_payload_bytes"]
    assert result["total_bytes"] == result["uplink_bytes"] + result["downlink_bytes"]
    payload = sum(record["uplink_payload_bytes"] for record in records)
    assert payload == result["uplink_payload_bytes"] < result["uplink_bytes"]
    contributions = sum(len(record["workers"]) for record in records)
    assert result["contributions"] == contributions
    bits = 8 * result["uplink_bytes"] / (contributions * layout.coordinates)
    assert result["uplink_bits_per_coordinate"] == pytest.approx(bits)
    assert result["compression_vs_float32"] == pytest.approx(32 / bits)
    assert result["uplink_kbit_per_worker_round"] == pytest.approx(8e-3 * result["uplink_bytes"] / contributions)
    assert result["seconds"] > records[-1]["elapsed_seconds"] > 0
    assert saved_sha256(run_dir, layout) == (result["model_sha256"], result["model_sha256"])
    assert json.loads((run_dir / "result.json").read_text()) == result
    for name in ("accuracy_bits.png", "round_bits.png"):
        with Image.open(run_dir / name) as image:
            image.verify()
            assert min(image.size) > 300
    assert processes(run_dir) == []
    return records


class Run(NamedTuple):
    folder: Path
    result: dict[str, Any]
    output: str
    error: str


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run of `ditherps local` with nested quantization, which several tests look at."""
    folder = tmp_path_factory.mktemp("nested") / "run"
    done = run(["local", "--json", "--task", "digits", "--codec", "ndqsg", "--workers", 2, "--rounds", 12,
                "--set", "evaluate_every=5", "--set", "optimizer.lr=0.1", "--run-dir", folder])  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Run(folder, last_json(done.stdout), done.stdout, done.stderr)


@pytest.fixture
def _as_a_worker() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    make_deterministic(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.slow
class TestNested:
    def test_what_it_leaves_behind(self, nested: Run) -> None:
        records = check_run(nested.folder, nested.result, load_task("digits"))
        assert (nested.result["task"], nested.result["codec"], nested.result["workers"]) == ("digits", "ndqsg", 2)
        assert nested.result["parameters"] == 19_210
        assert 0.05 < nested.result["test_accuracy"] <= 1
        assert math.isfinite(nested.result["test_loss"])
        evaluated = [record["round"] for record in records if record["test_accuracy"] is not None]
        assert evaluated == [0, 5, 10]
        for record in records:
            assert (record["workers"], record["absent"], record["samples"]) == ([0, 1], {}, 64)
            assert (record["nested_tiles"], record["coordinates"]) == (5, 19_210)
        assert {worker.name for worker in nested.folder.glob("*.log")} == {
            "server.log", "worker-0.log", "worker-1.log",
        }  # fmt: skip
        assert "Traceback" not in "".join(log.read_text() for log in nested.folder.glob("*.log")) + nested.error

    @pytest.mark.usefixtures("_as_a_worker")
    def test_it_is_the_function_that_it_claims_to_be(self, nested: Run) -> None:
        job = job_of(nested.folder)
        assert job.optimizer.lr == 0.1
        assert job.optimizer.momentum == load_task("digits").recipe().optimizer["momentum"]
        assert simulated(job, load_task("digits")) == nested.result["model_sha256"]
        assert simulated(job.model_copy(update={"seed": 2}), load_task("digits")) != nested.result["model_sha256"]

    def test_the_job_file_reproduces_it_in_another_order_and_metrics_tell_the_truth(
        self, nested: Run, tmp_path: Path
    ) -> None:
        cluster = Cluster(tmp_path)
        try:
            cluster.server("--config", nested.folder / "job.toml")
            for name in ("worker-1", "worker-0"):
                cluster.worker(name)
            wait_until(lambda: len(read_records(tmp_path)) >= 2, what="two rounds")
            # While one worker stands still no round can close, so metrics and records must agree.
            cluster.processes["worker-1"].send_signal(signal.SIGSTOP)
            try:
                url = f"http://127.0.0.1:{cluster.metrics_port}/metrics"

                def agree() -> dict[str, float]:
                    with urllib.request.urlopen(url, timeout=10) as response:
                        lines = response.read().decode().splitlines()
                    values = {k: float(v) for k, _, v in (line.rpartition(" ") for line in lines if line[:1] != "#")}
                    return values if values["ditherps_round"] == len(read_records(tmp_path)) else {}

                metrics, records = wait_until(agree, 20, "metrics and records of one round"), read_records(tmp_path)
                last = records[-1]
                assert metrics['ditherps_round_bits{direction="up"}'] == 8 * last["uplink_bytes"]
                assert metrics['ditherps_round_bits{direction="down"}'] == 8 * last["downlink_bytes"]
                failed = sum(record["nested_failed_tiles"] for record in records)
                assert metrics["ditherps_decode_ambiguities_total"] == failed
                assert metrics["ditherps_decode_tiles_total"] == sum(record["nested_tiles"] for record in records)
                assert metrics['ditherps_rounds_total{result="applied"}'] == len(records)
                assert metrics["ditherps_train_loss"] == pytest.approx(last["train_loss"])
                assert metrics["ditherps_learning_rate"] == pytest.approx(last["learning_rate"])
                assert metrics['ditherps_build_info{component="server",version="0.1.0"}'] == 1
            finally:
                cluster.processes["worker-1"].send_signal(signal.SIGCONT)
            result = cluster.result()
            assert [cluster.finish(name)[0] for name in ("worker-0", "worker-1")] == [0, 0]
        finally:
            cluster.close()
        assert result["model_sha256"] == nested.result["model_sha256"]
        assert result["test_accuracy"] == nested.result["test_accuracy"]
        assert result["uplink_payload_bytes"] == nested.result["uplink_payload_bytes"]
        assert job_of(tmp_path) == job_of(nested.folder)

    def test_what_it_prints(self, nested: Run) -> None:
        assert f"run folder {nested.folder}" in nested.error
        assert "round 12/12" in nested.error
        assert nested.result["model_sha256"] in nested.output.replace("\n", "")
        assert nested.output.splitlines()[-1].startswith("{")


@pytest.mark.slow
@pytest.mark.usefixtures("_as_a_worker")
def test_a_users_task_with_batch_norm_in_mode_local(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine.py").write_text(Path(sys.modules["tests.tiny"].__file__ or "").read_text())
    done = run(
        ["local", "--json", "--task", "mine:Tiny", "--model", "norm", "--mode", "local", "--codec", "dqsg",
         "--workers", 2, "--rounds", 4, "--set", "split.kind=dirichlet", "--set", "local.steps=4",
         "--set", "members=['b/0', 'a']", "--run-dir", tmp_path / "run"],
        PYTHONPATH=str(tmp_path / "code"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = last_json(done.stdout)
    records = check_run(tmp_path / "run", result, Tiny())
    assert result["mode"] == "local"
    assert all(record["samples"] == 2 * 4 * 8 for record in records)
    with safe_open(tmp_path / "run" / "model.safetensors", framework="pt") as file:
        assert int(file.get_tensor("1.num_batches_tracked")) == 4 * 4
        assert float(file.get_tensor("1.running_mean").abs().sum()) > 0
    assert (tmp_path / "run" / "b_0.log").exists()
    assert simulated(job_of(tmp_path / "run"), Tiny()) == result["model_sha256"]


@pytest.mark.slow
@pytest.mark.usefixtures("_as_a_worker")
def test_error_feedback_with_a_scaled_codec(tmp_path: Path) -> None:
    done = run(["local", "--json", "--task", "digits", "--codec", "scaled", "--codec-option", "inner=dqsg:levels=0.5",
                "--workers", 2, "--rounds", 8, "--set", "error_feedback=true",
                "--run-dir", tmp_path / "run"])  # fmt: skip
    assert done.returncode == 0, done.stderr
    result, job = last_json(done.stdout), job_of(tmp_path / "run")
    check_run(tmp_path / "run", result, load_task("digits"))
    assert job.error_feedback
    assert simulated(job, load_task("digits")) == result["model_sha256"]
    without = job.model_copy(update={"error_feedback": False})
    assert simulated(without, load_task("digits")) != result["model_sha256"]


@pytest.mark.slow
@pytest.mark.usefixtures("_as_a_worker")
def test_a_codec_that_needs_the_layout(tmp_path: Path) -> None:
    done = run(["local", "--json", "--task", "digits", "--codec", "tensors", "--workers", 2, "--rounds", 4,
                "--run-dir", tmp_path / "run"])  # fmt: skip
    assert done.returncode == 0, done.stderr
    result, job = last_json(done.stdout), job_of(tmp_path / "run")
    check_run(tmp_path / "run", result, load_task("digits"))
    assert simulated(job, load_task("digits")) == result["model_sha256"]
    one_tensor = job.model_copy(update={"codec_options": {"sizes": str(result["parameters"])}})
    with pytest.raises(OptionError, match=r"tensors\.sizes"):
        simulated(one_tensor, load_task("digits"))


def test_error_feedback_that_would_diverge_is_refused_before_anything_starts(tmp_path: Path) -> None:
    done = run(["local", "--codec", "dqsg", "--codec-option", "levels=0.5", "--set", "error_feedback=true",
                "--run-dir", tmp_path / "run"])  # fmt: skip
    assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
    assert done.stderr == (
        "error: codec = 'dqsg:levels=0.5' is not allowed; allowed: with error feedback a contractive one, such as "
        "scaled:inner=(dqsg:levels=0.5)\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_wrong_option_is_refused_before_anything_starts(tmp_path: Path) -> None:
    done = run(["local", "--codec", "dqsg", "--codec-option", "levels=0.3", "--run-dir", tmp_path / "run"])
    assert done.returncode == ExitCode.USAGE
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "levels = 0.3 is not allowed; allowed: 0.5, 1, 1.5" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rounds"), [(signal.SIGINT, 3), (signal.SIGTERM, 0)], ids=["ctrl-c", "term"])
def test_an_interrupt_ends_everything(tmp_path: Path, name: signal.Signals, rounds: int) -> None:
    """In the middle of its rounds, and while the server is still starting."""
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "ditherps", "local", "--codec", "dqsg", "--workers", "1", "--rounds", "1000000",
         "--run-dir", str(folder)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        start_new_session=True,
    )  # fmt: skip

    def so_far() -> bool:
        assert process.poll() is None, process.communicate()
        if not rounds:
            return (folder / "server.log").exists()
        return (folder / "rounds.jsonl").exists() and len(read_records_so_far(folder)) >= rounds

    try:
        wait_until(so_far, 90, "the run to be under way")
        assert len(processes(folder)) >= 2
        began = time.monotonic()
        process.send_signal(name)
        output, error = process.communicate(timeout=30)
    finally:
        if process.poll() is None:  # it has processes of its own to end
            process.terminate()
            process.communicate(timeout=30)
    assert process.returncode == ExitCode.INTERRUPTED, error
    assert time.monotonic() - began < 20
    assert processes(folder) == []
    assert "interrupted" in error
    assert "Traceback" not in output + error + "".join(log.read_text() for log in folder.glob("*.log"))
    if rounds:
        records = read_records(folder)
        assert [record["round"] for record in records] == list(range(len(records)))
        result = json.loads((folder / "result.json").read_text())
        assert (result["reason"], result["rounds"]) == ("interrupted", len(records))
        layout = Layout.of(load_task("digits").build(None, 1))
        assert saved_sha256(folder, layout) == (result["model_sha256"], result["model_sha256"])


def read_records_so_far(folder: Path) -> list[str]:
    return [line for line in (folder / "rounds.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.slow
def test_a_worker_that_is_killed_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    """And one that is no member is sent away before it."""
    cluster = Cluster(tmp_path)
    try:
        cluster.server("--workers", 2, "--rounds", 40, "--codec", "dqsg", "--set", "quorum=0.5",
                       "--set", "idle_timeout_seconds=4")  # fmt: skip
        cluster.worker("eve")
        code, output, error = cluster.finish("eve")
        assert (code, output) == (ExitCode.REFUSED, "")
        assert error == "error: unknown_member: 'eve' is not a member of this job; members: worker-0, worker-1\n"
        for name in ("worker-0", "worker-1"):
            cluster.worker(name)
        wait_until(lambda: len(read_records_so_far(tmp_path)) >= 2, what="two rounds")
        cluster.processes["worker-1"].send_signal(signal.SIGKILL)
        result = cluster.result()
        assert cluster.finish("worker-0")[0] == 0
        assert cluster.finish("worker-1")[0] == -signal.SIGKILL
    finally:
        cluster.close()
    records = check_run(tmp_path, result, load_task("digits"))
    absences = [record["round"] for record in records if record["absent"]]
    assert len(absences) == 1
    assert records[absences[0]]["absent"] == {"1": "silent"}
    for record in records:
        assert record["workers"] == ([0, 1] if record["round"] < absences[0] else [0])
    assert result["contributions"] == 40 + absences[0]


def test_waits_have_limits(tmp_path: Path) -> None:
    """A server without enough workers, and a worker without a server."""
    (tmp_path / "worker.toml").write_text("[worker]\nconnect_timeout_seconds = 1\n")
    cluster = Cluster(tmp_path)
    try:
        cluster.worker("worker-0", "--config", tmp_path / "worker.toml", server="127.0.0.1:1")
        cluster.server("--workers", 2, "--set", "join_timeout_seconds=1")
        began = time.monotonic()
        code, output, error = cluster.finish("server")
        took = time.monotonic() - began
        assert code == ExitCode.JOIN_TIMEOUT
        assert took < 10
        assert error.splitlines()[-1] == (
            "error: the run ended at round 0 of 200: too few workers were here for join_timeout_seconds"
        )
        assert "Traceback" not in error
        assert json.loads((tmp_path / "result.json").read_text())["reason"] == "join_timeout"
        code, output, error = cluster.finish("worker-0")
        assert (code, output) == (ExitCode.UNREACHABLE, "")
        assert error.startswith("error: server 127.0.0.1:1: ")
        assert error.count("\n") == 1
    finally:
        cluster.close()


def test_a_worker_compiles_what_its_job_file_names_before_it_joins(tmp_path: Path) -> None:
    config, cache = tmp_path / "job.toml", tmp_path / "cache"
    config.write_text('codec = "none"\n[worker]\nconnect_timeout_seconds = 1\n')
    arguments = ["worker", "--server", "127.0.0.1:1", "--config", config]
    assert run(arguments, NUMBA_CACHE_DIR=str(cache)).returncode == ExitCode.UNREACHABLE
    assert "none" in (cache / "warm").read_text()
    config.write_text('codec = "nonsense"\n')
    refused = run(arguments)
    assert refused.returncode == ExitCode.USAGE
    assert "'nonsense'" in refused.stderr
