"""Samples that are not what they claim to be: each is refused by name, nothing of it is applied, the run goes on."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import xxhash

from ditherps.errors import Reason
from ditherps.gradient import make_deterministic
from ditherps.samples.codec import SampleCodec
from ditherps.samples.need import Need, distinct
from ditherps.samples.shard import VERSION_BYTES, pack
from ditherps.tasks import Task, load_task
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps.v1 import types_pb2
from ditherps_server.records import RunResult
from ditherps_worker.sampled import SampledUpdate
from tests.service.inprocess import CALL_SECONDS, Peer, Refused, Served, answered, serving
from tests.service.sampler import Sampler
from tests.service.simulation import simulated
from tests.service.test_protocol import Gate
from tests.tiny import Tiny
from tests.worker.conftest import _deterministic as _deterministic

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

INVALID = grpc.StatusCode.INVALID_ARGUMENT
CHECK_AT, HEADER_BYTES = 20, 24
Plan = types_pb2.RoundPlan


def sealed(payload: bytes) -> bytes:
    """The same samples with the checksum that they should have."""
    state = xxhash.xxh3_64(payload[:CHECK_AT])
    state.update(payload[HEADER_BYTES:])
    return payload[:CHECK_AT] + struct.pack("<I", state.intdigest() & 0xFFFFFFFF) + payload[HEADER_BYTES:]


def patched(payload: bytes, offset: int, form: str, value: int) -> bytes:
    """Another field in the header of samples."""
    return sealed(payload[:offset] + struct.pack(form, value) + payload[offset + struct.calcsize(form) :])


@contextlib.asynccontextmanager
async def opened(
    tmp_path: Path, loaded: Task | None = None, **options: Any
) -> AsyncIterator[tuple[Served, Sampler, Sampler, Plan]]:
    """A server with an open round in mode `data`, its two workers, and the plan of the first."""
    options = {"mode": "data", "model": "norm", "rounds": 1, "evaluate_every": 100, **options}
    async with contextlib.AsyncExitStack() as stack:
        served = await stack.enter_async_context(serving(tmp_path, metrics=True, task=loaded, **options))
        eve = await stack.enter_async_context(Sampler(served.address))
        bob = await stack.enter_async_context(Sampler(served.address))
        await eve.ready(served, "worker-0", loaded)
        await bob.ready(served, "worker-1", loaded)
        yield served, eve, bob, await eve.plan()


async def closes_well(served: Served, *workers: Sampler) -> RunResult:
    """The result, once all of them have sent what they should."""
    for worker in workers:
        await worker.sends_well(await worker.plan())
    watches = [worker.watch() for worker in workers]  # who listens is not waited for
    result = await served.running
    for watch in watches:
        watch.cancel()
    return result


def spliced(good: SampledUpdate, samples: bytes) -> tuple[bytes, int]:
    """An update with other samples."""
    return samples + good.update[good.sample_bytes :], len(samples)


async def test_updates_that_cannot_be(tmp_path: Path) -> None:
    async with opened(tmp_path, data={"refine": "dqsg", "probe_every": 1}) as (served, eve, bob, plan):
        good = eve.sampled(plan)
        update, front = good.update, good.sample_bytes
        samples, probe = update[:front], 4 * eve.computer.model.layout.coordinates
        names, _ = distinct(eve.computer.batch(plan.round)[0])
        codec, stored = SampleCodec(Tiny.features, Tiny.classes, served.job.seed, 0), eve.computer.samples
        nothing, held = np.full(len(names), -1), np.full(len(names), 1)

        def encoded(codec: SampleCodec, level: int = 2, held: Any = nothing, ids: Any = names) -> bytes:
            return codec.encode(names, stored.features[ids], stored.labels[ids], held, level)

        elsewhere = SampleCodec(Tiny.features, Tiny.classes, served.job.seed, 1)
        wider = SampleCodec(Tiny.features, 1000, served.job.seed, 0)
        broken: dict[str, tuple[Reason, tuple[bytes, int]]] = {
            "digits beyond a level that is not held": (
                Reason.CONTEXT_MISMATCH, spliced(good, encoded(codec, held=held)),
            ),
            "another worker's": (Reason.CONTEXT_MISMATCH, spliced(good, encoded(elsewhere))),
            "more classes": (Reason.SIZE, spliced(good, encoded(wider))),
            "another level": (Reason.SIZE, spliced(good, encoded(codec, level=3))),
            "features": (Reason.SIZE, spliced(good, patched(samples, 8, "<I", 7))),
            "as many features as there can be": (Reason.SIZE, spliced(good, patched(samples, 8, "<I", 2**32 - 1))),
            "samples": (Reason.SIZE, spliced(good, patched(samples, 4, "<I", 2**32 - 1))),
            "another format": (Reason.MALFORMED, spliced(good, patched(samples, 0, "<B", 2))),
            "no samples": (Reason.SIZE, spliced(good, b"")),
            "a flipped bit": (Reason.DIGEST_MISMATCH, spliced(good, samples[:-1] + bytes([samples[-1] ^ 1]))),
            "NaN in the probe": (
                Reason.NON_FINITE,
                (update[:front] + struct.pack("<f", np.nan) + update[front + 4 :], front),
            ),
            "no refinement": (Reason.SIZE, (update[: front + probe], front)),
            "junk for a refinement": (Reason.MALFORMED, (update[: front + probe] + b"\xff" * 40, front)),
            "nothing": (Reason.SIZE, (b"", 0)),
            "more samples than update": (Reason.SIZE, (update, len(update) + 1)),
            "as many as there can be": (Reason.SIZE, (update, 2**64 - 1)),
            "nothing but samples": (Reason.SIZE, (update, len(update))),
            "a byte more of samples": (Reason.SIZE, (update, front + 1)),
            "too large": (Reason.SIZE, (update + bytes(1 << 20), front)),
        }  # fmt: skip
        for what, (reason, (content, size)) in broken.items():
            assert await eve.sends(plan, content, size) == reason, what
        # Before memory is taken for it.
        header = eve.announced(plan, update, front, update_bytes=2**40, digest=bytes(16))
        push = eve.pushing()
        await push.send(header)
        assert (await push.answer()).refused.reason == Reason.SIZE
        assert (await eve.states()) == ["computing", "computing"]
        result = await closes_well(served, eve, bob)
        assert result.model_sha256 == simulated(served.job, Tiny())
        assert result.contributions == 2


async def test_selections_that_cannot_be(tmp_path: Path) -> None:
    async with opened(tmp_path, data={"keep": 0.5}) as (served, eve, bob, plan):
        good = eve.sampled(plan)
        selected = 1 + bin(good.update[0]).count("1")
        bits, chances, samples = good.update[:1], good.update[1:selected], good.update[selected:]
        assert 1 < len(chances) < 8
        broken: dict[str, tuple[Reason, bytes]] = {
            "nothing": (Reason.SIZE, b""),
            "more than there is": (Reason.MALFORMED, b"\xff"),
            "below the least chance": (Reason.MALFORMED, bits + bytes(len(chances)) + samples),
            "against the coins": (Reason.MALFORMED, b"\xff" + b"\x0f" * 8 + samples),
            "fewer samples than are kept": (Reason.SIZE, bits + chances),
            "samples where none is kept": (Reason.SIZE, b"\x00" + samples),
            "of another selection": (Reason.SIZE, bytes([good.update[0] & good.update[0] - 1]) + chances[1:] + samples),
        }
        for what, (reason, update) in broken.items():
            assert await eve.sends(plan, update, len(update)) == reason, what
        result = await closes_well(served, eve, bob)
        assert result.model_sha256 == simulated(served.job, Tiny())


async def test_a_selection_of_none_or_one_is_one(tmp_path: Path) -> None:
    """Also under batch norm: whatever a worker keeps, the server goes on."""
    async with opened(tmp_path, rounds=2, data={"keep": 0.5}) as (served, eve, bob, plan):
        good = eve.sampled(plan)
        first = good.update[0] & -good.update[0]
        ids, _ = eve.computer.batch(plan.round)
        kept = ids[[first.bit_length() - 1]]
        codec = SampleCodec(Tiny.features, Tiny.classes, served.job.seed, 0)
        stored = eve.computer.samples
        one = codec.encode(kept, stored.features[kept], stored.labels[kept], np.full(1, -1), 2)
        update = bytes([first, good.update[1]]) + one
        assert await eve.sends(plan, update, len(update)) == ""
        await bob.sends_well(await bob.plan())
        await served.reached(1)
        plan = await eve.plan()
        assert await eve.sends(plan, b"\x00", 1) == ""
        await closes_well(served, bob)
        assert [record["workers"] for record in served.records()] == [[0, 1], [0, 1]]


async def test_samples_that_nobody_asked_for(tmp_path: Path) -> None:
    """Of a batch that the server holds: the shard has but two batches."""
    async with opened(tmp_path, rounds=2, batch_size=50) as (served, eve, bob, plan):
        changes = {"samples": 50}
        good = eve.sampled(plan)
        assert await eve.sends(plan, good.update, good.sample_bytes, **changes) == ""
        other = bob.sampled(await bob.plan())
        assert await bob.sends(await bob.plan(), other.update, other.sample_bytes, **changes) == ""
        await served.reached(1)
        again = await eve.plan()
        assert again.round == 1
        assert again.need == b""
        assert eve.sampled(again).update == b""
        lacking = Need(np.full(50, -1), 2).to_bytes()
        unasked = eve.sampled(again, lacking)
        assert await eve.sends(again, unasked.update, unasked.sample_bytes, **changes) == Reason.SIZE
        assert await eve.sends(again, b"x", 1, **changes) == Reason.SIZE
        assert await eve.sends(again, b"x", 0, **changes) == Reason.SIZE
        assert await eve.sends(again, b"", 0, **changes) == ""
        assert await bob.sends(await bob.plan(), b"", 0, **changes) == ""
        watches = [eve.watch(), bob.watch()]
        assert (await served.running).model_sha256 == simulated(served.job, Tiny())
        for watch in watches:
            watch.cancel()


async def test_a_label_that_there_is_not(tmp_path: Path) -> None:
    task = load_task("digits")
    async with opened(tmp_path, task, model="mlp") as (served, eve, bob, plan):
        assert task.features is not None
        good = SampleCodec(task.features, task.classes, served.job.seed, 0)
        evil = SampleCodec(task.features, 16, served.job.seed, 0)
        names, _ = distinct(eve.computer.batch(plan.round)[0])
        features, nothing = eve.computer.samples.features[names], np.full(len(names), -1)
        honest = good.encode(names, features, eve.computer.samples.labels[names], nothing, 2)
        for label in range(10, 16):
            labels = eve.computer.samples.labels[names].clone()
            labels[3] = label
            payload = evil.encode(names, features, labels, nothing, 2)
            assert await eve.sends(plan, payload, len(payload)) == Reason.SIZE
            # Even where the header says what it should.
            payload = patched(payload, 2, "<H", task.classes - 1)
            payload = patched(payload, 12, "<I", struct.unpack_from("<I", honest, 12)[0])
            assert await eve.sends(plan, payload, len(payload)) == Reason.MALFORMED
        assert (await closes_well(served, eve, bob)).model_sha256 == simulated(served.job, task)


async def test_shards_that_cannot_be(tmp_path: Path) -> None:
    async with serving(tmp_path, mode="data", rounds=1, metrics=True) as served, Sampler(served.address) as eve:
        await eve.enter(served, "worker-0")
        ids, version = eve.computer.shard, bytes(VERSION_BYTES)
        good = eve.sender.shard
        head = struct.Struct("<IBI")
        broken = {
            "no ids": version + pack(ids[:0]),
            "an id too many": version + pack(np.array([3, 99, 100])),
            "an id at the end of the world": version + pack(np.array([2**32 - 1])),
            "a head alone": version + good[VERSION_BYTES : VERSION_BYTES + head.size],
            "less than a version": good[:7],
            "a version alone": version,
            "cut off": good[:-1],
            "a byte more": good + b"\x00",
            "billions": version + head.pack(2**32 - 1, 0, 2**32 - 1) + bytes(100),
            "of so many bits": version + head.pack(1, 255, 8) + bytes(100),
        }
        for what, shard in broken.items():
            with pytest.raises(Refused) as error:
                await eve.states_shard(shard)
            assert error.value.status is INVALID, what
            assert error.value.reason in (Reason.SIZE, Reason.MALFORMED), what
        rng = random.Random(0)
        for _ in range(300):
            noise = bytearray(good)
            for _ in range(rng.randint(1, 3)):
                noise[rng.randrange(VERSION_BYTES, len(good))] ^= 1 << rng.randrange(8)
            with contextlib.suppress(Refused):
                await eve.states_shard(bytes(noise))
        async with Sampler(served.address) as bob:
            await bob.ready(served, "worker-1")
            await eve.changes_shard(good)  # what was said last counts
            assert (await closes_well(served, eve, bob)).model_sha256 == simulated(served.job, Tiny())


async def test_a_worker_is_present_once_it_has_said_what_it_has(tmp_path: Path) -> None:
    async with serving(tmp_path, mode="data", rounds=1) as served, Sampler(served.address) as eve:
        bob = Sampler(served.address)
        await eve.enter(served, "worker-0")
        await eve.states_shard(b"")  # nothing said
        await bob.ready(served, "worker-1")
        assert [member.worker for member in (await eve.status()).members] == ["worker-1"]
        assert await eve.sends(Plan(role=types_pb2.ROLE_SOURCE), b"x", 1) == Reason.WRONG_ROUND
        await eve.states_shard(eve.sender.shard)
        before = eve.fence
        await eve.enter(served, "worker-0")  # once more: its place is its new session's, which has said nothing
        plan = await bob.plan()
        request = pb.ReportRequest(fence=before, shard=eve.sender.shard)
        with pytest.raises(Refused) as error:
            await answered(eve.stub.Report(request, timeout=CALL_SECONDS))
        assert error.value.reason is Reason.SUPERSEDED
        assert plan.round == 0
        await eve.states_shard(eve.sender.shard)
        assert (await closes_well(served, eve, bob)).model_sha256 == simulated(served.job, Tiny())
        await bob.channel.close()


async def test_a_job_that_wants_no_samples(tmp_path: Path) -> None:
    async with serving(tmp_path, rounds=1, codec="dqsg") as served, Peer(served.address) as peer:
        await peer.join("worker-0")
        with pytest.raises(Refused) as error:
            await answered(peer.stub.Report(pb.ReportRequest(fence=peer.fence, shard=b"x" * 40), timeout=CALL_SECONDS))
        assert error.value.reason is Reason.TASK_MISMATCH
        async with Peer(served.address) as other:
            await other.join("worker-1")
            plan = await peer.plan()
            update = peer.update(plan)
            answer = await peer.push(peer.header(plan, update, sample_bytes=1), update)
            assert answer.refused.reason == Reason.SIZE
            assert (await peer.push(peer.header(plan, update), update)).HasField("accepted")


async def test_other_samples_while_a_round_is_open(tmp_path: Path) -> None:
    """Only a worker itself can make its contribution one of samples that it no longer has."""
    async with opened(tmp_path, rounds=1) as (served, eve, bob, plan):
        good = eve.sampled(plan)
        fewer = bytes(VERSION_BYTES) + pack(eve.computer.shard[:20])
        with pytest.raises(Refused) as error:
            await eve.states_shard(fewer)
        assert error.value.reason is Reason.JOIN_RATE
        await eve.changes_shard(fewer)
        assert await eve.sends(plan, good.update, good.sample_bytes) in (Reason.CONTEXT_MISMATCH, Reason.SIZE)
        await eve.changes_shard(eve.sender.shard)
        await eve.sends_well(plan)
        await eve.changes_shard(fewer)  # too late for this round
        assert (await closes_well(served, bob)).model_sha256 == simulated(served.job, Tiny())


async def test_another_content_while_one_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, "validate")
    async with opened(tmp_path, rounds=1) as (served, eve, bob, plan):
        good = eve.sampled(plan)
        junk = b"\xff" * len(good.update)
        checked = asyncio.create_task(eve.sends(plan, junk, len(junk)))
        await gate.holds()
        again = asyncio.create_task(eve.sends(plan, good.update, good.sample_bytes))
        await gate.holds()
        gate.open.set()
        assert await checked == Reason.SUPERSEDED
        assert await again == ""
        assert (await closes_well(served, bob)).model_sha256 == simulated(served.job, Tiny())


async def test_other_samples_while_a_contribution_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the redo log a contribution stands behind what its worker had said by then."""
    gate = Gate(monkeypatch, "validate")
    async with opened(tmp_path, rounds=1) as (served, eve, bob, plan):
        good = eve.sampled(plan)
        checked = asyncio.create_task(eve.sends(plan, good.update, good.sample_bytes))
        await gate.holds()
        await eve.changes_shard(bytes(VERSION_BYTES) + pack(eve.computer.shard[:20]))
        gate.open.set()
        assert await checked == Reason.SUPERSEDED
        await eve.changes_shard(eve.sender.shard)
        assert (await closes_well(served, eve, bob)).model_sha256 == simulated(served.job, Tiny())


