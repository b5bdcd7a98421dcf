"""A Docker engine for the tests, and what they need in place of images that they cannot pull."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

BASE = "ditherps-test-base:bookworm"
PROMETHEUS = "ditherps-test-prometheus:local"
TAG = "deploy-test"


def docker_client() -> str | None:
    """The first Docker client on PATH that builds with BuildKit: with the plugin, or older than that."""
    for folder in os.environ["PATH"].split(os.pathsep):
        client = shutil.which("docker", path=folder)
        if client is None:
            continue
        said = subprocess.run([client, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
        version = re.search(r"version (\d+)\.", said)
        old = version is not None and int(version[1]) < 23
        if (
            old
            or not subprocess.run(
                [client, "buildx", "version"], capture_output=True, timeout=60, check=False
            ).returncode
        ):
            return client
    return None


def compose_command() -> list[str] | None:
    """`docker compose`, or the older `docker-compose`; None where there is neither."""
    if shutil.which("docker"):
        asked = subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=60, check=False)
        if asked.returncode == 0:
            return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


def why_not() -> str:
    """Why no containers can be run here, in one line; empty where they can."""
    if os.geteuid() != 0:
        return "containers need root here"
    for program, package in (
        ("dockerd", "docker.io"), ("debootstrap", "debootstrap"), ("prometheus", "prometheus"),
    ):  # fmt: skip
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian's package {package})"
    if docker_client() is None:
        return "no Docker client here can build with BuildKit (Debian's package docker.io)"
    return "" if compose_command() else "docker compose is not installed (Debian's package docker-compose)"


class Engine:
    """A Docker engine of the test's own, on a socket of its own."""

    def __init__(self, folder: Path) -> None:
        self.host = f"unix://{folder / 's'}"
        self._folder, self._client = folder, docker_client()
        self._log = (folder / "dockerd.log").open("wb")
        self._process = subprocess.Popen(
            [
                "dockerd", "--data-root", str(folder / "data"), "--exec-root", str(folder / "exec"),
                "--pidfile", str(folder / "pid"), "-H", self.host,
                # This machine's network stays as it is: containers of one network need no more than their bridge.
                "--bridge", "none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false",
            ],
            stdout=self._log, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def wait(self, seconds: float = 60.0) -> None:
        """Returns when it answers; skips the test where it cannot run, with its last words."""
        limit = time.monotonic() + seconds
        while self.docker("version", check=False).returncode:
            if self._process.poll() is not None or time.monotonic() > limit:
                last = (self._folder / "dockerd.log").read_text().rstrip().rsplit("\n", 1)[-1]
                pytest.skip(f"dockerd does not run here: {last[:300]}")
            time.sleep(0.2)

    def docker(self, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `docker ARGUMENTS`."""
        return self.run([str(self._client), *map(str, arguments)], check=check)

    def run(
        self, command: Sequence[str], *, check: bool = True, seconds: float = 900.0, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command that talks to this engine; fails with what it said."""
        # Programs of the system's Python must not find the packages of this one.
        own = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "DITHERPS_"))}
        environment = {**own, "DOCKER_HOST": self.host, "DOCKER_BUILDKIT": "1"}
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, env=environment, cwd=cwd
        )
        assert ended.returncode == 0 or not check, f"{command}: {ended.stdout[-4000:]}\n{ended.stderr[-6000:]}"
        return ended

    def inspect(self, thing: str) -> dict[str, object]:
        """What `docker inspect` says."""
        (found,) = json.loads(self.docker("inspect", thing).stdout)
        assert isinstance(found, dict)
        return found

    def close(self) -> None:
        """End it, and whatever runs in it: also what a test that failed has left, whose bridges would outlive it."""
        if self._process.poll() is None:
            if containers := self.docker("ps", "--all", "--quiet", check=False).stdout.split():
                self.docker("rm", "--force", *containers, check=False)
            self.docker("network", "prune", "--force", check=False)
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        remove(self._folder)


def remove(folder: Path) -> None:
    """Delete a folder with the tens of thousands of files of an image: `shutil` takes minutes for them."""
    subprocess.run(["rm", "-rf", folder], check=False)


def make_base(engine: Engine, folder: Path) -> None:
    """A small Debian with Python, as the image BASE, and with Prometheus, as the image PROMETHEUS."""
    root = folder / "base"
    engine.run(["debootstrap", "--variant=minbase", "--include=python3,python3-venv", "bookworm", str(root)])
    for leftover in (root / "var/cache/apt/archives").glob("*.deb"):
        leftover.unlink()
    engine.run(["sh", "-c", f"tar -C {root} -c . | {docker_client()} import - {BASE}"])
    context = folder / "prometheus-image"
    context.mkdir()
    for program in ("prometheus", "promtool"):
        shutil.copy(str(shutil.which(program)), context)
    (context / "Dockerfile").write_text(
        f"FROM {BASE}\nCOPY prometheus promtool /bin/\nRUN install -d -o 65534 -g 65534 /prometheus\n"
        'USER 65534\nENTRYPOINT ["/bin/prometheus"]\n'
    )
    engine.docker("build", "--network", "none", "-t", PROMETHEUS, context)


@contextmanager
def wheels() -> Iterator[tuple[list[str], str]]:
    """Torch's CPU build from this machine's disk, where it lies there, through a local server.

    The build arguments, and a line for pip's configuration, which may be another each time without any step being made
    anew.
    """
    found = [
        path for folder in os.environ.get("PIP_FIND_LINKS", "").split() for path in Path(folder).glob("torch-*+cpu-*")
    ]
    if not found:
        yield [], ""
        return
    version = found[0].name.split("-")[1].partition("+")[0]
    _, minor, _ = version.split(".")
    # torchvision's releases follow torch's; the digits need none of it, so that its own build does not matter.
    torchvision = f"torchvision==0.{int(minor) + 15}.*"
    handler = functools.partial(_Quiet, directory=str(found[0].parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield (
            ["--build-arg", f"TORCH=torch=={version} {torchvision}", "--build-arg", "TORCH_INDEX="],
            f"find-links = http://127.0.0.1:{server.server_port}/\n",
        )
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing."""


def build_images(engine: Engine, folder: Path, repository: Path) -> None:
    """Both images, tagged TAG, through this machine's way to its packages."""
    bundle = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    with wheels() as (torch, find_links):
        secrets = ["--secret", f"id=pip_conf,src={folder / 'pip.conf'}"]
        if bundle:
            secrets += ["--secret", f"id=ca_bundle,src={bundle}"]
        cert = "cert = /run/secrets/ca_bundle\n" if bundle else ""
        (folder / "pip.conf").write_text(f"[global]\n{cert}{find_links}")
        for target in ("server", "worker"):
            engine.docker(
                "build", "--network", "host", "-f", repository / "deploy/Dockerfile", "--target", target,
                "-t", f"ditherps-{target}:{TAG}", "--build-arg", f"BASE={BASE}", "--build-arg", "WARM=dqsg",
                *torch, *secrets, repository,
            )  # fmt: skip
