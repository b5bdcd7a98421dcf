"""The cluster in containers: a job trains over mutual TLS while a worker is replaced and the server is restarted."""

from __future__ import annotations

import json
import shutil
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deploy.engine import BASE, PROMETHEUS, TAG, Engine, build_images, compose_command, make_base, why_not
from tests.deploy.metrics_table import DEPLOY
from tests.deploy.test_prometheus import free_port
from tests.service.harness import wait_until

pytestmark = [pytest.mark.deploy, pytest.mark.slow, pytest.mark.timeout(2000)]  # both images are built from nothing

ROUNDS, WORKERS = 1000, 3
# With a quorum of all, a round waits for the replacement of a worker: however fast the machine, there are rounds left.
JOB = f"""
task = "digits"
codec = "dqsg"
rounds = {ROUNDS}
members = ["pool/*"]
quorum = 1.0
round_deadline_seconds = 300
idle_timeout_seconds = 10
join_timeout_seconds = 300

[worker]
connect_timeout_seconds = 300
"""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine with both images, and stand-ins for those that would be pulled."""
    if reason := why_not():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="dps"))  # short: a socket lies in it
    engine = Engine(folder)
    try:
        engine.wait()
        make_base(engine, folder)
        build_images(engine, folder, DEPLOY.parent)
        yield engine
    finally:
        engine.close()


class Project:
    """A copy of deploy/ with a job and settings of the test's own."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine, self.folder = engine, folder
        shutil.copytree(DEPLOY, folder, ignore=shutil.ignore_patterns("certs", ".env", "pictures"))
        (folder / "test.toml").write_text(JOB)
        prometheus = folder / "prometheus/prometheus.yml"
        prometheus.write_text(prometheus.read_text().replace(": 5s", ": 1s"))
        self.prometheus_port = free_port()
        settings = {
            "GRAFANA_PASSWORD": "unused", "WORKERS": WORKERS, "JOB_FILE": "./test.toml", "TAG": TAG, "BASE": BASE,
            "SERVER_PORT": free_port(), "PROMETHEUS_IMAGE": PROMETHEUS, "PROMETHEUS_PORT": self.prometheus_port,
        }  # fmt: skip
        (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))

    def compose(self, *arguments: str, check: bool = True) -> str:
        """What `docker compose ARGUMENTS` prints."""
        command = compose_command()
        assert command is not None
        return self._engine.run([*command, *arguments], cwd=self.folder, check=check).stdout

    def containers(self, service: str) -> list[str]:
        """The running containers of a service."""
        return self.compose("ps", "-q", service).split()

    def query(self, expression: str) -> dict[str, float]:
        """An instant query, by the value of its `worker` or `job` label; empty while Prometheus is not there."""
        url = f"http://127.0.0.1:{self.prometheus_port}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                found = json.load(response)["data"]["result"]
        except OSError:
            return {}
        return {s["metric"].get("worker") or s["metric"].get("job", ""): float(s["value"][1]) for s in found}

    def server_says(self, expression: str) -> int:
        """A gauge of the server, as Prometheus has it; 0 while it has none."""
        return int(self.query(expression).get("ditherps-server", 0))

    def round(self) -> int:
        """The round that is open."""
        return self.server_says('ditherps_round{job="ditherps-server"}')

    def present(self) -> int:
        """The workers that are here."""
        return self.server_says('ditherps_round_workers{state="present"}')


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Returns once it is true; asked a few times a second, since each question takes a process or Prometheus's time."""
    wait_until(condition, seconds, what, every_seconds=0.3)


def resumed_at(engine: Engine, server: str) -> int:
    """The version that a server went on from, as its log says; 0 if it does not."""
    lines = [json.loads(line) for line in engine.docker("logs", server).stderr.splitlines() if line.startswith("{")]
    return next((line["version"] for line in lines if line["message"].startswith("resumed")), 0)


