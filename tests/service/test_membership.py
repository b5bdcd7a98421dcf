"""Who takes part: sampling, min_workers, a job that is full, a run that is suspended; over real sockets."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ditherps import wire
from ditherps.config import JobConfig
from ditherps.errors import OptionError, Reason, RefusedError, RunFailedError
from ditherps.tasks import Task
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps.v1 import types_pb2
from ditherps_server.rounds import Awaited, Rules, invite
from tests.service.inprocess import Peer, Refused, Served, answered, serving
from tests.service.simulation import simulated
from tests.tiny import Tiny
from tests.worker.test_loop import worker

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

SAMPLED: dict[str, Any] = {"workers": 4, "sample_fraction": 0.5, "rounds": 8}


def invited(job: JobConfig, round_: int) -> list[int]:
    """Whom a round invites when everybody is here."""
    rules = Rules(job.workers, job.rounds, 1, 1, 1, seed=job.seed, sample_fraction=job.sample_fraction)
    return list(invite(rules, round_, tuple(range(job.workers))))


async def finished(served: Served, task: Task | None = None) -> None:
    """Run all workers of a job to its end."""
    await asyncio.gather(*(worker(served.address, name, task) for name in served.job.member_table))


class TestSampling:
    async def test_a_sampled_run_is_a_function_of_the_job_file(self, tmp_path: Path) -> None:
        async with serving(tmp_path, model="norm", **SAMPLED) as served:
            await finished(served)
            run, records = await served.running, served.records()
        assert [record["workers"] for record in records] == [invited(served.job, round_) for round_ in range(8)]
        assert all(record["absent"] == {} for record in records)
        assert {index for record in records for index in record["workers"]} == {0, 1, 2, 3}
        assert run.contributions == 16
        members = [record["workers"] for record in records]
        assert simulated(served.job, Tiny(), members) == run.model_sha256
        assert simulated(served.job, Tiny()) != run.model_sha256

    async def test_a_worker_is_told_of_its_own_rounds_only(self, tmp_path: Path) -> None:
        async with serving(tmp_path, workers=2, sample_fraction=0.5, rounds=8, evaluator="server") as served:
            peers = [Peer(served.address), Peer(served.address)]
            for index, peer in enumerate(peers):
                await peer.join(f"worker-{index}")
            watches = [peer.watch() for peer in peers]
            first = [wire.checked(await watch.read()) for watch in watches]
            order = [invited(served.job, round_)[0] for round_ in range(8)]
            assert [state.HasField("opened") for state in first] == [order[0] == 0, order[0] == 1]
            plan = first[order[0]].opened
            for round_, index in enumerate(order):
                other = peers[1 - index]
                refused = (await other.push(other.header(plan, b"x"), b"x")).refused
                assert refused.reason == Reason.NOT_INVITED
                assert (plan.round, plan.evaluate) == (round_, False)
                update = peers[index].update(plan)
                assert (await peers[index].push(peers[index].header(plan, update), update)).HasField("accepted")
                told = wire.checked(await watches[index].read())
                assert (told.closed.round, told.closed.included) == (round_, True)
                if round_ == 7:
                    break
                if order[round_ + 1] != index:  # whoever sat the round out hears nothing but its next plan
                    assert not told.HasField("opened")
                    told = wire.checked(await watches[1 - index].read())
                    assert not told.HasField("closed")
                plan = told.opened
            for peer in peers:
                await peer.channel.close()

    async def test_the_lowest_of_the_invited_evaluates(self, tmp_path: Path) -> None:
        """And those that sat rounds out come back by their steps, not by a whole model."""
        async with serving(tmp_path, model="wide", evaluator="worker", evaluate_every=1, **SAMPLED) as served:
            await finished(served)
            run = await served.running
            assert run.test_accuracy is not None
            # In one process with the others, what a worker builds may be spoiled by their random numbers: then its
            # first model comes whole.
            assert run.downlink_snapshots <= 4
            assert run.digest_mismatches == 0
        assert all(record["test_accuracy"] is not None for record in served.records())

    async def test_only_the_invited_need_room(self, tmp_path: Path) -> None:
        whole: dict[str, Any] = {"workers": 4, "model": "wide", "codec": "none"}
        with pytest.raises(OptionError, match="4 workers times") as refused:
            async with serving(tmp_path, staging_bytes=1, **whole):
                pass
        room = int(refused.value.allowed.split()[2].rstrip(":"))
        async with serving(tmp_path, staging_bytes=room // 2, sample_fraction=0.5, **whole):
            pass
        with pytest.raises(OptionError, match="2 workers times"):
            async with serving(tmp_path, staging_bytes=room // 2 - 1, sample_fraction=0.5, **whole):
                pass

    async def test_min_workers_are_enough(self, tmp_path: Path) -> None:
        async with serving(tmp_path, workers=5, min_workers=2, rounds=3) as served:
            await asyncio.gather(worker(served.address, "worker-3"), worker(served.address, "worker-1"))
            assert (await served.running).reason == "finished"
        assert [record["workers"] for record in served.records()] == [[1, 3]] * 3


class TestAFullJob:
    async def test_a_replacement_waits_until_its_predecessor_is_missed(self, tmp_path: Path, caplog: Any) -> None:
        async with serving(tmp_path, workers=1, rounds=2, idle_timeout_seconds=1.5) as served:
            async with Peer(served.address) as dead:
                await dead.join()
            result = await worker(served.address, "", connect_timeout_seconds=20)
            assert result.reason == "finished"
        said = [message for message in caplog.messages if "members of this job are here; " in message]
        assert said == ["all 1 members of this job are here; trying again for at most 20 s"]

    async def test_but_not_for_ever(self, tmp_path: Path) -> None:
        async with serving(tmp_path, workers=1) as served, Peer(served.address) as alive:
            await alive.join()
            with pytest.raises(RefusedError) as refused:
                await worker(served.address, "", connect_timeout_seconds=0.7)
            assert refused.value.reason is Reason.MEMBERS_FULL


class TestNobodyIsHere:
    async def test_an_open_round_that_all_have_left_ends_the_run(self, tmp_path: Path) -> None:
        async with serving(tmp_path, join_timeout_seconds=1.0) as served, Peer(served.address) as a:
            async with Peer(served.address) as b:
                for peer, name in ((a, "worker-0"), (b, "worker-1")):
                    await peer.join(name)
                await a.plan()
                for peer in (a, b):
                    await answered(peer.stub.Leave(pb.LeaveRequest(fence=peer.fence)))
            status = await a.status()
            assert status.phase == types_pb2.PHASE_OPEN
            assert status.waiting_for.startswith(
                "workers: none is here, and 0 of 2 contributions are; the run ends in "
            )
            assert status.waiting_seconds < 1.0
            with pytest.raises(RunFailedError, match="too few workers were here") as ended:
                await served.running
            assert ended.value.reason is Reason.JOIN_TIMEOUT

    async def test_on_empty_wait(self, tmp_path: Path) -> None:
        """It goes on when they come back, long after join_timeout."""
        server = {"on_empty": "wait"}
        async with serving(tmp_path, join_timeout_seconds=0.2, server=server, rounds=2) as served:
            async with Peer(served.address) as peer:
                while (status := await peer.status()).waiting_seconds < 1.0:
                    pass
                assert status.waiting_for == "workers: 0 of the 2 that a round needs are here; there is no limit"
            await finished(served)
            assert (await served.running).reason == "finished"


class TestSuspend:
    async def test_workers_are_told_that_the_server_goes(self, tmp_path: Path) -> None:
        async with serving(tmp_path, metrics=True) as served, Peer(served.address) as a, Peer(served.address) as b:
            gauge = 'ditherps_waiting_seconds{{awaited="{}"}}'.format
            await a.join("worker-0")
            await b.join("worker-1")
            plan, watch = await a.plan(), a.watch()
            assert wire.checked(await watch.read()).HasField("opened")
            update = a.update(plan)
            assert (await a.push(a.header(plan, update), update)).HasField("accepted")
            os.kill(os.getpid(), signal.SIGTERM)
            while "suspended" not in (status := await a.status()).waiting_for:
                pass
            assert status.phase == types_pb2.PHASE_OPEN
            assert status.waiting_for.startswith(
                "contributions: 1 of 2 are here; missing: worker-1; the run is suspended in"
            )
            while not await served.metric(gauge(Awaited.CONTRIBUTIONS)):
                pass
            assert await served.metric(gauge(Awaited.WORKERS)) == 0
            update = b.update(plan, 1)
            assert (await b.push(b.header(plan, update), update)).HasField("accepted")
            last = wire.checked(await watch.read())
            assert (last.phase, last.version, last.closed.included) == (types_pb2.PHASE_SUSPENDED, 1, True)
            assert not last.HasField("opened")
            assert not last.HasField("finished")
            result = await served.running
            assert (result.reason, result.rounds) == ("suspended", 1)
            assert (tmp_path / "checkpoint.safetensors").exists()

    @pytest.mark.parametrize("grace_seconds", [0, 20])
    async def test_the_same_workers_finish_it_with_the_next_server(self, tmp_path: Path, grace_seconds: float) -> None:
        options: dict[str, Any] = {"rounds": 40, "model": "norm", "codec": "ndqsg"}
        server: dict[str, Any] = {"grace_seconds": grace_seconds}
        async with serving(tmp_path, server=server, **options) as served:
            workers = [asyncio.create_task(worker(served.address, name)) for name in served.job.member_table]
            await served.reached(5)
            os.kill(os.getpid(), signal.SIGTERM)
            suspended = await served.running
            assert suspended.reason == "suspended"
            assert 5 <= suspended.rounds < 40
        server |= {"resume": True, "port": int(served.address.rpartition(":")[2])}
        async with serving(tmp_path, server=server, **options) as served:
            results = await asyncio.gather(*workers)
            run = await served.running
        assert {result.model_sha256 for result in results} == {run.model_sha256} == {simulated(served.job, Tiny())}
        assert [record["version"] for record in served.records()] == list(range(1, 41))

    async def test_where_no_round_is_open_nobody_waits(self, tmp_path: Path) -> None:
        async with serving(tmp_path) as served, Peer(served.address) as a:
            await a.join("worker-0")
            os.kill(os.getpid(), signal.SIGTERM)
            assert (await served.running).reason == "suspended"
            with pytest.raises(Refused):
                await a.join("worker-0")
