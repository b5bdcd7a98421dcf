"""`ditherps local`: a server and its workers as processes on this machine, and one view of them."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

import tomli_w

from ditherps.config import JobConfig
from ditherps.errors import ExitCode, UnreachableError
from ditherps.files import make
from ditherps.job import ResolvedJob
from ditherps.summary import print_summary
from ditherps.view import SilentView, View, view

POLL_SECONDS = 0.05
LAUNCH_FILE = "launch.toml"
START_SECONDS = 120.0
STOP_SECONDS = 15.0


class _InterruptedError(Exception):
    """The person, or the system, wants an end."""


class _Signals:
    """Notes that an end is wanted; whoever waits looks here, so nothing is torn in the middle of a step."""

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[name] = signal.signal(name, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _note(self, _: int, __: FrameType | None) -> None:
        self.wanted = True

    def pause(self) -> None:
        """Wait a moment; raises `_InterruptedError` if an end is wanted."""
        if self.wanted:
            raise _InterruptedError
        time.sleep(POLL_SECONDS)


def run_local(
    resolved: ResolvedJob, run_dir: Path, data_dir: Path | None, *, verbose: bool = False, quiet: bool = False
) -> tuple[dict[str, Any] | None, int]:
    """Run a job to its end; returns the result (None if there is none) and the exit code.

    Leaves no process behind. Logs of the processes are in the run folder. `quiet` shows errors only.
    """
    job = resolved.config
    make(run_dir)
    for leftover in ("server.json", "result.json", "rounds.jsonl"):
        (run_dir / leftover).unlink(missing_ok=True)
    file = {
        **job.model_dump(mode="json"),
        "server": dict(resolved.server),
        "worker": {
            "connect_timeout_seconds": START_SECONDS,
            **{key: value for key, value in resolved.worker.items() if key != "allow_data"},
        },
    }
    (run_dir / LAUNCH_FILE).write_text(tomli_w.dumps(file))
    shown = SilentView() if quiet else view(job)
    with _Signals() as signals, Processes(run_dir) as processes:
        try:
            shown.note(f"run folder {run_dir}")
            if resolved.choice:
                shown.note(resolved.choice)
            _start(job, run_dir, data_dir, processes, signals, verbose=verbose)
            with shown:
                code = _follow(run_dir, processes, signals, shown)
        except _InterruptedError:
            shown.note("interrupted: ending the server and its workers")
            processes.end()
            code = ExitCode.INTERRUPTED
    return _closing(run_dir, code, quiet=quiet)


class Processes:
    """The server's and the workers' processes; whatever is left of them dies with this object."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._files: list[IO[bytes]] = []
        self.server: subprocess.Popen[bytes] | None = None
        self.workers: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()
        for file in self._files:
            file.close()

    def start(self, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        """Start `ditherps ARGUMENTS`, its output in `NAME.log` of the run folder."""
        log = (self._run_dir / f"{name.replace('/', '_')}.log").open("wb")
        self._files.append(log)
        # The environment has had its say in this process; flags that beat it must not lose to it there.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("DITHERPS_")}
        # A session of its own: Ctrl-C reaches this process alone, which ends the others in order.
        return subprocess.Popen(
            [sys.executable, "-m", "ditherps", *arguments],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip

    @property
    def running(self) -> list[subprocess.Popen[bytes]]:
        """Those that have not ended; the server first, since it tells its workers."""
        all_ = [*([self.server] if self.server else []), *self.workers.values()]
        return [process for process in all_ if process.poll() is None]

    def end(self) -> None:
        """Ask all to end, and see to it."""
        serving = (self._run_dir / "server.json").exists()
        for process in self.running:
            # A server that serves would only suspend the run on SIGTERM.
            process.send_signal(signal.SIGINT if serving and process is self.server else signal.SIGTERM)
        limit = time.monotonic() + STOP_SECONDS
        while self.running and time.monotonic() < limit:
            time.sleep(POLL_SECONDS)
        for process in self.running:
            process.kill()
            process.wait()


def _start(
    job: JobConfig,
    run_dir: Path,
    data_dir: Path | None,
    processes: Processes,
    signals: _Signals,
    *,
    verbose: bool,
) -> None:
    shared = ["--config", str(run_dir / LAUNCH_FILE)]
    shared += ["--data-dir", str(data_dir)] if data_dir else []
    shared += ["--verbose"] if verbose else []
    ports = ["--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]
    processes.server = processes.start("server", ["server", *ports, "--run-dir", str(run_dir), *shared])
    # Workers load what they need while the server starts: they wait for its announcement, as this does.
    for name in job.member_table:
        arguments = ["worker", "--server", f"@{run_dir / 'server.json'}", "--name", name, "--task", job.task, *shared]
        arguments += ["--allow-data"] if job.mode == "data" else []  # whoever asked for it is the same person
        processes.workers[name] = processes.start(name, arguments)
    limit = time.monotonic() + START_SECONDS
    while not (run_dir / "server.json").exists():
        if processes.server.poll() is not None:
            raise _failed(run_dir, "server", processes.server.returncode)
        if time.monotonic() > limit:
            raise UnreachableError(f"the server did not start within {START_SECONDS:g} s; see {run_dir / 'server.log'}")
        signals.pause()


def _follow(run_dir: Path, processes: Processes, signals: _Signals, shown: View) -> int:
    """Show rounds as they close, until the server ends; returns its exit code.

    Raises what a worker said last when all of them have ended and the server still waits.
    """
    server, workers = processes.server, processes.workers
    assert server is not None
    noted: set[str] = set()
    limit = math.inf
    with (run_dir / "rounds.jsonl").open() as records:
        while True:
            ended = server.poll() is not None
            for record in _lines(records):
                shown.show(record)
            if ended:
                break
            for name, process in workers.items():
                if process.poll() not in (None, ExitCode.OK) and name not in noted:
                    noted.add(name)
                    shown.note(str(_failed(run_dir, name, process.returncode)))
            if limit == math.inf and all(process.poll() is not None for process in workers.values()):
                limit = time.monotonic() + STOP_SECONDS  # the server may be at its plots
            if time.monotonic() > limit and noted:
                raise _failed(run_dir, min(noted), workers[min(noted)].returncode)
            signals.pause()
    limit = time.monotonic() + STOP_SECONDS
    while processes.running and time.monotonic() < limit:
        time.sleep(POLL_SECONDS)
    if server.returncode != ExitCode.OK:
        shown.note(str(_failed(run_dir, "server", server.returncode)))
    return server.returncode


def _lines(file: IO[str]) -> Iterator[dict[str, Any]]:
    while True:
        at = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(at)
            return
        yield json.loads(line)


class _ProcessFailedError(UnreachableError):
    """A process ended that should not have."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = ExitCode(code) if code in list(ExitCode) else ExitCode.INTERNAL


def _failed(run_dir: Path, name: str, code: int) -> _ProcessFailedError:
    """What a process said last, as one line."""
    path = run_dir / f"{name.replace('/', '_')}.log"
    said = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    last = said[-1].removeprefix("error: ") if said else "it said nothing"
    return _ProcessFailedError(f"{name} ended with exit code {code}: {last}", code)


def _closing(run_dir: Path, code: int, *, quiet: bool) -> tuple[dict[str, Any] | None, int]:
    path = run_dir / "result.json"
    if not path.exists():
        return None, code
    result: dict[str, Any] = json.loads(path.read_text())
    if not quiet:
        print_summary(result)
    return result, code
