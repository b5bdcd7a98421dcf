"""Real servers and workers as processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

START_SECONDS = 120.0
ROOT = Path(__file__).parents[2]
"""Where `tests` can be imported from."""
DITHERPS = (sys.executable, "-m", "ditherps")


def environment(**extra: str) -> dict[str, str]:
    """The tests' own environment without options for ditherps, except where data is."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith("DITHERPS_") or key == "DITHERPS_DATA"
    }
    return {**kept, "NO_COLOR": "1", "COLUMNS": "200", **extra}


def start(arguments: Sequence[object], program: Sequence[str] = DITHERPS, **options: Any) -> subprocess.Popen[str]:
    """Start `ditherps ARGUMENTS`; `program` may put it in another place, or faults into it."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([*program, *map(str, arguments)], text=True, cwd=ROOT, env=environment(), **streams)


def run(arguments: Sequence[object], timeout: float = 100.0, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run `ditherps ARGUMENTS` to its end."""
    return subprocess.run(
        [*DITHERPS, *map(str, arguments)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, env=environment(**extra),
        check=False,
    )  # fmt: skip


def last_json(output: str) -> dict[str, Any]:
    """The JSON object in the last line of an output."""
    value = json.loads(output.rstrip().rsplit("\n", 1)[-1])
    assert isinstance(value, dict)
    return value


def wait_until(condition: Any, seconds: float = START_SECONDS, what: str = "", every_seconds: float = 0.02) -> Any:
    """The first true value of `condition()`; fails after `seconds`."""
    limit = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < limit, f"waited {seconds} s for {what or condition}"
        time.sleep(every_seconds)
    return value


class Cluster:
    """A server and workers, started one by one; all are gone when it closes."""

    def __init__(self, run_dir: Path, start: Callable[..., subprocess.Popen[str]] = start) -> None:
        """`start`: how a process begins."""
        self.run_dir = run_dir
        self._start = start
        self.address = ""
        self.metrics_port = 0
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def server(self, *arguments: object, **options: Any) -> None:
        """Start the server and wait until it listens: at the port that it had before, or at any."""
        self.begin_server(*arguments, **options)
        self.await_server()

    def begin_server(self, *arguments: object, **options: Any) -> subprocess.Popen[str]:
        """Start the server; options as of `start`."""
        (self.run_dir / "server.json").unlink(missing_ok=True)
        port = self.address.rpartition(":")[2] or 0
        asked = ["server", "--run-dir", self.run_dir, "--port", port, "--metrics-port", 0, "--json", *arguments]
        self.processes["server"] = self._start(asked, **options)
        return self.processes["server"]

    def await_server(self) -> None:
        """Returns when the server listens."""
        process = self.processes["server"]

        def listening() -> bool:
            assert process.poll() is None, process.stderr and process.stderr.read()
            return (self.run_dir / "server.json").exists()

        wait_until(listening, what="the server")
        announced = json.loads((self.run_dir / "server.json").read_text())
        self.address, self.metrics_port = announced["address"], announced["metrics_port"]

    def worker(self, name: str, *arguments: object, server: str = "", **options: Any) -> subprocess.Popen[str]:
        """Start a worker; options as of `start`."""
        asked = ["worker", "--server", server or self.address, "--name", name, *arguments]
        self.processes[name] = self._start(asked, **options)
        return self.processes[name]

    def kill(self, name: str) -> None:
        """End a process as a power cut would."""
        self.processes[name].kill()
        self.processes.pop(name).communicate()

    def finish(self, name: str, timeout: float = 180.0) -> tuple[int, str, str]:
        """Wait for a process's end: exit code, standard output, standard error."""
        process = self.processes[name]
        output, error = process.communicate(timeout=timeout)
        return process.returncode, output, error

    def records(self) -> list[dict[str, Any]]:
        """The rounds that have closed, as far as they are written."""
        path = self.run_dir / "rounds.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def reached(self, version: int, seconds: float = 120.0) -> None:
        """Returns when the round that makes this version has been recorded."""
        wait_until(lambda: (found := self.records()) and found[-1]["version"] >= version, seconds, f"version {version}")

    def result(self) -> dict[str, Any]:
        """The result of a server that ended well."""
        code, output, error = self.finish("server")
        assert code == 0, error
        return last_json(output)

    def close(self) -> None:
        """End what is left."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            with contextlib.suppress(ValueError):
                process.communicate()
