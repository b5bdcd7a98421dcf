"""The service over real sockets, spoken to by raw clients: what is taken, what is refused, and with which reason."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

import ditherps
from ditherps import downlink, wire
from ditherps.codecs import Context, Encoded
from ditherps.dither import Address, Domain
from ditherps.errors import Reason
from ditherps.layout import FlatModel
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps.v1 import types_pb2
from ditherps_server.updater import Updater
from ditherps_worker.held import HeldModel
from tests.sealing import sealed
from tests.service.inprocess import Peer, Refused, Served, answered, serving
from tests.tiny import Tiny

# One loop for all: gRPC's own poller outlives the loop that it began in.
pytestmark = pytest.mark.asyncio(loop_scope="session")

FAILED_PRECONDITION, ABORTED = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ABORTED
INVALID, EXHAUSTED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED


@contextlib.asynccontextmanager
async def opened(tmp_path: Path, **options: Any) -> AsyncIterator[tuple[Served, Peer, Peer, types_pb2.RoundPlan]]:
    """A server with an open round, its two workers, and the plan of worker 0."""
    async with serving(tmp_path, **options) as served, Peer(served.address) as a, Peer(served.address) as b:
        await a.join("worker-0")
        await b.join("worker-1")
        yield served, a, b, await a.plan()


async def round_closes(served: Served, peer: Peer, round_: int) -> None:
    """Returns when `round_` has closed."""
    call = peer.watch()
    try:
        while True:
            state = wire.checked(await call.read())
            if state.version > round_:
                return
    finally:
        call.cancel()


async def outcome(work: Any) -> Refused:
    """How a call is refused."""
    with pytest.raises(Refused) as caught:
        await work
    return caught.value


class TestJoin:
    async def test_the_answer_says_who_what_and_how_large(self, tmp_path: Path) -> None:
        async with serving(tmp_path, model="norm") as served, Peer(served.address) as peer:
            joined = await peer.join("worker-1")
            assert (joined.index, joined.fence.job_id, joined.fence.server_epoch) == (1, served.job_id, 1)
            assert served.job.model_validate_json(joined.job) == served.job
            assert (joined.parameter_coordinates, joined.buffer_bytes) == (108, 2 * 4 * 8 + 8)
            assert joined.chunk_bytes <= wire.CHUNK_BYTES
            assert joined.idle_timeout_seconds == served.job.idle_timeout_seconds
            assert joined.heartbeat_seconds == 5

    async def test_heartbeats_come_faster_than_silence_is_assumed(self, tmp_path: Path) -> None:
        async with serving(tmp_path, idle_timeout_seconds=1.5) as served, Peer(served.address) as peer:
            assert (await peer.join("worker-0")).heartbeat_seconds == 0.5

    async def test_an_index_follows_from_the_name_not_from_the_order(self, tmp_path: Path) -> None:
        async with serving(tmp_path, workers=3, members=("zoe", "b/1", "adam")) as served, Peer(served.address) as peer:
            for name, index in (("adam", 2), ("zoe", 0), ("b/1", 1)):
                assert (await peer.join(name)).index == index

    async def test_rules(self, tmp_path: Path) -> None:
        def limits(modes: str = "gradient", codecs: str = "dqsg", model_bytes: int = 1 << 20) -> pb.WorkerLimits:
            return pb.WorkerLimits(modes=[modes], codecs=[codecs], model_bytes=model_bytes)

        wrong: list[tuple[dict[str, Any], Reason, str]] = [
            ({"protocol_version": 99}, Reason.PROTOCOL_VERSION, f"speaks protocol {wire.PROTOCOL_VERSION}"),
            ({"task": "digits"}, Reason.TASK_MISMATCH, "'tiny'"),
            ({"limits": limits(modes="local")}, Reason.LIMITS, "mode"),
            ({"limits": limits(codecs="none")}, Reason.LIMITS, "codec"),
            ({"limits": limits(model_bytes=111)}, Reason.LIMITS, "112 bytes"),
            ({"limits": pb.WorkerLimits()}, Reason.LIMITS, "mode"),
            ({"samples": 9}, Reason.WEIGHT, "9 samples in a contribution; at most 8"),
            ({"samples": 2**64 - 1}, Reason.WEIGHT, "at most 8"),
            ({"worker": "eve"}, Reason.UNKNOWN_MEMBER, "members: worker-0, worker-1"),
            ({"worker": "../worker-0"}, Reason.NAME_INVALID, "'../worker-0'"),
        ]  # fmt: skip
        async with serving(tmp_path, metrics=True) as served, Peer(served.address) as peer:
            for changes, reason, says in wrong:
                refused = await outcome(peer.join("worker-0", **changes) if "worker" not in changes
                                        else peer.join(**changes))  # fmt: skip
                assert refused == Refused(wire.status_of(reason), reason, "")
                assert says in refused.message
            assert await peer.states() == []
            assert await served.metric('ditherps_refused_rpcs_total{reason="limits"}') == 4
            assert (await peer.join("worker-0", limits=limits(), task="")).index == 0

    async def test_members_full_and_leases(self, tmp_path: Path) -> None:
        async with serving(tmp_path) as served, Peer(served.address) as peer:
            first = await peer.join(lease_key=b"a")
            second = await peer.join(lease_key=b"b")
            assert (first.index, second.index) == (0, 1)
            refused = await outcome(peer.join(lease_key=b"c"))
            assert refused == Refused(EXHAUSTED, Reason.MEMBERS_FULL, "")
            assert (await peer.join(lease_key=b"b")).index == 1
            await answered(peer.stub.Leave(pb.LeaveRequest(fence=first.fence)))
            assert (await peer.states())[0] not in ("computing", "here")
            assert (await peer.join(lease_key=b"c")).index == 0


class TestFence:
    async def test_a_newer_session_supersedes_everywhere(self, tmp_path: Path) -> None:
        async with opened(tmp_path) as (_, a, _, plan), Peer(a.address) as newer:
            watch = a.watch()
            assert wire.checked(await watch.read()).HasField("opened")
            await newer.join("worker-0")
            assert await watch.read() is grpc.aio.EOF  # its stream ends
            for refused in await refusals(a, plan):
                assert refused == Refused(ABORTED, Reason.SUPERSEDED, "")
            assert (await newer.plan()).round == plan.round
            update = newer.update(plan)
            assert (await newer.push(newer.header(plan, update), update)).HasField("accepted")

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"job_id": "another"}, Reason.WRONG_JOB),
            ({"server_epoch": 7}, Reason.WRONG_EPOCH),
            ({"session": 99}, Reason.NOT_JOINED),
        ],
    )
    async def test_a_fence_of_something_else(self, tmp_path: Path, changes: dict[str, Any], reason: Reason) -> None:
        async with opened(tmp_path) as (_, a, _, plan):
            for key, value in changes.items():
                setattr(a.joined.fence, key, value)
            for refused in await refusals(a, plan):
                assert refused == Refused(FAILED_PRECONDITION, reason, "")
            assert await a.states() == ["computing", "computing"]

    async def test_without_a_fence(self, tmp_path: Path) -> None:
        async with serving(tmp_path) as served, Peer(served.address) as peer:
            for refused in await refusals(peer, types_pb2.RoundPlan()):
                assert refused == Refused(FAILED_PRECONDITION, Reason.WRONG_JOB, "")


async def refusals(peer: Peer, plan: types_pb2.RoundPlan) -> list[Refused]:
    """How each RPC that needs a session is refused."""
    fence, stub = peer.fence, peer.stub
    push = peer.pushing()
    await push.send(peer.header(plan, b"x"))
    watch = peer.watch()
    return [
        await outcome(answered(stub.Heartbeat(pb.HeartbeatRequest(fence=fence)))),
        await outcome(answered(stub.Report(pb.ReportRequest(fence=fence)))),
        await outcome(answered(stub.Leave(pb.LeaveRequest(fence=fence)))),
        await outcome(peer.pull(0)),
        await outcome(push.answer()),
        await outcome(first_of(watch)),
    ]


async def first_of(watch: Any) -> Any:
    async def read() -> Any:
        return await watch.read()

    return await answered(read())


class TestPush:
    async def test_a_round_of_two(self, tmp_path: Path) -> None:
        """Both contributions enter: the next version is the mean, and everyone is told."""
        optimizer = {"name": "sgd", "lr": 1.0}
        async with opened(tmp_path, codec="none", max_weight=24, optimizer=optimizer) as (served, a, b, plan):
            await a.join("worker-0", samples=24)
            before = torch.frombuffer(bytearray(await a.pull(0)), dtype=torch.float32)
            updates = [a.update(plan, 1, "none"), b.update(plan, 2, "none")]
            assert (await a.push(a.header(plan, updates[0], samples=24), updates[0])).accepted == pb.PushAccepted()
            assert await a.states() == ["delivered", "computing"]
            watch = a.watch()
            assert wire.checked(await watch.read()).version == 0
            assert (await b.push(b.header(plan, updates[1], samples=8), updates[1])).HasField("accepted")
            closed = wire.checked(await watch.read())
            watch.cancel()
            assert closed.closed == types_pb2.RoundResult(round=0, version=1, members=2, included=True)
            assert (closed.version, closed.opened.round, closed.opened.base_version) == (1, 1, 1)
            after = torch.frombuffer(bytearray(await b.pull(1)), dtype=torch.float32)
            vectors = [ditherps.Encoded.from_bytes(update) for update in updates]
            none = ditherps.codec("none")
            first, second = (none.decode(vector, Address(1, 0, i, Domain.UPDATE)) for i, vector in enumerate(vectors))
            torch.testing.assert_close(after, before - (24 * first + 8 * second) / 32)
            (record,) = served.records()
            assert (record["workers"], record["samples"], record["absent"]) == ([0, 1], 32, {})
            assert record["uplink_payload_bytes"] == sum(map(len, updates))

    async def test_a_duplicate_is_told_so_and_counts_once(self, tmp_path: Path) -> None:
        async with opened(tmp_path, metrics=True) as (served, a, _, plan):
            update = a.update(plan)
            answers = [await a.push(a.header(plan, update), update) for _ in range(3)]
            assert [answer.accepted.duplicate for answer in answers] == [False, True, True]
            assert all(answer.HasField("accepted") for answer in answers)
            assert await served.metric("ditherps_contributions_total") == 1
            name = 'ditherps_payload_bytes_total{codec="dqsg",direction="up"}'
            assert await served.metric(name) == len(update)

    async def test_another_content_conflicts_and_the_first_stands(self, tmp_path: Path) -> None:
        async with opened(tmp_path, metrics=True) as (served, a, _, plan):
            first, second = a.update(plan, 1), a.update(plan, 2)
            assert (await a.push(a.header(plan, first), first)).HasField("accepted")
            answer = await a.push(a.header(plan, second), second)
            assert answer.refused.reason == Reason.CONFLICTING_CONTRIBUTION
            assert (await a.push(a.header(plan, first), first)).accepted.duplicate
            assert await served.metric("ditherps_contributions_total") == 1

    async def test_late(self, tmp_path: Path) -> None:
        async with opened(tmp_path) as (served, a, b, plan):
            update = a.update(plan)
            assert (await a.push(a.header(plan, update), update)).HasField("accepted")
            other = b.update(plan)
            assert (await b.push(b.header(plan, other), other)).HasField("accepted")
            await round_closes(served, a, 0)
            answer = await a.push(a.header(plan, update), update)
            assert answer.refused.reason == Reason.LATE
            assert len(served.records()) == 1

    async def test_a_round_that_closes_while_a_push_is_under_way(self, tmp_path: Path) -> None:
        """Quorum 0.5: worker 1 goes in the middle of its push, the round closes, its other half comes too late."""
        async with opened(tmp_path, quorum=0.5) as (served, a, b, plan), Peer(served.address) as again:
            update, other = a.update(plan), b.update(plan)
            push = b.pushing()
            await push.send(b.header(plan, other))
            assert (await push.answer()).need.offset == 0
            chunks = list(wire.chunk_messages(pb.PushRequest, [other], len(other) // 2))
            await push.send(chunks[0])
            await again.join("worker-1")  # this session's fence no longer holds
            await answered(again.stub.Leave(pb.LeaveRequest(fence=again.fence)))
            assert (await a.push(a.header(plan, update), update)).HasField("accepted")
            await round_closes(served, a, 0)
            await push.send(*chunks[1:])
            answer = await push.answer()
            assert answer.refused.reason in (Reason.LATE, Reason.SUPERSEDED)
            (record,) = served.records()
            assert record["workers"] == [0]
            assert record["absent"] == {"1": "left"}

    async def test_what_does_not_fit_the_plan_is_refused_with_its_reason_and_counts_nothing(
        self, tmp_path: Path
    ) -> None:
        async with opened(tmp_path, model="norm", metrics=True) as (served, a, _, plan):
            update, buffers = a.update(plan), bytes(a.joined.buffer_bytes)
            largest = ditherps.codec("dqsg").max_nbytes(a.joined.parameter_coordinates)
            wrong: list[tuple[dict[str, Any], Reason]] = [
                ({"round": 1}, Reason.WRONG_ROUND),
                ({"attempt": 1}, Reason.WRONG_ROUND),
                ({"base_version": 1}, Reason.WRONG_ROUND),
                ({"role": types_pb2.ROLE_NESTED}, Reason.WRONG_ROLE),
                ({"role": types_pb2.ROLE_UNSPECIFIED}, Reason.WRONG_ROLE),
                ({"context": types_pb2.ContextId(version=1)}, Reason.CONTEXT_MISMATCH),
                ({"update_bytes": 0}, Reason.SIZE),
                ({"update_bytes": largest + 1}, Reason.SIZE),
                ({"update_bytes": 2**64 - 1}, Reason.SIZE),
                ({"buffer_bytes": 0}, Reason.SIZE),
                ({"buffer_bytes": 2**63}, Reason.SIZE),
                ({"samples": 0}, Reason.WEIGHT),
                ({"samples": 7}, Reason.WEIGHT),
                ({"samples": 2**63}, Reason.WEIGHT),
                ({"digest": b"short"}, Reason.MALFORMED),
            ]
            for changes, reason in wrong:
                answer = await a.push(a.header(plan, update, buffers, **changes), [update, buffers])
                assert answer.refused.reason == reason, changes
                assert answer.refused.message
            assert await a.states() == ["computing", "computing"]
            assert await served.metric("ditherps_contributions_total") == 0
            assert await served.metric("ditherps_staged_bytes") == 0
            for reason in {reason for _, reason in wrong}:
                name = f'ditherps_rejected_updates_total{{reason="{reason}"}}'
                assert await served.metric(name) == sum(reason is other for _, other in wrong)
            assert (await a.push(a.header(plan, update, buffers), [update, buffers])).HasField("accepted")

    async def test_a_content_that_cannot_be_decoded_is_refused_and_another_try_is_free(self, tmp_path: Path) -> None:
        async with opened(tmp_path, model="norm", metrics=True) as (served, a, _, plan):
            n = a.joined.parameter_coordinates
            update, buffers = a.update(plan), bytes(a.joined.buffer_bytes)

            used = ditherps.codec("dqsg")

            def stepped(step: bytes) -> bytes:
                at = ditherps.codecs.base.HEADER.size
                return sealed(used, update[:at] + step + update[at + 4 :])

            address = Address(1, 0, 0, Domain.UPDATE)
            other_context = ditherps.codec("dqsg").encode(torch.ones(n), address, Context(3, b"x")).to_bytes()
            shorter = ditherps.codec("dqsg").encode(torch.ones(n - 1), address).to_bytes()
            nan = torch.full((8,), torch.nan).numpy().tobytes() + buffers[32:]
            wrong: list[tuple[bytes, bytes, Reason]] = [
                (stepped(b"\x00\x00\xc0\x7f"), buffers, Reason.NON_FINITE),
                (stepped(b"\x00\x00\x80\x7f"), buffers, Reason.NON_FINITE),
                (stepped(b"\x00\x00\x80\xbf"), buffers, Reason.NON_FINITE),
                (a.update(plan, levels=1.5)[: len(update)], buffers, Reason.MALFORMED),
                (a.update(plan, codec="none")[: len(update)], buffers, Reason.MALFORMED),
                (other_context, buffers, Reason.CONTEXT_MISMATCH),
                (shorter, buffers, Reason.SIZE),
                (sealed(used, update[:-1]), buffers, Reason.SIZE),
                (update[:-1] + bytes([update[-1] ^ 1]), buffers, Reason.DIGEST_MISMATCH),
                (update[:3], buffers, Reason.SIZE),
                (bytes(len(update)), buffers, Reason.MALFORMED),
                (b"\xff" * len(update), buffers, Reason.MALFORMED),
                (update, nan, Reason.NON_FINITE),
            ]
            for number, (content, state, reason) in enumerate(wrong):
                answer = await a.push(a.header(plan, content, state), [content, state])
                assert answer.refused.reason == reason, number
            broken = await a.push(a.header(plan, update, buffers), [update[:-1] + bytes([update[-1] ^ 1]), buffers])
            assert broken.refused.reason == Reason.DIGEST_MISMATCH
            assert await a.states() == ["computing", "computing"]
            assert await served.metric("ditherps_contributions_total") == 0
            assert (await a.push(a.header(plan, update, buffers), [update, buffers])).HasField("accepted")

    async def test_more_than_announced(self, tmp_path: Path) -> None:
        async with opened(tmp_path) as (_, a, _, plan):
            update = a.update(plan)
            answer = await a.push(a.header(plan, update), update[:-1] + b"xyz", chunk_bytes=len(update) - 1)
            assert answer.refused.reason == Reason.SIZE
            assert (await a.push(a.header(plan, update), update)).HasField("accepted")

    async def test_a_push_that_ends_early_goes_on_where_it_ended(self, tmp_path: Path) -> None:
        async with opened(tmp_path, model="wide") as (_, a, _, plan):
            update, size = a.update(plan), 100
            chunks = list(wire.chunk_messages(pb.PushRequest, [update], size))
            assert len(chunks) > 20
            offset = 0
            for count in (0, 1, 9):
                push = a.pushing()
                await push.send(a.header(plan, update))
                assert (await push.answer()).need.offset == offset * size
                await push.send(*chunks[offset : offset + count])
                await push.end()
                assert (await push.answer()).refused.reason == Reason.SIZE
                offset += count
            push = a.pushing()
            await push.send(a.header(plan, update))
            assert (await push.answer()).need.offset == 10 * size
            await push.send(*chunks[10:])
            assert (await push.answer()).accepted == pb.PushAccepted()

    async def test_a_push_that_breaks_sends_at_most_one_chunk_again(self, tmp_path: Path) -> None:
        async with opened(tmp_path, model="wide") as (served, a, _, plan), Peer(served.address) as status:
            update, size = a.update(plan), 100
            push = a.pushing()
            await push.send(a.header(plan, update))
            assert (await push.answer()).need.offset == 0
            before = (await status.status()).uplink_bytes
            sent = list(wire.chunk_messages(pb.PushRequest, [update], size))[:11]
            await push.send(*sent)
            asked, wanted = 0, sum(len(message) + wire.MESSAGE_PREFIX_BYTES for message in sent)
            while True:  # until the server has read them
                asked += wire.RPC_UPLINK_BYTES + wire.MESSAGE_PREFIX_BYTES
                if (await status.status()).uplink_bytes - before - asked >= wanted:
                    break
            await a.channel.close()
            async with Peer(served.address) as again:
                await again.join("worker-0")
                push = again.pushing()
                await push.send(again.header(plan, update))
                offset = (await push.answer()).need.offset
                assert len(sent) * size - offset in (0, size)
                await push.send(*wire.chunk_messages(pb.PushRequest, [update], size, offset))
                assert (await push.answer()).accepted == pb.PushAccepted()
                assert (await again.push(again.header(plan, update), update)).accepted.duplicate

    async def test_a_second_stream_takes_over_and_the_first_writes_nothing_more(self, tmp_path: Path) -> None:
        async with opened(tmp_path, model="wide", metrics=True) as (served, a, _, plan):
            update = a.update(plan)
            chunks = list(wire.chunk_messages(pb.PushRequest, [update], 1000))
            pushes = [a.pushing() for _ in range(3)]
            for push in pushes:
                await push.send(a.header(plan, update))
                assert (await push.answer()).need.offset == 0
            for push in pushes[:2]:
                await push.send(chunks[0])
                assert (await push.answer()).refused.reason == Reason.SUPERSEDED
            await pushes[2].send(*chunks)
            assert (await pushes[2].answer()).accepted == pb.PushAccepted()
            assert await served.metric("ditherps_contributions_total") == 1

    async def test_many_at_once_count_once(self, tmp_path: Path) -> None:
        """The same content on eight streams: at least one is accepted, one counts, nobody is told otherwise."""
        async with opened(tmp_path, model="wide", metrics=True) as (served, a, b, plan):
            update = a.update(plan)
            header = a.header(plan, update)
            answers = await asyncio.gather(*(a.push(header, update, 500) for _ in range(8)), return_exceptions=True)
            kinds = []
            for answer in answers:
                assert isinstance(answer, pb.PushResponse), answer
                kinds.append(answer.refused.reason or f"duplicate {answer.accepted.duplicate}")
            assert set(kinds) <= {"duplicate False", "duplicate True", "superseded"}
            assert kinds.count("duplicate False") == 1
            assert await served.metric("ditherps_contributions_total") == 1
            other = b.update(plan)
            assert (await b.push(b.header(plan, other), other)).HasField("accepted")
            await round_closes(served, a, 0)
            assert served.records()[0]["uplink_payload_bytes"] == len(update) + len(other)

    async def test_conflicting_contents_at_once_leave_one_whole(self, tmp_path: Path) -> None:
        """Two contents that replace each other while they are checked: the round closes with one of them."""
        async with opened(tmp_path, model="wide", metrics=True) as (served, a, b, plan):
            for attempt in range(3):
                updates = [a.update(plan, seed) for seed in range(4)]
                answers = await asyncio.gather(*(a.push(a.header(plan, update), update) for update in updates))
                accepted = [answer.HasField("accepted") for answer in answers]
                assert accepted.count(True) == 1, answers
                reasons = {answer.refused.reason for answer in answers if answer.HasField("refused")}
                assert reasons <= {"superseded", "conflicting_contribution"}
                assert await served.metric("ditherps_contributions_total") == 2 * attempt + 1
                other = b.update(plan)
                assert (await b.push(b.header(plan, other), other)).HasField("accepted")
                await round_closes(served, b, attempt)
                (record,) = served.records()[attempt:]
                assert record["uplink_payload_bytes"] == len(updates[accepted.index(True)]) + len(other)
                if attempt < 2:
                    plan = await a.plan()

    async def test_what_does_not_begin_with_a_header(self, tmp_path: Path) -> None:
        async with opened(tmp_path) as (_, a, _, _):
            for message in (pb.PushRequest(chunk=b"x"), pb.PushRequest()):
                push = a.pushing()
                await push.send(message)
                refused = await outcome(push.answer())
                assert refused == Refused(INVALID, Reason.MALFORMED, "")
            push = a.pushing()
            await push.end()
            assert (await outcome(push.answer())).status is INVALID

    async def test_a_second_header_in_place_of_a_chunk(self, tmp_path: Path) -> None:
        async with opened(tmp_path) as (_, a, _, plan):
            push, update = a.pushing(), a.update(plan)
            await push.send(a.header(plan, update), a.header(plan, update))
            assert (await push.answer()).HasField("need")
            assert (await push.answer()).refused.reason == Reason.MALFORMED

    async def test_silence_in_a_push_has_a_limit(self, tmp_path: Path) -> None:
        async with opened(tmp_path, idle_timeout_seconds=0.5) as (_, a, _, plan):
            push, update = a.pushing(), a.update(plan)
            await push.send(a.header(plan, update))
            assert (await push.answer()).HasField("need")
            answer = await push.answer()
            assert answer.refused.reason in (Reason.IDLE_TIMEOUT, Reason.LATE)


class Gate:
    """Holds a method of the server's in its thread until it may go on; the real one runs then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.entered, self.open = threading.Semaphore(0), threading.Event()
        real = getattr(Updater, name)

        def held(*arguments: Any) -> Any:
            self.entered.release()
            assert self.open.wait(30)
            return real(*arguments)

        monkeypatch.setattr(Updater, name, held)

    async def holds(self) -> None:
        """Returns when one more call is being held."""
        assert await asyncio.to_thread(self.entered.acquire, True, 20)