def test_a_cluster_trains_while_it_is_taken_apart(engine: Engine, tmp_path: Path) -> None:
    project = Project(engine, tmp_path / "deploy")
    compose = project.compose
    up = ("up", "-d", "--no-build", "--no-recreate", "--scale", f"worker={WORKERS}", "server", "worker", "prometheus")
    compose("run", "--rm", "certs")
    compose(*up)

    wait_for(lambda: project.round() > 30, 400, "30 rounds")

    # One worker dies, and the round that is open waits for another in its place.
    first, second = project.containers("worker")[:2]
    engine.docker("rm", "--force", first)
    wait_for(lambda: project.present() == WORKERS - 1, 100, "its absence")
    stopped_at = project.round()
    assert stopped_at < ROUNDS / 2, "the run was too short to see it"
    (server,) = project.containers("server")
    assert engine.docker("exec", server, "id", "-u").stdout.strip() == "10001"
    assert engine.docker("exec", server, "sh", "-c", "command -v gcc cc pip", check=False).stdout == ""

    # Over mutual TLS: a worker's certificate gets in, nobody else does.
    status = ("exec", second, "ditherps", "status", "server:50051", "--json")
    members = json.loads(engine.docker(*status, "--certs", "/run/secrets/pool").stdout)["members"]
    assert {member["worker"] for member in members} == {f"pool/{index}" for index in range(WORKERS)}
    assert engine.docker(*status, check=False).returncode == 7

    # New certificates are seen in the containers as they are.
    old = (project.folder / "certs/server/cert.pem").read_text()
    compose("run", "--rm", "certs", "--renew")
    assert engine.docker("exec", server, "cat", "/run/secrets/server/cert.pem").stdout != old

    compose(*up)
    wait_for(lambda: project.round() > stopped_at + 20, 200, "rounds with its replacement")
    assert first not in project.containers("worker")
    scraped = {"ditherps-server": 1, "ditherps-worker": WORKERS}
    wait_for(lambda: project.query("count by (job) (up == 1)") == scraped, 60, "metrics of all of them")

    # The server is restarted, and goes on.
    compose("restart", "server")
    wait_for(lambda: resumed_at(engine, server) > 0, 200, "the server to begin where it was")
    version = resumed_at(engine, server)
    assert stopped_at < version < ROUNDS
    wait_for(lambda: project.round() > version + 20, 400, "rounds after the restart")

    assert engine.docker("wait", server).stdout.strip() == "0"
    engine.docker("cp", f"{server}:/var/lib/ditherps/run", tmp_path / "run")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["reason"] == "finished"
    assert result["rounds"] == ROUNDS
    assert result["test_accuracy"] >= 0.95
    records = [json.loads(line) for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    assert [record["version"] for record in records] == list(range(1, ROUNDS + 1))
    print({key: result[key] for key in ("test_accuracy", "seconds", "total_compression_vs_float32")})

    compose("down", "--volumes", "--remove-orphans")
    assert engine.docker("ps", "--all", "--quiet").stdout == ""
    assert engine.docker("volume", "ls", "--quiet").stdout == ""
    assert set(engine.docker("network", "ls", "--format", "{{.Name}}").stdout.split()) <= {"bridge", "host", "none"}


def test_why_not_is_said_in_one_line() -> None:
    assert "\n" not in why_not()


def test_images_are_small_and_start_warm(engine: Engine) -> None:
    for target in ("server", "worker"):
        image = engine.inspect(f"ditherps-{target}:{TAG}")
        assert int(str(image["Size"])) < 1.8e9  # with CUDA's libraries it would be above five
        assert image["Config"]["User"] == "10001:10001"  # type: ignore[index]
        assert image["Config"]["Healthcheck"]  # type: ignore[index]
    compiled = (
        "import sys; sys.argv = ['', 'dqsg']; import numba, runpy; from numba.core import event; "
        "from contextlib import ExitStack; stack = ExitStack(); "
        "seen = stack.enter_context(event.install_recorder('numba:compile')); "
        "runpy.run_module('ditherps.kernels'); print(len(seen.buffer))"
    )
    ran = engine.docker(
        "run", "--rm", "--network", "none", "--entrypoint", "python", f"ditherps-worker:{TAG}", "-c", compiled
    )
    assert int(ran.stdout.split()[-1]) == 0, ran.stdout  # nothing was compiled: all came from the image
