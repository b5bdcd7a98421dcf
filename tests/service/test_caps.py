"""What one worker, or a stranger, can make the server hold: joins, streams, bytes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ditherps import wire
from ditherps.errors import Reason
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps.v1 import types_pb2
from ditherps_server import staging
from tests.service import inprocess
from tests.service.inprocess import CALL_SECONDS, Peer, Push, Refused, Served, answered, serving

pytestmark = pytest.mark.asyncio(loop_scope="session")

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


@contextlib.asynccontextmanager
async def opened(tmp_path: Path, **options: Any) -> AsyncIterator[tuple[Served, Peer, types_pb2.RoundPlan]]:
    """A server with an open round of two, its first worker, and that worker's plan."""
    async with serving(tmp_path, metrics=True, **options) as served, Peer(served.address) as a, Peer(a.address) as b:
        await a.join("worker-0")
        await b.join("worker-1")
        yield served, a, await a.plan()


async def refusal(work: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        await work
    return caught.value


class TestJoins:
    async def test_five_hundred_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inprocess, "CALL_SECONDS", 60.0)  # a busy machine may drop what would connect, for a while
        async with serving(tmp_path, workers=500) as served, contextlib.AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(Peer(served.address)) for _ in range(20)]
            began = time.monotonic()
            await asyncio.gather(*(peers[index % 20].join(f"worker-{index}") for index in range(500)))
            assert time.monotonic() - began < 60
            assert await peers[0].states() == ["computing"] * 500

    async def test_a_loop_is_refused_and_says_what_to_do(self, tmp_path: Path) -> None:
        limits = {"worker_joins_per_second": 0.01, "worker_join_burst": 5}
        async with serving(tmp_path, server={"limits": limits}, metrics=True) as served, Peer(served.address) as peer:
            for _ in range(5):
                await peer.join("worker-0")
            refused = await refusal(peer.join("worker-0"))
            assert refused == Refused(EXHAUSTED, Reason.JOIN_RATE, "")
            assert "worker-0 joins too often: wait" in refused.message
            assert await served.metric('ditherps_refused_rpcs_total{reason="join_rate"}') == 1
            await answered(peer.stub.Heartbeat(pb.HeartbeatRequest(fence=peer.fence)))  # its session goes on
            await peer.join("worker-1")

    async def test_an_identity_has_one_session_for_each_of_its_members(self, tmp_path: Path) -> None:
        async with serving(tmp_path) as served, Peer(served.address) as first, Peer(served.address) as second:
            for _ in range(8):
                await second.join("worker-0")
            await first.join("worker-0")
            heartbeat = second.stub.Heartbeat(pb.HeartbeatRequest(fence=second.fence))
            assert (await refusal(answered(heartbeat))).reason is Reason.SUPERSEDED
            assert await first.states() == ["here"]


class TestStreams:
    async def test_pulls_of_one_worker(self, tmp_path: Path) -> None:
        """Of a model larger than what the network holds for who does not read."""
        async with opened(tmp_path, model="wide") as (_, a, _), Peer(a.address) as b:
            request = pb.PullRequest(fence=a.fence, to_version=0)
            calls = [a.stub.Pull(request, timeout=CALL_SECONDS) for _ in range(8)]
            outcomes = await asyncio.gather(*(answered(call.read()) for call in calls), return_exceptions=True)
            refused = [one for one in outcomes if isinstance(one, Refused)]
            assert all(one == Refused(EXHAUSTED, Reason.TOO_MANY_STREAMS, "") for one in refused)
            for call in calls:
                call.cancel()
            await b.join("worker-1")
            assert len(await b.pull(0)) == len(await a.pull(0))

    async def test_pushes_without_a_header(self, tmp_path: Path) -> None:
        limits = {"worker_streams": 3}
        options: dict[str, Any] = {"server": {"limits": limits}, "idle_timeout_seconds": 1.0}
        async with serving(tmp_path, **options) as served, Peer(served.address) as stranger, Peer(served.address) as a:
            silent = [Push(stranger.stub) for _ in range(10)]  # 3 for each of two members in plaintext
            outcomes = await asyncio.gather(*(refusal(push.answer()) for push in silent))
            reasons = [outcome.reason for outcome in outcomes]
            assert reasons.count(Reason.TOO_MANY_STREAMS) == 4
            assert reasons.count(Reason.IDLE_TIMEOUT) == 6
            await a.join("worker-0")

    async def test_pushes_of_one_worker_hold_one_content(self, tmp_path: Path) -> None:
        """A hundred streams with as many contents: never more than one content's memory."""
        async with opened(tmp_path, model="wide") as (served, a, plan), Peer(a.address) as b:
            update = a.update(plan)
            b.joined = a.joined
            pushes = [Push(peer.stub) for peer in (a, b) for _ in range(50)]
            for number, push in enumerate(pushes):
                digest = number.to_bytes(16, "little")
                header = a.header(plan, update, digest=digest)
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    await push.send(header)
            answers = await asyncio.gather(*(push.answer() for push in pushes), return_exceptions=True)
            refused = [one for one in answers if isinstance(one, Refused)]
            assert 80 <= len(refused) <= 84  # 16 at once, and some of these end meanwhile
            assert {one.reason for one in refused} == {Reason.TOO_MANY_STREAMS}
            await served_gauge(served, "ditherps_staged_bytes", len(update))
            for push in pushes:
                push.call.cancel()
            await until_accepted(a, a.header(plan, update), update)

    async def test_health_is_asked_not_watched(self, tmp_path: Path) -> None:
        async with serving(tmp_path) as served, Peer(served.address) as peer:
            stub: Any = health_pb2_grpc.HealthStub(peer.channel)
            refused = await refusal(answered(stub.Watch(health_pb2.HealthCheckRequest(), timeout=20).read()))
            assert refused.status is grpc.StatusCode.UNIMPLEMENTED
            check: Any = peer.channel.unary_unary("/grpc.health.v1.Health/Check")
            assert (await refusal(answered(check(b"\xff\xff")))).reason is Reason.MALFORMED