class TestWhileAContentIsChecked:
    """What happens between the last byte of a content and the verdict on it."""

    async def test_another_content_takes_its_place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        gate = Gate(monkeypatch, "validate")
        async with opened(tmp_path, metrics=True) as (served, a, b, plan):
            first, second, other = a.update(plan, 1), a.update(plan, 2), b.update(plan)
            checking = asyncio.create_task(a.push(a.header(plan, first), first))
            await gate.holds()
            push = a.pushing()
            await push.send(a.header(plan, second))
            assert (await push.answer()).need.offset == 0
            gate.open.set()
            assert (await checking).refused.reason == Reason.SUPERSEDED
            assert await a.states() == ["computing", "computing"]
            assert (await b.push(b.header(plan, other), other)).HasField("accepted")
            await push.send(*wire.chunk_messages(pb.PushRequest, [second], 1 << 20))
            assert (await push.answer()).accepted == pb.PushAccepted()
            await round_closes(served, a, 0)
            assert await served.metric("ditherps_contributions_total") == 2
            assert served.records()[0]["workers"] == [0, 1]

    async def test_the_same_content_arrives_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        gate = Gate(monkeypatch, "validate")
        async with opened(tmp_path, metrics=True) as (served, a, _, plan):
            update = a.update(plan)
            first, second = asyncio.create_task(a.push(a.header(plan, update), update)), a.pushing()
            await gate.holds()
            await second.send(a.header(plan, update))
            assert (await second.answer()).need.offset == len(update)  # all of it is here, and is being checked
            gate.open.set()
            answers = [await first, await second.answer()]
            assert all(answer.HasField("accepted") for answer in answers)
            assert sorted(answer.accepted.duplicate for answer in answers) == [False, True]
            assert await served.metric("ditherps_contributions_total") == 1

    @pytest.mark.parametrize("applied", [False, True], ids=["closing", "closed"])
    async def test_the_round_closes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, applied: bool) -> None:
        async with opened(tmp_path, quorum=0.5, metrics=True) as (served, a, b, plan):
            update, other = a.update(plan), b.update(plan)
            push = b.pushing()
            await push.send(b.header(plan, other))
            assert (await push.answer()).need.offset == 0
            closing, checking = Gate(monkeypatch, "apply"), Gate(monkeypatch, "validate")
            await push.send(*wire.chunk_messages(pb.PushRequest, [other], 1 << 20))
            await checking.holds()
            checking.open.set()
            assert (await push.answer()).accepted == pb.PushAccepted()
            checking.open.clear()
            late = asyncio.create_task(a.push(a.header(plan, update), update))
            await checking.holds()
            await answered(a.stub.Leave(pb.LeaveRequest(fence=a.fence)))  # nobody is waited for: the round closes
            await closing.holds()
            if applied:
                closing.open.set()
                await round_closes(served, b, 0)
            checking.open.set()
            assert (await late).refused.reason == Reason.LATE
            closing.open.set()
            await round_closes(served, b, 0)
            (record,) = served.records()[:1]
            assert (record["workers"], record["absent"]) == ([1], {"0": "left"})
            assert await served.metric("ditherps_contributions_total") == 1
            assert record["uplink_payload_bytes"] == len(other)


