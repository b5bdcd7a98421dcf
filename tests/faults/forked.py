"""Processes that begin in a fraction of a second: forks of one that has imported everything, and does nothing else.

They run the same command line as those of `harness.start`, can be killed as any other, and put on another host. What
they do not do is import anything anew, so a clock that jumps (`points`) needs a process that starts from nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

from tests.service.harness import DITHERPS, ROOT, environment

_NETWORK_NAMESPACE = 0x40000000  # CLONE_NEWNET; Python has os.setns from 3.12 on
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.preloaded"])


class Forked:
    """As much of a `subprocess.Popen` as a cluster needs."""

    def __init__(
        self, program: Sequence[str], arguments: Sequence[str], stderr: IO[str] | None, namespace: str
    ) -> None:
        """`program`: a Python, `-m`, a module, and its first arguments; output goes to files."""
        self._folder = Path(tempfile.mkdtemp(prefix="forked-"))
        self._output = self._folder / "output"
        self._error = Path(stderr.name) if stderr is not None else self._folder / "error"
        self.args = [*program, *arguments]
        self.stderr = None
        self._process = _context.Process(
            target=_run, args=(self.args[1:], str(self._output), str(self._error), namespace)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        output, error = (path.read_text() if path.exists() else "" for path in (self._output, self._error))
        shutil.rmtree(self._folder, ignore_errors=True)
        return output, error


def start_forked(
    arguments: Sequence[object], program: Sequence[str] = DITHERPS, stderr: Any = None, namespace: str = ""
) -> subprocess.Popen[str]:
    """As `harness.start`, at once; in a network namespace (`hosts`) where one is named."""
    words = [str(argument) for argument in arguments]
    return cast("subprocess.Popen[str]", Forked(program, words, stderr, namespace))


def _run(arguments: Sequence[str], output: str, error: str, namespace: str) -> None:
    """In the child: become `python -m MODULE ARGUMENTS`."""
    if namespace:
        _enter(namespace)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment())
    for stream, path in ((0, os.devnull), (1, output), (2, error)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, stream)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in enumerate("rww"))
    option, module, *rest = arguments
    assert option == "-m"
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _enter(namespace: str) -> None:
    """Before there is another thread: each has its own."""
    with open(f"/run/netns/{namespace}") as opened:
        if ctypes.CDLL(None, use_errno=True).setns(opened.fileno(), _NETWORK_NAMESPACE) != 0:
            raise OSError(ctypes.get_errno(), f"network namespace {namespace}")
