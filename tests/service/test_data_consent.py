"""Samples leave a worker only where its own command line allows it, and not in plaintext; what cannot be is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ditherps.config import JobConfig, ServerConfig, WorkerConfig
from ditherps.errors import DitherpsError, ExitCode, OptionError, PayloadError, Reason, RefusedError, UserError
from ditherps.job import resolve_job
from ditherps.tasks import Samples
from ditherps_server.app import serve
from ditherps_worker.limits import check_samples_may_leave
from tests.faults.conftest import cluster as cluster
from tests.service.harness import Cluster, last_json, run
from tests.service.inprocess import Peer, Refused, serving
from tests.service.sampler import LIMITS
from tests.tiny import Tiny
from tests.worker.test_limits import Liar, ended, joined, state

asynchronous = pytest.mark.asyncio(loop_scope="session")
pytestmark = pytest.mark.timeout(300)

DATA = ("--task", "tests.tiny:Tiny", "--workers", 1, "--rounds", 2, "--mode", "data")


class Silent(Tiny):
    """A task that says nothing of its features."""

    features = None  # type: ignore[assignment]


class Ranges(Tiny):
    """A task whose features are not what it says."""

    def load(self, data_dir: Path | None, *, train: bool) -> Samples:
        """Much too large."""
        samples = super().load(data_dir, train=train)
        return Samples(100 * samples.features, samples.labels)


def test_a_worker_whose_command_line_does_not_allow_it(cluster: Cluster) -> None:
    cluster.server(*DATA)
    cluster.worker("worker-0", *DATA[:2])
    code, output, error = cluster.finish("worker-0")
    assert (code, output) == (ExitCode.REFUSED, "")
    assert error == (
        "error: data_not_allowed: the job's mode is data: this server would see the worker's samples and labels, "
        "quantized; say --allow-data there to let it\n"
    )
    # It may be asked again.
    cluster.worker("worker-0", *DATA[:2], "--allow-data")
    assert cluster.result()["rounds"] == 2
    assert cluster.finish("worker-0")[0] == ExitCode.OK


@asynchronous
class TestServersThatLie:
    """What a worker's server says of its job, of its limits, of its plan."""

    async def test_a_mode_that_was_not_offered(self) -> None:
        liar = Liar(join=joined({"mode": "data"}))
        error = await ended(liar)
        assert isinstance(error, RefusedError)
        assert error.reason is Reason.DATA_NOT_ALLOWED
        assert "say --allow-data here to let it" in str(error)
        assert liar.left == [Reason.DATA_NOT_ALLOWED]

    async def test_a_mode_that_is_yet_to_be_chosen(self) -> None:
        error = await ended(Liar(join=joined({"mode": "auto"})), allow_data=True)
        assert isinstance(error, RefusedError)
        assert error.reason is Reason.LIMITS

    async def test_a_codec_that_cannot_refine(self) -> None:
        for refine in ("nonsense", "dqsg:levels=x", "dqsg:(", "a" * 1000):
            error = await ended(Liar(join=joined({"mode": "data", "data": {"refine": refine}})), allow_data=True)
            assert isinstance(error, DitherpsError)
            assert "\n" not in str(error)

    async def test_a_finer_level_than_is_allowed(self) -> None:
        liar = Liar(join=joined({"mode": "data", "data": {"level": 3}}))
        error = await ended(liar, allow_data=True, max_data_level=2)
        assert isinstance(error, RefusedError)
        assert error.reason is Reason.DATA_NOT_ALLOWED

    @pytest.mark.parametrize("need", [b"\x09", b"\xff", b"\xff" * 4, bytes(1 << 20)])
    async def test_a_need_that_cannot_be(self, need: bytes) -> None:
        liar = Liar(join=joined({"mode": "data"}), states=[state(need=need)])
        error = await ended(liar, allow_data=True)
        assert isinstance(error, PayloadError)
        assert "a need" in str(error)

    async def test_a_level_that_there_is_not(self) -> None:
        error = await ended(Liar(join=joined({"mode": "data", "data": {"level": 200}})), allow_data=True)
        assert "level" in str(error)


@asynchronous
@pytest.mark.parametrize(
    ("modes", "level", "reason"),
    [
        (("gradient", "local"), 15, Reason.DATA_NOT_ALLOWED),
        ((), 0, Reason.DATA_NOT_ALLOWED),
        (("data",), 1, Reason.DATA_NOT_ALLOWED),
        (("data",), 0, Reason.DATA_NOT_ALLOWED),
    ],
)
async def test_the_server_does_not_let_in_who_does_not_allow_it(
    tmp_path: Path, modes: tuple[str, ...], level: int, reason: Reason
) -> None:
    async with serving(tmp_path, mode="data") as served, Peer(served.address) as peer:
        limits = type(LIMITS).FromString(LIMITS.SerializeToString())
        limits.ClearField("modes")
        limits.modes.extend(modes)
        limits.data_level = level
        with pytest.raises(Refused) as error:
            await peer.join("worker-0", limits=limits)
        assert error.value.reason is reason
        assert await peer.states() == []