class TestMalformed:
    async def drained(self, call: Any, data: bytes, method: Any) -> None:
        """Send one message and read what comes until the end."""
        sent = call(timeout=20) if method.client_streaming else call(data, timeout=20)
        if method.client_streaming:
            await sent.write(data)
        if method.server_streaming:
            async for _ in sent:
                pass
        else:
            await sent

    async def test_bytes_that_are_no_message_are_the_senders_fault(self, tmp_path: Path) -> None:
        def as_it_is(data: bytes) -> bytes:
            return data

        async with serving(tmp_path) as served, Peer(served.address) as peer:
            for method in wire.SERVICE.methods:
                kind = f"{'stream' if method.client_streaming else 'unary'}_" + (
                    "stream" if method.server_streaming else "unary"
                )
                call = getattr(peer.channel, kind)(f"/{wire.SERVICE.full_name}/{method.name}",
                                                   request_serializer=as_it_is)  # fmt: skip
                for data in (b"\xff\xff\xff", b"\x12\x05ab", b"\x0a"):
                    with pytest.raises(grpc.aio.AioRpcError) as failed:
                        await self.drained(call, data, method)
                    assert failed.value.code() is INVALID, (method.name, data)
                    refusal = wire.refusal_of(failed.value)
                    assert refusal is not None
                    assert refusal.reason is Reason.MALFORMED
            await peer.join("worker-0")  # and the server lives

    async def test_a_malformed_chunk(self, tmp_path: Path) -> None:
        async with opened(tmp_path) as (_, a, _, plan):
            push, update = a.pushing(), a.update(plan)
            await push.send(a.header(plan, update), b"\x12\xff\x01abc")
            assert (await push.answer()).HasField("need")
            assert (await push.answer()).refused.reason == Reason.MALFORMED
            assert (await a.push(a.header(plan, update), update)).HasField("accepted")

    async def test_a_message_beyond_the_limit(self, tmp_path: Path) -> None:
        options = [("grpc.max_send_message_length", 64 << 20)]
        async with serving(tmp_path) as served, grpc.aio.insecure_channel(served.address, options=options) as channel:
            stub = wire.Stub(channel, wire.WireMeter())
            refused = await outcome(answered(stub.Join(pb.JoinRequest(lease_key=bytes(5 << 20)), timeout=20)))
            assert refused.status is EXHAUSTED

    async def test_an_rpc_that_there_is_not(self, tmp_path: Path) -> None:
        async with serving(tmp_path) as served, Peer(served.address) as peer:
            call: Any = peer.channel.unary_unary(f"/{wire.SERVICE.full_name}/Train")
            refused = await outcome(answered(call(b"")))
            assert refused.status is grpc.StatusCode.UNIMPLEMENTED


