"""Faults at named points act at the call that they name, and leave their mark."""

from __future__ import annotations

import asyncio
import errno
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.points import Clock, Fault, Point, command, fired
from tests.service.harness import ROOT, environment, run, wait_until

HERE = "tests.faults.test_points"


class Desk:
    """What the faults of these tests are put into."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def write(self, name: str) -> str:
        self.done.append(name)
        return name

    async def send(self, name: str) -> str:
        self.done.append(name)
        return name

    @staticmethod
    def seal() -> int:
        return 7


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put back what the tests wrap."""
    with monkeypatch.context() as patch:
        for name in ("write", "send", "seal"):
            patch.setattr(Desk, name, Desk.__dict__[name])
        for name in ("time", "monotonic"):
            patch.setattr(time, name, getattr(time, name))
        yield


def put_in(spec: str, marker: Path, clock: Clock | None = None) -> str:
    Point(Fault.parse(spec), str(marker), clock).put_in()
    return spec


def test_a_full_disk_before_and_after_the_call(tmp_path: Path) -> None:
    before = put_in(f"full:before:{HERE}:Desk.write:2", tmp_path / "marker")
    after = put_in(f"full:after:{HERE}:Desk.write@third:1+", tmp_path / "marker")
    desk, seen = Desk(), []
    for name in ("first", "second", "the third", "fourth", "third again"):
        try:
            seen.append(desk.write(name))
        except OSError as error:
            seen.append(errno.errorcode[error.errno or 0])
    assert desk.done == ["first", "the third", "fourth", "third again"]
    assert seen == ["first", "ENOSPC", "ENOSPC", "fourth", "ENOSPC"]
    assert fired(tmp_path / "marker") == [before, after, after]


def test_a_static_method(tmp_path: Path) -> None:
    put_in(f"full:after:{HERE}:Desk.seal:2", tmp_path / "marker")
    assert Desk.seal() == 7
    with pytest.raises(OSError, match="No space left"):
        Desk.seal()


async def test_a_stalled_coroutine_stands_still_alone(tmp_path: Path) -> None:
    spec = put_in(f"stall:before:{HERE}:Desk.send@slow:1:{tmp_path / 'go'}", tmp_path / "marker")
    desk = Desk()
    slow = asyncio.create_task(desk.send("slow"))
    await asyncio.to_thread(wait_until, lambda: fired(tmp_path / "marker"), 10, "the fault")
    assert await desk.send("quick") == "quick"
    assert desk.done == ["quick"]
    (tmp_path / "go").touch()
    assert await slow == "slow"
    assert (desk.done, fired(tmp_path / "marker")) == (["quick", "slow"], [spec])


def test_clocks_jump(tmp_path: Path) -> None:
    clock = Clock()
    put_in(f"clock:after:{HERE}:Desk.seal:1:wall=-3600", tmp_path / "marker", clock)
    put_in(f"clock:after:{HERE}:Desk.seal:2:monotonic=50", tmp_path / "marker", clock)
    wall, monotonic = time.time(), time.monotonic()
    Desk.seal()
    assert -3601 < time.time() - wall < -3590
    assert time.monotonic() - monotonic < 10
    Desk.seal()
    assert 50 <= time.monotonic() - monotonic < 60


def test_the_command_line_is_killed_and_says_where(tmp_path: Path) -> None:
    marker, fault = tmp_path / "marker", "kill:before:ditherps.cli:build_app:1"
    killed = subprocess.run([*command(marker, fault), "--version"], cwd=ROOT, env=environment(), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert fired(marker) == [fault]


def test_the_command_line_where_nothing_fires_is_as_ever(tmp_path: Path) -> None:
    later = command(tmp_path / "marker", "kill:after:ditherps.cli:build_app:2")
    as_ever = subprocess.run(
        [*later, "--version"], cwd=ROOT, env=environment(), check=False, capture_output=True, text=True
    )
    assert (as_ever.returncode, as_ever.stdout) == (0, run(["--version"]).stdout)
    assert fired(tmp_path / "marker") == []


@pytest.mark.parametrize(
    "spec",
    ["kill:before:a:b", "jump:before:a:b:1", "kill:during:a:b:1", "kill:after:a:b:0", "kill:after:a:b:1:5",
     "stall:after:a:b:1"],
)  # fmt: skip
def test_what_is_not_a_fault(spec: str) -> None:
    with pytest.raises(ValueError, match=r"not ACTION|CALL or VALUE"):
        Fault.parse(spec)


def test_an_attribute_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        put_in(f"kill:before:{HERE}:Desk.none:1", tmp_path / "marker")
    assert sys.modules[HERE].__dict__["Desk"] is Desk