class TestPlaintext:
    @pytest.mark.parametrize("server", ["192.0.2.1:50051", "example.org:50051", "[2001:db8::1]:50051"])
    def test_a_worker_sends_none_to_another_machine(self, server: str) -> None:
        """Also where plaintext is allowed for all else."""
        for insecure in (False, True):
            with pytest.raises(RefusedError, match=r"in plaintext: say --certs") as error:
                check_samples_may_leave(WorkerConfig(server=server, allow_data=True, insecure=insecure), None, 1)
            assert error.value.reason is Reason.DATA_NOT_ALLOWED

    @pytest.mark.parametrize("server", ["127.0.0.1:50051", "localhost:50051", "[::1]:50051"])
    def test_this_machine_is_another_matter(self, server: str) -> None:
        check_samples_may_leave(WorkerConfig(server=server, allow_data=True), None, 1)

    def test_with_certificates(self, tmp_path: Path) -> None:
        check_samples_may_leave(WorkerConfig(server="example.org:1", allow_data=True, certs=tmp_path), None, 1)

    @asynchronous
    async def test_a_server_takes_none(self, tmp_path: Path) -> None:
        config = ServerConfig(run_dir=tmp_path, host="0.0.0.0", port=0, insecure=True, metrics_port=-1)
        job = JobConfig(task="tiny", workers=1, mode="data")
        with pytest.raises(UserError, match=r"over TLS only: make certificates with `ditherps certs init`"):
            await serve(job, config, Tiny())
        assert not (tmp_path / "server.json").exists()


class TestJobsThatCannotBe:
    @pytest.mark.parametrize(
        ("options", "option", "match"),
        [
            ({"error_feedback": True, "codec": "topk"}, None, "error_feedback = true is not for mode"),
            ({"data": {"refine": "topk"}}, "data.refine", "topk is biased"),
            ({"data": {"refine": "signsgd"}}, "data.refine", "signsgd is biased"),
            ({"data": {"refine": "ndqsg"}}, "data.refine", "ndqsg is nested"),
            ({"data": {"refine": "wavelets"}}, "codec", "wavelets"),
            ({"data": {"refine": "dqsg:levels=x"}}, "dqsg.levels", "levels"),
            ({"data": {"level": 9}}, "data.level", "0 to 5, at which task digits is lossless"),
            ({"data": {"level": -1}}, "data.level", "greater than or equal to 0"),
            ({"data": {"keep": 0.01}}, "data.keep", "greater than or equal to 0.0625"),
            ({"data": {"keep": 1.5}}, "data.keep", "less than or equal to 1"),
            ({"data": {"cache_bytes": -1}}, "data.cache_bytes", "greater than or equal to 0"),
            ({"data": {"levels": 2}}, "data.levels", "level"),
            ({"task": "tests.service.test_data_consent:Silent"}, "mode", "does not declare its features"),
        ],
        ids=str,
    )
    def test_in_one_line(self, options: dict[str, Any], option: str | None, match: str) -> None:
        with pytest.raises(UserError) as error:
            resolve_job({"task": "digits", "mode": "data", **options})
        assert match in str(error.value)
        assert "\n" not in str(error.value)
        if option:
            assert isinstance(error.value, OptionError)
            assert error.value.option == option

    def test_at_the_command_line(self, tmp_path: Path) -> None:
        done = run(["server", *DATA, "--run-dir", tmp_path, "--set", "data.refine=topk"])
        assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
        assert done.stderr.startswith("error: data.refine = 'topk' is not allowed; allowed: an unbiased codec")
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "server.json").exists()


class TestAuto:
    @pytest.mark.slow
    def test_it_says_what_it_chose_and_why(self, tmp_path: Path) -> None:
        done = run(["local", "--task", "digits", "--mode", "auto", "--workers", 1, "--rounds", 2, "--json",
                    "--run-dir", tmp_path])  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert last_json(done.stdout)["mode"] == "data"
        sentence = "mode = data: for digits a worker's round takes about "
        assert sentence in done.stderr
        assert "as a gradient (19210 coordinates at" in done.stderr
        assert 'mode = "data"' in (tmp_path / "job.toml").read_text()

    def test_a_server_says_it_too(self, cluster: Cluster) -> None:
        cluster.server("--task", "digits", "--workers", 1, "--rounds", 2, "--mode", "auto", "--set", "batch_size=1024")
        cluster.worker("worker-0")
        assert cluster.finish("worker-0")[0] == ExitCode.OK
        code, output, error = cluster.finish("server")
        assert code == ExitCode.OK
        assert last_json(output)["mode"] == "gradient"
        assert error.count("mode = gradient: for digits a worker's round takes about ") == 1

    def test_a_task_that_cannot_say(self) -> None:
        found = resolve_job({"task": "tests.service.test_data_consent:Silent", "mode": "auto"})
        assert found.config.mode == "gradient"
        assert found.choice == "mode = gradient: task tiny does not declare its features"


def test_a_task_whose_features_are_not_what_it_says(cluster: Cluster) -> None:
    task = ("--task", "tests.service.test_data_consent:Ranges")
    cluster.server(*task, "--mode", "data", "--workers", 1)
    cluster.worker("worker-0", *task, "--allow-data")
    code, _, error = cluster.finish("worker-0")
    assert code == ExitCode.USAGE
    assert error.splitlines()[-1].startswith("error: a feature is ")
    assert error.splitlines()[-1].endswith("out of the range (-8.0,) to (8.0,) that the task declares")
    assert "Traceback" not in error