class TestWatch:
    async def test_it_begins_with_the_present_state(self, tmp_path: Path) -> None:
        async with serving(tmp_path) as served, Peer(served.address) as a, Peer(served.address) as b:
            await a.join("worker-0")
            watch = a.watch()
            first = wire.checked(await watch.read())
            assert first == pb.WatchResponse(phase=types_pb2.PHASE_WAITING)
            await b.join("worker-1")
            second = wire.checked(await watch.read())
            assert (second.phase, second.opened.role) == (types_pb2.PHASE_OPEN, types_pb2.ROLE_SOURCE)
            assert 0 < second.opened.deadline_seconds <= served.job.round_deadline_seconds
            # A reconnect in the middle of the round sees the same plan.
            again = b.watch()
            plan = wire.checked(await again.read()).opened
            assert (plan.round, plan.attempt, plan.base_version) == (0, 0, 0)
            watch.cancel()
            again.cancel()

    async def test_roles_are_by_index_among_the_invited(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"codec": "ndqsg", "codec_options": {"side_fraction": 0.3}, "workers": 3}
        async with serving(tmp_path, **options) as served, contextlib.AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(Peer(served.address)) for _ in range(3)]
            for index in (2, 0, 1):
                await peers[index].join(f"worker-{index}")
            roles = [(await peer.plan()).role for peer in peers]
            assert roles == [types_pb2.ROLE_SOURCE, types_pb2.ROLE_NESTED, types_pb2.ROLE_NESTED]

    async def test_the_end_is_told_and_the_server_leaves(self, tmp_path: Path) -> None:
        async with opened(tmp_path, rounds=1) as (served, a, b, plan):
            watches = [peer.watch() for peer in (a, b)]
            for peer in (a, b):
                update = peer.update(plan)
                assert (await peer.push(peer.header(plan, update), update)).HasField("accepted")
            for watch in watches:
                last = pb.WatchResponse()
                while (state := wire.checked(await watch.read())) is not grpc.aio.EOF:
                    last = state
                assert (last.finished.reason, last.finished.version) == ("finished", 1)
            result = await served.running
            assert result.model_sha256 == last.finished.model_sha256
            assert (result.rounds, result.contributions) == (1, 2)

    async def test_a_newer_watch_ends_the_older(self, tmp_path: Path) -> None:
        async with opened(tmp_path) as (_, a, _, _):
            older = a.watch()
            assert wire.checked(await older.read()).HasField("opened")
            newer = a.watch()
            assert wire.checked(await newer.read()).HasField("opened")
            assert await older.read() is grpc.aio.EOF


