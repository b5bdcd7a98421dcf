"""A run folder on a disk that is full: what has been saved stays whole, and the run goes on when there is room."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ditherps_server import checkpoint
from ditherps_server.saving import CHECKPOINT_FILE
from tests.faults.disk import Disk, small_disk, why_not
from tests.faults.runs import Run
from tests.service.harness import Cluster, wait_until

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

JOB: dict[str, Any] = {"workers": 2, "codec": "dqsg", "optimizer": {"lr": 0.05, "momentum": 0.9}, "evaluate_every": 50}
CHECKPOINT = ("--checkpoint-every", 3)
CHECKPOINT_BYTES = 3 * 4 * 11_004
"""x, w and momentum of the model."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "run", 4 << 20) as disk:
        yield disk


@pytest.fixture
def run(cluster: Cluster, disk: Disk) -> Run:
    """A run whose folder is on the small disk; its server runs, its workers begin."""
    assert cluster.run_dir == disk.folder
    run = Run(cluster, rounds=60, **JOB)
    run.pace(0.1)
    run.server(*CHECKPOINT)
    run.workers()
    return run


def wait_for(run: Run, text: str, times: int = 1) -> None:
    """Returns when the server has logged `text` so often."""
    wait_until(lambda: run.log("server").read_text().count(text) >= times, 90, f"{text!r} in the server's log")


def test_a_disk_that_is_filled_and_freed(disk: Disk) -> None:
    disk.fill(leave_bytes=8192)
    assert disk.free_bytes == 8192
    (disk.folder / "small").write_bytes(bytes(8192))
    with pytest.raises(OSError, match="No space") as full:
        (disk.folder / "more").write_bytes(b"1")
    assert full.value.errno == errno.ENOSPC
    disk.free()
    (disk.folder / "more").write_bytes(bytes(1 << 20))


@pytest.mark.slow
def test_no_room_for_a_checkpoint(cluster: Cluster, disk: Disk, run: Run) -> None:
    """There is room for records, and for what workers send: the run goes on with the checkpoint that it has."""
    path = disk.folder / CHECKPOINT_FILE
    cluster.reached(4)
    disk.fill(leave_bytes=CHECKPOINT_BYTES * 2 // 3)
    wait_for(run, "not written", 2)
    saved = checkpoint.read(path).version
    assert 3 <= saved < cluster.records()[-1]["version"]
    assert list(disk.folder.glob("*.part")) == []

    disk.free()
    wait_until(lambda: checkpoint.read(path).version > saved, 60, "a newer checkpoint")
    saved = checkpoint.read(path).version
    failed = run.log("server").read_text().count("not written")
    disk.fill(leave_bytes=CHECKPOINT_BYTES * 2 // 3)
    wait_for(run, "not written", failed + 1)
    before = path.read_bytes()
    cluster.kill("server")
    run.begin_server(*CHECKPOINT, "--resume")  # as it stands, it would not survive being killed again
    assert cluster.finish("server")[0] == 2
    assert f"{path} cannot be written: No space left on device" in run.log("server").read_text()
    assert path.read_bytes() == before

    disk.free()
    run.server(*CHECKPOINT, "--resume")
    run.pace(0.0)
    result = run.ended_well()
    assert result["model_sha256"] == run.expected()


@pytest.mark.slow
def test_no_room_for_contributions(cluster: Cluster, disk: Disk, run: Run) -> None:
    """Pushes are refused with a reason of their own until there is room; workers wait, and lose nothing."""
    cluster.reached(4)
    disk.fill()
    wait_until(lambda: "reason=disk_full" in run.log("server").read_text(), 15, "a refused push")
    assert cluster.processes["server"].poll() is None
    disk.free()
    cluster.reached(8)
    disk.fill()
    cluster.kill("server")
    disk.free()
    run.server(*CHECKPOINT, "--resume")
    run.pace(0.0)
    assert run.ended_well()["model_sha256"] == run.expected()
