"""A server that has to go while something slow is under way: within its grace, with what the next one needs."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ditherps.config import ServerConfig
from ditherps.errors import Reason
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps_server.app import serve
from ditherps_server.redo import RedoLog
from ditherps_server.saving import CHECKPOINT_FILE
from tests.service.inprocess import CALL_SECONDS, Peer, answered, serving
from tests.tiny import Tiny

pytestmark = pytest.mark.asyncio(loop_scope="session")


class Endless(Tiny):
    """Its evaluation takes until it is told to end."""

    def __init__(self) -> None:
        self.begun, self.over = threading.Event(), threading.Event()

    def correct(self, outputs: Tensor, labels: Tensor) -> int:
        """As any task's, in the end."""
        self.begun.set()
        assert self.over.wait(CALL_SECONDS)
        return super().correct(outputs, labels)


async def test_an_evaluation_does_not_hold_up_the_checkpoint(tmp_path: Path) -> None:
    task = Endless()
    try:
        async with serving(tmp_path, task=task, server={"grace_seconds": 0.3}) as served, Peer(served.address) as a:
            async with Peer(served.address) as b:
                await a.join("worker-0")
                await b.join("worker-1")
                await asyncio.to_thread(task.begun.wait, CALL_SECONDS)
                began = time.monotonic()
                os.kill(os.getpid(), signal.SIGTERM)
                async with asyncio.timeout(CALL_SECONDS):
                    result = await asyncio.shield(served.running)
            assert result.reason == Reason.SUSPENDED
            assert result.test_accuracy is None
            assert time.monotonic() - began < CALL_SECONDS / 2
            assert (tmp_path / CHECKPOINT_FILE).exists()
    finally:
        task.over.set()


async def test_a_round_that_finds_no_room_is_left_to_the_next_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = RedoLog._write, threading.Event()

    def write(log: RedoLog, entries: Any) -> None:
        if any(b'"closed"' in bytes(entry.parts[0]) for entry in entries):
            failed.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(log, entries)

    monkeypatch.setattr(RedoLog, "_write", write)
    options: dict[str, Any] = {"workers": 1, "rounds": 1, "round_deadline_seconds": 600.0}
    async with serving(tmp_path, server={"grace_seconds": 0.3}, **options) as served, Peer(served.address) as a:
        await a.join("worker-0")
        plan = await a.plan()
        update = a.update(plan)
        assert (await a.push(a.header(plan, update), update)).HasField("accepted")
        await asyncio.to_thread(failed.wait, CALL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(CALL_SECONDS):
            assert (await asyncio.shield(served.running)).reason == Reason.SUSPENDED
    monkeypatch.undo()
    async with serving(tmp_path, server={"resume": True}, **options) as served:  # with what it had acknowledged
        async with asyncio.timeout(CALL_SECONDS):
            result = await asyncio.shield(served.running)
        assert (result.reason, result.contributions) == (Reason.FINISHED, 1)


async def test_after_the_last_round_the_next_server_lets_workers_come_back(tmp_path: Path) -> None:
    options: dict[str, Any] = {"workers": 1, "rounds": 1, "evaluator": "worker"}
    async with serving(tmp_path, **options) as served, Peer(served.address) as a:
        await a.join("worker-0", lease_key=b"k" * 16)
        plan = await a.plan()
        await answered(a.stub.Report(pb.ReportRequest(fence=a.fence, evaluation=pb.Evaluation(version=0, samples=50))))
        update = a.update(plan)
        assert (await a.push(a.header(plan, update), update)).HasField("accepted")
        await served.reached(1)
    async with serving(tmp_path, server={"resume": True}, **options) as served, Peer(served.address) as a:
        assert "1 workers to come back before the run is over" in (await a.status()).waiting_for
        await a.join("worker-0", lease_key=b"k" * 16)
        plan = await a.plan()
        assert (plan.round, plan.evaluate) == (1, True)
        evaluation = pb.Evaluation(version=1, loss=1.0, accuracy=0.5, samples=50)
        await answered(a.stub.Report(pb.ReportRequest(fence=a.fence, evaluation=evaluation)))
        async with asyncio.timeout(CALL_SECONDS):
            result = await asyncio.shield(served.running)
        assert (result.reason, result.test_accuracy) == (Reason.FINISHED, 0.5)
    assert not (tmp_path / CHECKPOINT_FILE).exists()
    config = ServerConfig(run_dir=tmp_path, port=0, metrics_port=-1, resume=True)
    assert await serve(served.job, config, Tiny()) == result  # whoever starts it once more begins nothing anew