class TestPull:
    async def test_a_version_that_is_gone_or_not_yet_there(self, tmp_path: Path) -> None:
        async with opened(tmp_path) as (served, a, b, plan):
            assert len(await a.pull(0)) == 4 * a.joined.parameter_coordinates
            for peer in (a, b):
                update = peer.update(plan)
                assert (await peer.push(peer.header(plan, update), update)).HasField("accepted")
            await round_closes(served, a, 0)
            for version in (0, 2, 2**64 - 1):
                refused = await outcome(a.pull(version))
                assert refused == Refused(FAILED_PRECONDITION, Reason.VERSION_UNAVAILABLE, "")
            await a.pull(1)

    async def test_a_step_leads_from_a_version_to_the_next(self, tmp_path: Path) -> None:
        async with opened(tmp_path, model="wide", metrics=True) as (served, a, b, plan):
            n = a.joined.parameter_coordinates
            w = torch.frombuffer(bytearray(await a.pull(0)), dtype=torch.float32)
            for peer in (a, b):
                update = peer.update(plan)
                assert (await peer.push(peer.header(plan, update), update)).HasField("accepted")
            await round_closes(served, a, 0)
            header, content = await a.pulled(1, held=0, digest=downlink.digest(w, b""))
            assert header.encoding == pb.PULL_ENCODING_STEPS
            assert (header.from_version, header.parameter_bytes, len(header.steps)) == (0, 0, 1)
            assert n / 5 < header.steps[0].bytes == len(content) < n / 3
            codec = downlink.downlink_codec(served.job.downlink, ditherps.codec("dqsg"))
            assert codec is not None
            address = downlink.step_address(served.job.seed, 0)
            downlink.take_step(codec, Encoded.from_bytes(content), address, header.steps[0].rate, w)
            whole, snapshot = await b.pulled(1)
            assert whole.encoding == pb.PULL_ENCODING_SNAPSHOT
            assert snapshot == w.numpy().tobytes()
            assert served.records()[0]["w_digest"] == downlink.digest(w, b"").hex()
            assert served.records()[0]["step_bytes"] == len(content)
            assert await served.metric('ditherps_pulls_total{kind="steps"}') == 1
            assert await served.metric('ditherps_pulls_total{kind="snapshot"}') == 2
            sent = 'ditherps_payload_bytes_total{codec="dqsg",direction="down"}'
            assert await served.metric(sent) == len(content)
            assert await served.metric('ditherps_values_total{codec="dqsg",direction="down"}') == n
            assert await served.metric("ditherps_digest_mismatches_total") == 0

    async def test_who_holds_something_else_gets_a_snapshot_and_is_counted(self, tmp_path: Path) -> None:
        async with opened(tmp_path, metrics=True) as (served, a, b, plan):
            for peer in (a, b):
                update = peer.update(plan)
                assert (await peer.push(peer.header(plan, update), update)).HasField("accepted")
            await round_closes(served, a, 0)
            for held, digest, count in ((0, bytes(16), 1), (1, bytes(16), 2), (7, b"x", 2)):  # 7: of a later life
                header, content = await a.pulled(1, held, digest)
                assert header.encoding == pb.PULL_ENCODING_SNAPSHOT
                assert content == await b.pull(1)
                assert await served.metric("ditherps_digest_mismatches_total") == count
            right = downlink.digest(torch.frombuffer(bytearray(content), dtype=torch.float32), b"")
            assert (await a.pulled(1, 1, right))[1] == b""

    @pytest.mark.slow
    async def test_who_was_away_gets_the_steps_or_the_model_and_ends_with_the_right_w(self, tmp_path: Path) -> None:
        """Away for 5 rounds, and for 500; the bytes on the wire are those that the sizes say."""
        options = {"model": "wide", "quorum": 0.5, "rounds": 1000}
        async with opened(tmp_path, **options) as (served, _, b, _), Peer(served.address) as meanwhile:
            await meanwhile.join("worker-0")
            network = FlatModel(Tiny().build("wide", served.job.seed))
            codec = downlink.downlink_codec(served.job.downlink, ditherps.codec("dqsg"))
            held = HeldModel(served.job.downlink, served.job.seed, codec, network, b.joined.initial_digest)
            assert held.version == 0
            version = 0
            for away in (5, 500):
                await answered(b.stub.Leave(pb.LeaveRequest(fence=b.fence, reason="left")))
                for _ in range(away):
                    plan = await meanwhile.plan()
                    update = meanwhile.update(plan)
                    assert (await meanwhile.push(meanwhile.header(plan, update), update)).HasField("accepted")
                    version += 1
                    await round_closes(served, meanwhile, version - 1)
                await b.join("worker-1")
                before = b.meter.traffic.downlink_bytes
                header, content = await b.pulled(version, held.version, held.digest_due())
                cost = b.meter.traffic.downlink_bytes - before - wire.RPC_DOWNLINK_BYTES
                at = 0
                for part in held.room(header):
                    part[:] = content[at : at + len(part)]
                    at += len(part)
                held.take(header)
                assert (held.version, held.digest_due() or downlink.digest(network.flat, b"")) == (
                    version, bytes.fromhex(served.records()[version - 1]["w_digest"]),
                )  # fmt: skip
                steps = [record["step_bytes"] for record in served.records()[version - away : version]]
                if away == 5:
                    assert [step.bytes for step in header.steps] == steps
                    predicted = sum(steps)
                else:
                    assert header.encoding == pb.PULL_ENCODING_SNAPSHOT
                    predicted = 4 * network.flat.numel()
                    assert predicted < sum(steps)
                assert predicted < cost <= predicted + 40 + 30 * (len(header.steps) + 1), (predicted, cost)

    async def test_everyone_gets_the_same(self, tmp_path: Path) -> None:
        async with opened(tmp_path, model="wide") as (_, a, b, _):
            assert await a.pull(0) == await b.pull(0) == await a.pull(0)