class TestCallsWithoutAMessage:
    """gRPC by itself would wait for the message of a unary RPC without a limit."""

    async def test_they_take_nobody_elses_place(self, tmp_path: Path) -> None:
        async with opened(tmp_path) as (served, a, _), contextlib.AsyncExitStack() as stack:
            held = []
            for _ in range(6):
                peer = await stack.enter_async_context(Peer(served.address))
                for method in (f"/{wire.SERVICE.full_name}/Status", "/grpc.health.v1.Health/Check"):
                    call: Any = peer.channel.stream_unary(method, response_deserializer=bytes)
                    held += [call() for _ in range(50)]
            outcomes = [asyncio.ensure_future(refusal(answered(call))) for call in held]
            while not any(outcome.done() for outcome in outcomes):  # so many that the first had to go
                assert await a.states() == ["computing"] * 2
                await answered(a.stub.Heartbeat(pb.HeartbeatRequest(fence=a.fence)))
            for _ in range(20):
                assert await a.states() == ["computing"] * 2
                await answered(a.stub.Heartbeat(pb.HeartbeatRequest(fence=a.fence)))
            ended = [outcome.result() for outcome in outcomes if outcome.done()]
            assert len(outcomes) - len(ended) < 130
            assert {refused.reason for refused in ended} == {Reason.TOO_MANY_STREAMS}
            for outcome in outcomes:
                outcome.cancel()

    async def test_they_end(self, tmp_path: Path) -> None:
        async with serving(tmp_path, idle_timeout_seconds=0.5) as served, Peer(served.address) as peer:
            for method in (f"/{wire.SERVICE.full_name}/Join", "/grpc.health.v1.Health/Check"):
                call: Any = peer.channel.stream_unary(method, response_deserializer=bytes)
                assert (await refusal(answered(call(timeout=CALL_SECONDS)))).reason is Reason.IDLE_TIMEOUT
                empty: list[bytes] = []
                outcome = await refusal(answered(call(iter(empty), timeout=CALL_SECONDS)))
                assert outcome.reason is Reason.SIZE


async def heartbeats(*peers: Peer) -> None:
    """Signs of life, until cancelled."""
    while True:
        for peer in peers:
            await answered(peer.stub.Heartbeat(pb.HeartbeatRequest(fence=peer.fence)))
        await asyncio.sleep(0.1)


async def served_gauge(served: Served, name: str, value: float) -> None:
    """Returns when a gauge, which is brought up to date a few times a second, has this value."""
    async with asyncio.timeout(CALL_SECONDS):
        while await served.metric(name) != value:
            pass  # each look takes an HTTP request


async def until_accepted(peer: Peer, header: pb.PushRequest, update: bytes) -> None:
    """Push until streams that were broken off have been seen to end."""
    async with asyncio.timeout(CALL_SECONDS):
        while True:
            with contextlib.suppress(Refused):
                assert (await peer.push(header, update)).HasField("accepted")
                return


