"""`ditherps local`: a server and its workers as processes on this machine, and one view of them."""

from __future__ import annotations

import contextlib
import json
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

from ditherps import kernels
from ditherps.codecs import codec as make_codec
from ditherps.config import JobConfig
from ditherps.errors import ExitCode, UnreachableError
from ditherps.summary import print_summary
from ditherps.view import SilentView, View, view

POLL_SECONDS = 0.05
START_SECONDS = 120.0
STOP_SECONDS = 15.0


class _InterruptedError(Exception):
    """The person, or the system, wants an end."""


def run_local(
    job: JobConfig, run_dir: Path, data_dir: Path | None, *, verbose: bool = False, quiet: bool = False
) -> tuple[dict[str, Any] | None, int]:
    """Run a job to its end; returns the result (None if there is none) and the exit code.

    Leaves no process behind, whatever happens. Logs of the processes are in the run folder. `quiet` shows errors only.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    for leftover in ("server.json", "result.json", "rounds.jsonl"):
        (run_dir / leftover).unlink(missing_ok=True)
    (run_dir / "job.toml").write_text(tomli_w.dumps(job.model_dump(mode="json")))
    shown = SilentView() if quiet else view(job)
    with _signals(), contextlib.ExitStack() as stack:
        processes = stack.enter_context(_Processes(run_dir))
        try:
            shown.note(f"run folder {run_dir}")
            _warm(job, shown)
            _start(job, run_dir, data_dir, processes, verbose=verbose)
            with shown:
                code = _follow(run_dir, processes, shown)
        except _InterruptedError:
            shown.note("interrupted: ending the server and its workers")
            processes.end()
            code = ExitCode.INTERRUPTED
    return _closing(run_dir, code, quiet=quiet)


def _warm(job: JobConfig, shown: View) -> None:
    """Compile kernels once, here, instead of in every process at the same time."""
    codec = make_codec(job.codec, **job.codec_options)
    began = time.monotonic()
    for role in codec.roles:
        kernels.warm(codec.for_role(role))
    if (seconds := time.monotonic() - began) > 2:
        shown.note(f"compiled kernels in {seconds:.0f} s (once on this machine)")


class _Processes:
    """The server's and the workers' processes; whatever is left of them dies with this object."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._files: list[IO[bytes]] = []
        self.server: subprocess.Popen[bytes] | None = None
        self.workers: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> _Processes:
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
        for process in self.running:
            process.send_signal(signal.SIGTERM)
        limit = time.monotonic() + STOP_SECONDS
        while self.running and time.monotonic() < limit:
            time.sleep(POLL_SECONDS)
        for process in self.running:
            process.kill()
            process.wait()


def _start(job: JobConfig, run_dir: Path, data_dir: Path | None, processes: _Processes, *, verbose: bool) -> None:
    shared = ["--data-dir", str(data_dir)] if data_dir else []
    shared += ["--verbose"] if verbose else []
    processes.server = processes.start(
        "server",
        ["server", "--config", str(run_dir / "job.toml"), "--port", "0", "--metrics-port", "0",
         "--run-dir", str(run_dir), *shared],
    )  # fmt: skip
    limit = time.monotonic() + START_SECONDS
    while not (run_dir / "server.json").exists():
        if processes.server.poll() is not None:
            raise _failed(run_dir, "server", processes.server.returncode)
        if time.monotonic() > limit:
            raise UnreachableError(f"the server did not start within {START_SECONDS:g} s; see {run_dir / 'server.log'}")
        time.sleep(POLL_SECONDS)
    address = json.loads((run_dir / "server.json").read_text())["address"]
    for name in job.member_table:
        arguments = ["worker", "--server", address, "--name", name, "--task", job.task, *shared]
        processes.workers[name] = processes.start(name, arguments)


def _follow(run_dir: Path, processes: _Processes, shown: View) -> int:
    """Show rounds as they close, until the server ends; returns its exit code."""
    assert processes.server is not None
    warned: set[str] = set()
    with (run_dir / "rounds.jsonl").open() as records:
        while True:
            ended = processes.server.poll() is not None
            for record in _lines(records):
                shown.show(record)
            if ended:
                break
            for name, process in processes.workers.items():
                if process.poll() not in (None, ExitCode.OK) and name not in warned:
                    warned.add(name)
                    shown.note(f"{_failed(run_dir, name, process.returncode)}")
            if len(warned) == len(processes.workers):
                raise _failed(run_dir, min(warned), processes.workers[min(warned)].returncode)
            time.sleep(POLL_SECONDS)
    limit = time.monotonic() + STOP_SECONDS
    while processes.running and time.monotonic() < limit:
        time.sleep(POLL_SECONDS)
    code = processes.server.returncode
    if code != ExitCode.OK:
        shown.note(str(_failed(run_dir, "server", code)))
    return code


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


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise `_InterruptedError`, once; then they are ignored until the end, which is bounded."""

    def interrupt(_: int, __: FrameType | None) -> None:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        raise _InterruptedError

    before = {name: signal.signal(name, interrupt) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _closing(run_dir: Path, code: int, *, quiet: bool) -> tuple[dict[str, Any] | None, int]:
    path = run_dir / "result.json"
    if not path.exists():
        return None, code
    result: dict[str, Any] = json.loads(path.read_text())
    if not quiet:
        print_summary(result)
    return result, code