class TestStatus:
    async def test_it_says_what_the_server_waits_for(self, tmp_path: Path) -> None:
        async with serving(tmp_path) as served, Peer(served.address) as a, Peer(served.address) as b:
            status = await a.status()
            assert (status.job_id, status.task, status.codec) == (served.job_id, "tiny", "dqsg")
            assert (status.phase, status.rounds) == (types_pb2.PHASE_WAITING, 3)
            assert status.waiting_for.startswith("workers: 0 of the 2 that a round needs are here; the run ends in ")
            await a.join("worker-0")
            assert await a.states() == ["here"]
            await b.join("worker-1")
            plan = await a.plan()
            update = a.update(plan)
            await a.push(a.header(plan, update), update)
            status = await a.status()
            assert status.phase == types_pb2.PHASE_OPEN
            assert status.waiting_for == "contributions: 1 of 2 are here; missing: worker-1"
            assert [(m.index, m.worker, m.state) for m in status.members] == [
                (0, "worker-0", "delivered"), (1, "worker-1", "computing"),
            ]  # fmt: skip
            await answered(b.stub.Leave(pb.LeaveRequest(fence=b.fence, reason="interrupted")))
            assert "worker-1 (interrupted)" in (await a.status()).waiting_for
            await b.join("worker-1")
            await answered(b.stub.Leave(pb.LeaveRequest(fence=b.fence)))
            assert await a.states() == ["delivered", "left"]

    async def test_both_ends_count_the_same_bytes(self, tmp_path: Path) -> None:
        async with serving(tmp_path) as served, Peer(served.address) as a:
            await a.join("worker-0")
            await a.pull(0)
            watch = a.watch()
            await watch.read()
            await a.status()
            await answered(a.stub.Heartbeat(pb.HeartbeatRequest(fence=a.fence)))
            before = a.meter.traffic
            status = await a.status()
            asked = wire.RPC_UPLINK_BYTES + wire.MESSAGE_PREFIX_BYTES
            assert status.uplink_bytes == before.uplink_bytes + asked
            # The server has counted this RPC's constant, but not yet the answer that says so.
            assert status.downlink_bytes == before.downlink_bytes + wire.RPC_DOWNLINK_BYTES
            watch.cancel()

    async def test_health(self, tmp_path: Path) -> None:
        async with serving(tmp_path) as served, Peer(served.address) as peer:
            stub: Any = health_pb2_grpc.HealthStub(peer.channel)
            for name in ("", wire.SERVICE.full_name):
                response = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=20)
                assert response.status == health_pb2.HealthCheckResponse.SERVING
            before = (await peer.status()).uplink_bytes
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
            asked = wire.RPC_UPLINK_BYTES + wire.MESSAGE_PREFIX_BYTES
            assert (await peer.status()).uplink_bytes == before + asked  # probes are not training traffic


class TestSilence:
    async def test_a_silent_worker_is_let_go_and_comes_back_with_a_sign_of_life(self, tmp_path: Path) -> None:
        async with opened(tmp_path, idle_timeout_seconds=0.6, quorum=0.5) as (_, a, b, _):
            watch = b.watch()
            while (await a.states())[1] == "computing":
                await answered(a.stub.Heartbeat(pb.HeartbeatRequest(fence=a.fence)))
            assert (await a.states())[1] == "silent"
            await answered(b.stub.Heartbeat(pb.HeartbeatRequest(fence=b.fence)))
            assert (await a.states())[1] in ("computing", "here")
            watch.cancel()