class TestBytes:
    async def test_no_header_takes_memory_that_its_sizes_do_not_allow(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever else it says; the sizes that are taken are the model's."""
        taken: list[int] = []
        real = np.empty

        class Watched:
            uint8 = np.uint8

            @staticmethod
            def empty(size: int, dtype: Any) -> Any:
                taken.append(size)
                return real(size, dtype)

        async with opened(tmp_path, model="wide") as (_, a, plan):
            monkeypatch.setattr(staging, "np", Watched)
            update = a.update(plan)
            top = 2**64 - 1
            wrong: list[dict[str, Any]] = [
                {"update_bytes": top}, {"update_bytes": 1 << 40}, {"update_bytes": 1 << 20}, {"buffer_bytes": 1 << 40},
                {"buffer_bytes": 1}, {"update_bytes": 0}, {"samples": top}, {"round": top}, {"role": 77},
                {"digest": bytes(1000)}, {"base_version": top}, {"attempt": 2**32 - 1},
            ]  # fmt: skip
            for changes in wrong:
                assert (await a.push(a.header(plan, update, **changes), update)).HasField("refused")
            assert taken == []
            assert (await a.push(a.header(plan, update), update)).HasField("accepted")
            assert taken == [len(update)]

    async def test_an_announcement_and_then_nothing(self, tmp_path: Path) -> None:
        """The stream ends at the idle timeout; what was announced stays for the worker to go on with, one content a
        worker, and is free when the round ends.
        """
        options = {"model": "wide", "idle_timeout_seconds": 0.8, "quorum": 0.5}
        async with opened(tmp_path, **options) as (served, a, plan), Peer(a.address) as b:
            update = a.update(plan)
            push = Push(a.stub)
            await push.send(a.header(plan, update))
            assert (await push.answer()).HasField("need")
            await b.join("worker-1")
            other = b.update(plan, 1)
            began = time.monotonic()
            alive = asyncio.create_task(heartbeats(a, b))
            try:
                assert (await push.answer()).refused.reason == Reason.IDLE_TIMEOUT
                assert 0.7 < time.monotonic() - began < 5
                await served_gauge(served, "ditherps_staged_bytes", len(update))
                push = Push(a.stub)
                await push.send(a.header(plan, update))
                assert (await push.answer()).need == pb.PushNeed(offset=0)
                await push.send(pb.PushRequest(chunk=update))
                assert (await push.answer()).HasField("accepted")
                assert (await b.push(b.header(plan, other), other)).HasField("accepted")
                await served.reached(1)
                await served_gauge(served, "ditherps_staged_bytes", 0)
            finally:
                alive.cancel()

    async def test_memory_is_free_when_the_round_ends(self, tmp_path: Path) -> None:
        async with opened(tmp_path, model="wide", quorum=0.5) as (served, a, plan), Peer(a.address) as b:
            update = a.update(plan)
            push = Push(a.stub)
            await push.send(a.header(plan, update))
            assert (await push.answer()).HasField("need")
            await served_gauge(served, "ditherps_staged_bytes", len(update))
            await b.join("worker-1")
            other = b.update(plan, 1)
            assert (await b.push(b.header(plan, other), other)).HasField("accepted")
            await answered(a.stub.Leave(pb.LeaveRequest(fence=a.fence)))
            await served.reached(1)
            await served_gauge(served, "ditherps_staged_bytes", 0)
            push.call.cancel()

    async def test_more_than_was_announced_is_refused_at_its_first_byte(self, tmp_path: Path) -> None:
        async with opened(tmp_path, model="wide") as (_, a, plan):
            update = a.update(plan)
            push = Push(a.stub)
            await push.send(a.header(plan, update), pb.PushRequest(chunk=update + b"x"))
            assert (await push.answer()).HasField("need")
            assert (await push.answer()).refused.reason == Reason.SIZE
            assert (await a.push(a.header(plan, update), update)).HasField("accepted")

    async def test_an_empty_chunk_is_no_progress(self, tmp_path: Path) -> None:
        async with opened(tmp_path, model="wide") as (_, a, plan):
            update = a.update(plan)
            push = Push(a.stub)
            await push.send(a.header(plan, update), b"\x12\x00")
            assert (await push.answer()).HasField("need")
            assert (await push.answer()).refused.reason == Reason.SIZE

    async def test_a_text_that_is_quoted_is_cut_and_stays_on_one_line(self, tmp_path: Path) -> None:
        async with opened(tmp_path) as (_, a, _):
            for name in ("x" * 300_000, "x" * 60_000, "a\nb\x1b[2J" * 1000, "\u2028" * 1000):
                for call in (
                    a.stub.Join(pb.JoinRequest(protocol_version=wire.PROTOCOL_VERSION, worker=name), timeout=20),
                    a.stub.Join(pb.JoinRequest(protocol_version=7, package_version=name), timeout=20),
                    a.stub.Join(pb.JoinRequest(protocol_version=wire.PROTOCOL_VERSION, task=name), timeout=20),
                    a.stub.Heartbeat(pb.HeartbeatRequest(fence=types_pb2.Fence(job_id=name)), timeout=20),
                ):
                    refused = await refusal(answered(call))
                    assert refused.reason is not None
                    assert refused.message.isprintable()
                    assert len(refused.message) < 520
