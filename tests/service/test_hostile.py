"""One worker of eight is hostile: what robust rules keep out of the model, and what the limits refuse by name."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

import ditherps
from ditherps import wire
from ditherps.codecs import Role
from ditherps.config import JobConfig
from ditherps.dither import Address, Domain
from ditherps.errors import NonFiniteError, OptionError, Reason
from ditherps.gradient import make_deterministic
from ditherps.job import resolve_job
from ditherps.layout import FlatModel
from ditherps.sampling import evaluate
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps.v1 import types_pb2
from tests.service.inprocess import Peer, Refused, Served, serving
from tests.service.simulation import simulated_model

WORKERS, ROUNDS = 8, 100
asynchronous = pytest.mark.asyncio(loop_scope="session")


def accuracy_of(codec: str, rule: str, hostile: int | None) -> float:
    """Test accuracy of `digits` where worker `hostile` sends its updates with the wrong sign, a hundred times."""
    flags = {"task": "digits", "workers": WORKERS, "rounds": ROUNDS, "codec": codec, "aggregation": {"name": rule}}
    resolved = resolve_job(flags)
    make_deterministic(1)
    model = simulated_model(
        resolved.config, resolved.task, tamper=lambda index, vector: -100 * vector if index == hostile else vector
    )
    copy = FlatModel(resolved.task.build(None, 0), gradient=False)
    model.copy_into(copy)
    return evaluate(resolved.task, None, copy.module, resolved.task.load(None, train=False), "cpu").accuracy


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
@pytest.mark.parametrize(
    ("codec", "hostile"), [("dqsg", 3), ("ndqsg", 3), ("ndqsg", 7)], ids=["dqsg", "ndqsg source", "ndqsg nested"]
)
def test_one_of_eight_sends_its_updates_flipped_and_a_hundred_times_too_large(
    codec: str, hostile: int, rule: str
) -> None:
    assert accuracy_of(codec, rule, hostile) >= 0.93


@pytest.mark.parametrize("codec", ["dqsg", "ndqsg"])
def test_the_mean_does_not_survive_it(codec: str) -> None:
    """The attack is one: the model has become infinite within the rounds that the robust rules take to learn."""
    with pytest.raises(NonFiniteError):
        accuracy_of(codec, "weighted_mean", hostile=3)


@contextlib.asynccontextmanager
async def opened(
    tmp_path: Path, codec: str, **options: Any
) -> AsyncIterator[tuple[Served, list[Peer], list[types_pb2.RoundPlan]]]:
    """A server with an open round, its eight workers and their plans."""
    options = {"workers": WORKERS, "quorum": 0.5, "codec": codec, "rounds": 1, **options}
    async with contextlib.AsyncExitStack() as stack:
        served = await stack.enter_async_context(serving(tmp_path, metrics=True, **options))
        peers = [await stack.enter_async_context(Peer(served.address)) for _ in range(WORKERS)]
        for index, peer in enumerate(peers):
            await peer.join(f"worker-{index}")
        yield served, peers, [await peer.plan() for peer in peers]


async def pushed(peer: Peer, plan: types_pb2.RoundPlan, codec: str, factor: float = 1.0) -> pb.PushResponse:
    """A push of about the same vector by all, `factor` times."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(peer.joined.parameter_coordinates, generator=generator)
    vector += 0.01 * torch.randn(len(vector), generator=generator.manual_seed(peer.joined.index))
    address = Address(1, plan.round, peer.joined.index, Domain.UPDATE, plan.attempt)
    used = ditherps.codec(codec).for_role(Role.NESTED if plan.role == types_pb2.ROLE_NESTED else Role.SOURCE)
    update = used.encode(factor * vector, address).to_bytes()
    return await peer.push(peer.header(plan, update), update)


def rejected(reason: Reason) -> str:
    return f'ditherps_rejected_updates_total{{reason="{reason}"}}'