async def test_a_contribution_that_comes_while_the_round_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is looked up in a cache that is changing."""
    async with opened(tmp_path, quorum=0.5) as (served, eve, bob, plan):
        good = eve.sampled(plan)
        push = eve.pushing()
        await push.send(eve.announced(plan, good.update, good.sample_bytes))
        assert (await push.answer()).HasField("need")
        await bob.sends_well(await bob.plan())
        closing = Gate(monkeypatch, "apply")
        monkeypatch.delattr("ditherps_server.cache.SampleCache.begin")
        await answered(eve.stub.Leave(pb.LeaveRequest(fence=eve.fence)))
        await closing.holds()
        await push.send(pb.PushRequest(chunk=good.update))
        assert (await push.answer()).refused.reason == Reason.LATE
        closing.open.set()
        watch = bob.watch()
        assert (await served.running).model_sha256 == simulated(served.job, Tiny(), [[1]])
        watch.cancel()


async def test_mutations(tmp_path: Path) -> None:
    """Of what one of two workers sends, with checksums made good: no crash, no hang, a typed answer to each."""
    make_deterministic(1)
    rounds, rng, answers = 12, random.Random(7), dict[str, int]()
    options: dict[str, Any] = {
        "rounds": rounds,
        "data": {"refine": "dqsg:coder=rans", "keep": 0.5, "probe_every": 50},
        "quorum": 0.5,
    }
    async with opened(tmp_path, **options) as (served, eve, bob, _):
        for number in range(rounds):
            plan = await eve.plan()
            assert plan.round == number
            good = eve.sampled(plan)
            selection = 1 + bin(good.update[0]).count("1")
            for _ in range(60):
                noise, front = bytearray(good.update), good.sample_bytes
                for _ in range(rng.randint(1, 4)):
                    noise[rng.randrange(len(noise))] ^= 1 << rng.randrange(8)
                match rng.randrange(4):
                    case 0:
                        del noise[rng.randrange(len(noise)) :]
                    case 1:
                        front = rng.randrange(len(noise) + 2)
                    case 2 if front - selection > HEADER_BYTES:
                        noise[selection:front] = sealed(bytes(noise[selection:front]))
                reason = await eve.sends(plan, bytes(noise), front)
                answers[reason] = answers.get(reason, 0) + 1
                if not reason:
                    break
                Reason(reason)
            else:
                await eve.sends_well(plan)
            await bob.sends_well(await bob.plan())
            if number + 1 < rounds:
                await served.reached(number + 1)
        watches = [eve.watch(), bob.watch()]
        result = await served.running
        for watch in watches:
            watch.cancel()
    assert result.rounds == rounds
    assert sum(answers.values()) > 100
