"""Forked processes are the command line, and processes."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.faults.forked import start_forked
from tests.faults.points import command, fired
from tests.service.harness import run, wait_until


def test_the_command_line_as_ever() -> None:
    forked = start_forked(["--version"])
    assert forked.communicate(timeout=60) == (run(["--version"]).stdout, "")
    assert forked.returncode == 0
    wrong = start_forked(["server", "--codec", "none-such"])
    assert "none-such" in wrong.communicate(timeout=60)[1]
    assert wrong.returncode == 2


def test_killed_from_without_and_from_within(tmp_path: Path) -> None:
    waiting = start_forked(["worker", "--server", f"@{tmp_path / 'never'}", "--task", "digits"])
    assert waiting.poll() is None
    waiting.kill()
    wait_until(lambda: waiting.poll() is not None, 10)
    assert waiting.returncode == -signal.SIGKILL
    fault = "kill:before:ditherps_server.run:run_server:1"
    within = start_forked(["server", "--run-dir", tmp_path], program=command(tmp_path / "marker", fault))
    assert (within.wait(60), fired(tmp_path / "marker")) == (-signal.SIGKILL, [fault])