@asynchronous
class TestNorm:
    async def test_a_source_is_refused_before_it_counts(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        async with opened(tmp_path, "dqsg", max_norm=30.0) as (served, peers, plans):
            refused = (await pushed(peers[3], plans[3], "dqsg", -100.0)).refused
            assert refused.reason == Reason.NORM
            assert "exceeds max_norm = 30" in refused.message
            assert "refused update worker=worker-3 reason=norm" in caplog.text
            assert await served.metric(rejected(Reason.NORM)) == 1
            assert (await peers[3].states())[3] == "computing"
            # It may still send what is right.
            for peer, plan in zip(peers, plans, strict=True):
                assert (await pushed(peer, plan, "dqsg")).HasField("accepted")
            await served.reached(1)
            assert served.records()[0]["workers"] == list(range(WORKERS))

    @pytest.mark.parametrize(
        ("codec", "hostile", "limit"),
        [("ndqsg", 7, {"max_norm": 30.0}), ("ndqsg", 7, {"max_norm_ratio": 3.0}), ("ndqsg", 2, {"max_norm_ratio": 3.0}),
         ("dqsg", 5, {"max_norm_ratio": 3.0})],
    )  # fmt: skip
    async def test_what_only_the_close_can_tell_is_left_out_by_name(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, codec: str, hostile: int, limit: dict[str, Any]
    ) -> None:
        async with opened(tmp_path, codec, **limit) as (served, peers, plans):
            for index, (peer, plan) in enumerate(zip(peers, plans, strict=True)):
                answer = await pushed(peer, plan, codec, -100.0 if index == hostile else 1.0)
                assert answer.HasField("accepted")
            await served.reached(1)
            (record,) = served.records()[:1]
            assert record["workers"] == [index for index in range(WORKERS) if index != hostile]
            assert record["absent"] == {str(hostile): "norm"}
            assert f"refused update worker=worker-{hostile} reason=norm" in caplog.text
            assert await served.metric(rejected(Reason.NORM)) == 1

    async def test_without_a_quorum_of_sound_ones_the_round_is_abandoned(self, tmp_path: Path) -> None:
        async with opened(tmp_path, "ndqsg", max_norm=30.0, quorum=1.0) as (served, peers, plans):
            call = peers[0].watch()
            assert wire.checked(await call.read()).HasField("opened")
            for index, (peer, plan) in enumerate(zip(peers, plans, strict=True)):
                await pushed(peer, plan, "ndqsg", -100.0 if index == 7 else 1.0)
            while not (state := wire.checked(await call.read())).closed.abandoned:
                pass
            assert state.closed.abandoned == Reason.NORM
            call.cancel()
            assert await served.metric('ditherps_rounds_total{result="abandoned"}') == 1


@asynchronous
class TestWeight:
    """Declared at Join and fixed: what a contribution says of itself afterwards changes nothing."""

    async def test_no_worker_weighs_more_than_its_batches(self, tmp_path: Path) -> None:
        async with opened(tmp_path, "dqsg", batch_size=8) as (served, peers, plans):
            update = peers[0].update(plans[0])
            for samples in (0, 7, 9, 10**9, 2**64 - 1):
                header = peers[0].header(plans[0], update, samples=samples)
                answer = await peers[0].push(header, update)
                assert answer.refused.reason == Reason.WEIGHT
                assert "declared 8 at Join" in answer.refused.message
            assert await served.metric(rejected(Reason.WEIGHT)) == 5
            assert (await peers[0].push(peers[0].header(plans[0], update, samples=8), update)).HasField("accepted")

    async def test_max_weight_says_otherwise(self, tmp_path: Path) -> None:
        async with opened(tmp_path, "dqsg", max_weight=20) as (_, peers, _):
            with pytest.raises(Refused) as refused:
                await peers[0].join("worker-0", samples=21)
            assert refused.value == Refused(grpc.StatusCode.INVALID_ARGUMENT, Reason.WEIGHT, "")
            await peers[0].join("worker-0", samples=20)
            plan = await peers[0].plan()
            update = peers[0].update(plan)
            for samples in (8, 21):
                answer = await peers[0].push(peers[0].header(plan, update, samples=samples), update)
                assert answer.refused.reason == Reason.WEIGHT
            assert (await peers[0].push(peers[0].header(plan, update, samples=20), update)).HasField("accepted")

    async def test_a_worker_may_declare_otherwise_when_it_joins_again(self, tmp_path: Path) -> None:
        async with opened(tmp_path, "dqsg", max_weight=20) as (_, peers, _):
            await peers[0].join("worker-0", samples=20)
            await peers[0].join("worker-0", samples=5)
            plan = await peers[0].plan()
            update = peers[0].update(plan)
            refused = await peers[0].push(peers[0].header(plan, update, samples=20), update)
            assert refused.refused.reason == Reason.WEIGHT
            assert (await peers[0].push(peers[0].header(plan, update, samples=5), update)).HasField("accepted")


def test_a_job_whose_own_batches_weigh_too_much() -> None:
    with pytest.raises(ValueError, match="max_weight = 7 must not be below 8"):
        JobConfig.model_validate({"batch_size": 8, "max_weight": 7})


def test_the_weight_of_local_steps() -> None:
    job = JobConfig.model_validate({"mode": "local", "local": {"steps": 5}, "batch_size": 8})
    assert job.weight_limit == 40


@asynchronous
async def test_a_server_does_not_start_with_an_unsafe_rule(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"krum.*at least 5 contributions"):
        async with serving(tmp_path, workers=4, aggregation={"name": "krum"}):
            pass
    assert not (tmp_path / "server.json").exists()


def test_the_reasons_have_a_status() -> None:
    for reason in (Reason.NORM, Reason.WEIGHT):
        assert wire.status_of(reason) is grpc.StatusCode.INVALID_ARGUMENT


@asynchronous
async def test_a_refused_rpc_leaves_nothing_behind(tmp_path: Path) -> None:
    """No cycle holds its state and its messages until the collector comes by, which in a server is seldom."""
    async with serving(tmp_path, metrics=True) as served, Peer(served.address) as peer:
        await peer.status()
        gc.collect()
        gc.disable()
        try:
            for _ in range(30):
                with pytest.raises(grpc.aio.AioRpcError):
                    await peer.stub.Heartbeat(pb.HeartbeatRequest(fence=types_pb2.Fence(job_id="x")), timeout=20)
            kept = Counter(type(found).__name__ for found in gc.get_objects())
        finally:
            gc.enable()
        assert kept["HeartbeatRequest"] + kept["RefusedError"] + kept["RPCState"] < 10
        for method, code, count in (("Status", "OK", 1), ("Heartbeat", "FAILED_PRECONDITION", 30)):
            series = f'grpc_server_handled_total{{grpc_code="{code}",grpc_method="{method}"}}'
            assert await served.metric(series) == count
