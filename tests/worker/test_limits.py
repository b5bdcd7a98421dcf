"""A server that lies: whatever it says, a worker ends with a typed error, within its time, and holds to its limits."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import torch

import ditherps
from ditherps import wire
from ditherps.config import JobConfig, WorkerConfig
from ditherps.errors import DitherpsError, PayloadError, Reason, RefusedError, RunFailedError, UnreachableError
from ditherps.layout import FlatModel
from ditherps.metrics import WorkerMetrics
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps.v1 import types_pb2
from ditherps_worker.client import Client
from ditherps_worker.compute import Computer
from ditherps_worker.limits import accepted, check_plan, stated
from ditherps_worker.loop import Loop
from tests.tiny import Tiny

asynchronous = pytest.mark.asyncio(loop_scope="session")

JOB = {"task": "tiny", "workers": 2, "rounds": 3, "codec": "dqsg", "batch_size": 8, "downlink": {"codec": "dqsg"}}
MODEL = FlatModel(Tiny().build("linear", 1))
SIZE = MODEL.layout.coordinates


def joined(job: bytes | dict[str, Any] = b"", **changes: Any) -> pb.JoinResponse:
    """A good answer to Join, but for what is changed."""
    values = job if isinstance(job, bytes) else json.dumps({**JOB, **job}).encode()
    answer = pb.JoinResponse(
        fence=types_pb2.Fence(job_id="job", server_epoch=1, session=1), index=1, job=values or json.dumps(JOB).encode(),
        layout_digest=MODEL.layout.digest, parameter_coordinates=SIZE, buffer_bytes=0, chunk_bytes=wire.CHUNK_BYTES,
        heartbeat_seconds=5.0, idle_timeout_seconds=5.0,
    )  # fmt: skip
    for key, value in changes.items():
        setattr(answer, key, value)
    return answer


def state(**plan: Any) -> pb.WatchResponse:
    """A round is open."""
    opened = types_pb2.RoundPlan(role=types_pb2.ROLE_SOURCE, **plan)
    return pb.WatchResponse(phase=types_pb2.PHASE_OPEN, opened=opened)


def pulled(content: bytes = bytes(4 * SIZE), **changes: Any) -> list[pb.PullResponse]:
    """A snapshot of version 0, but for what is changed."""
    header = pb.PullHeader(
        encoding=pb.PULL_ENCODING_SNAPSHOT, parameter_bytes=4 * SIZE, digest=wire.digest_of(content)
    )  # fmt: skip
    for key, value in changes.items():
        if key == "steps":
            header.steps.extend(value)
        else:
            setattr(header, key, value)
    return [pb.PullResponse(header=header), pb.PullResponse(chunk=content)]


@dataclass
class Liar:
    """The service, with whatever answers it is told to give."""

    join: pb.JoinResponse = field(default_factory=joined)
    states: list[pb.WatchResponse] = field(default_factory=lambda: [state()])
    pull: list[pb.PullResponse] = field(default_factory=pulled)
    push: list[pb.PushResponse] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    joins: int = 0
    endless: bool = False

    async def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        self.joins += 1
        return self.join

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchResponse]:
        for one in self.states:
            yield one
        await asyncio.Event().wait()

    async def Pull(self, request: pb.PullRequest, context: Any) -> AsyncIterator[pb.PullResponse]:
        for one in self.pull:
            yield one
        while self.endless:
            yield self.pull[-1]

    async def Push(self, requests: Any, context: Any) -> AsyncIterator[pb.PushResponse]:
        for one in self.push:
            await anext(requests)
            yield one

    async def Report(self, request: pb.ReportRequest, context: Any) -> pb.ReportResponse:
        return pb.ReportResponse()

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatResponse:
        return pb.HeartbeatResponse()

    async def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveResponse:
        self.left.append(request.reason)
        return pb.LeaveResponse()

    async def Status(self, request: pb.StatusRequest, context: Any) -> pb.StatusResponse:
        return pb.StatusResponse()


@asynccontextmanager
async def lying(liar: Liar) -> AsyncIterator[str]:
    """Its address."""
    server = grpc.aio.server(options=wire.SERVER_OPTIONS)
    server.add_generic_rpc_handlers((wire.service_handler(liar, wire.WireMeter()),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def ended(liar: Liar, **options: Any) -> DitherpsError:
    """How a worker of this server ends: within seconds, and with an error of ours."""
    async with lying(liar) as address:
        config = WorkerConfig(server=address, task="tiny", **{"connect_timeout_seconds": 0.5, **options})
        client = Client(config, wire.WireMeter())

        def make_computer(job: JobConfig, index: int) -> Computer:
            return Computer(job, index, Tiny(), None, torch.device("cpu"))

        try:
            async with asyncio.timeout(30):
                with pytest.raises(DitherpsError) as error:
                    await Loop(config, client, make_computer, WorkerMetrics("test")).run()
            return error.value
        finally:
            await client.close()


ABSURD = (0.0, -1.0, -0.0, math.nan, math.inf, -math.inf, 1e300, 5e-324, 1e-9)
JOBS: list[tuple[bytes | dict[str, Any], Reason]] = [
    (b"not json", Reason.MALFORMED),
    (b"\xff\xfe", Reason.MALFORMED),
    (b"[]", Reason.MALFORMED),
    (b"null", Reason.MALFORMED),
    (b"[" * 100_000, Reason.MALFORMED),
    (b'{"rounds": ' + b"9" * 5000 + b"}", Reason.MALFORMED),
    ({"rounds": math.nan}, Reason.MALFORMED),
    ({"no such option": 1}, Reason.MALFORMED),
    ({"rounds": 0}, Reason.MALFORMED),
    ({"batch_size": 1 << 62}, Reason.MALFORMED),
    ({"mode": "local", "local": {"steps": 1 << 62}}, Reason.MALFORMED),
    ({"mode": "data"}, Reason.DATA_NOT_ALLOWED),
    ({"mode": "wish"}, Reason.MALFORMED),
    ({"codec": "unknown\n"}, Reason.LIMITS),
    ({"downlink": {"codec": "unknown:x=1"}}, Reason.LIMITS),
    ({"task": "x" * (5 << 19), "model": "y" * (5 << 19)}, Reason.LIMITS),
]


class TestJoin:
    @pytest.mark.parametrize(("job", "reason"), JOBS)
    def test_jobs(self, job: bytes | dict[str, Any], reason: Reason) -> None:
        limits = stated(WorkerConfig())
        with pytest.raises((RefusedError, PayloadError)) as refused:
            accepted(joined(job), limits)
        assert isinstance(refused.value, (RefusedError, PayloadError))
        assert refused.value.reason is reason
        assert len(str(refused.value)) < 700
        assert str(refused.value).isprintable()

    @pytest.mark.parametrize("value", ABSURD)
    @pytest.mark.parametrize("name", ["heartbeat_seconds", "idle_timeout_seconds"])
    def test_times(self, name: str, value: float) -> None:
        changes: dict[str, Any] = {name: value}
        with pytest.raises(PayloadError, match=name):
            accepted(joined(**changes), stated(WorkerConfig()))

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"chunk_bytes": 0}, "chunks of 0 bytes"),
            ({"chunk_bytes": 2**31}, "chunks of 2147483648 bytes"),
            ({"index": 2}, "worker 2 of a job of 2"),
            ({"index": 2**32 - 1}, "of a job of 2"),
        ],
    )
    def test_numbers(self, changes: dict[str, Any], says: str) -> None:
        with pytest.raises(PayloadError, match=says):
            accepted(joined(**changes), stated(WorkerConfig()))

    @pytest.mark.parametrize("changes", [{"parameter_coordinates": 2**62}, {"buffer_bytes": 2**63}])
    def test_a_model_larger_than_stated(self, changes: dict[str, Any]) -> None:
        with pytest.raises(RefusedError, match="this worker allows") as refused:
            accepted(joined(**changes), stated(WorkerConfig()))
        assert refused.value.reason is Reason.LIMITS

    def test_what_is_as_stated(self) -> None:
        assert accepted(joined(), stated(WorkerConfig(max_model_bytes=4 * SIZE))).workers == 2

    def test_plans(self) -> None:
        job = accepted(joined(), stated(WorkerConfig()))
        good = types_pb2.RoundPlan(round=3, role=types_pb2.ROLE_SOURCE, base_version=3)
        roles = ditherps.codec("dqsg").roles
        check_plan(good, job, roles)
        for changes in (
            {"round": 4}, {"round": 2**64 - 1}, {"base_version": 2**64 - 1}, {"attempt": 1 << 24}, {"role": 77},
            {"role": types_pb2.ROLE_NESTED}, {"role": -1}, {"codec": "none"},
        ):  # fmt: skip
            plan = types_pb2.RoundPlan.FromString(good.SerializeToString())
            for key, value in changes.items():
                setattr(plan, key, value)
            with pytest.raises(PayloadError):
                check_plan(plan, job, roles)
        good.context.version = 1
        with pytest.raises(PayloadError):
            check_plan(good, job, roles)


def answers(*parts: pb.PushResponse) -> dict[str, Any]:
    return {"push": list(parts)}


NEED = pb.PushResponse(need=pb.PushNeed(offset=0))
STEP = pb.PullStep(bytes=10, rate=1.0)


@asynchronous
class TestRun:
    """The whole worker: it tries again while that may help, and then ends."""

    @pytest.mark.parametrize(
        ("liar", "kind", "reason"),
        [
            pytest.param(lambda: Liar(join=joined({"codec": "other"})), RefusedError, Reason.LIMITS, id="codec"),
            pytest.param(lambda: Liar(join=joined({"codec_options": {"name": 1}})), PayloadError, None, id="options"),
            pytest.param(
                lambda: Liar(join=joined({"codec": "rotated", "codec_options": {"inner": nested(20_000)}})),
                PayloadError, None, id="options within options",
            ),
            pytest.param(
                lambda: Liar(join=joined({"codec": "rotated", "codec_options": {"inner": nested(900)}})),
                PayloadError, None, id="many options within options",
            ),
            pytest.param(lambda: Liar(joined({"model": "norm"})), RefusedError, Reason.LAYOUT_MISMATCH, id="model"),
            pytest.param(lambda: Liar(join=joined(heartbeat_seconds=math.nan)), PayloadError, None, id="heartbeat"),
            pytest.param(lambda: Liar(joined(layout_digest=b"")), RefusedError, Reason.LAYOUT_MISMATCH, id="layout"),
            pytest.param(lambda: Liar(states=[state(round=2**64 - 1)]), PayloadError, None, id="round"),
            pytest.param(lambda: Liar(states=[state(attempt=1 << 30)]), PayloadError, None, id="attempt"),
            pytest.param(
                lambda: Liar(states=[pb.WatchResponse(finished=types_pb2.JobResult(reason="no\nsuch\x1b[2J"))]),
                RunFailedError, Reason.INTERNAL, id="end",
            ),
            pytest.param(lambda: Liar(pull=[]), (PayloadError, UnreachableError), None, id="no header"),
            pytest.param(lambda: Liar(pull=pulled(parameter_bytes=2**63)), PayloadError, Reason.SIZE, id="pull size"),
            pytest.param(lambda: Liar(pull=pulled(buffer_bytes=2**63)), PayloadError, Reason.SIZE, id="pull buffers"),
            pytest.param(lambda: Liar(pull=pulled(encoding=77)), PayloadError, None, id="encoding"),
            pytest.param(lambda: Liar(pull=pulled(to_version=2)), PayloadError, None, id="version"),
            pytest.param(lambda: Liar(pull=pulled(steps=[STEP])), PayloadError, None, id="steps"),
            pytest.param(lambda: Liar(pull=pulled(digest=b"x")), PayloadError, Reason.DIGEST_MISMATCH, id="digest"),
            pytest.param(lambda: Liar(pull=pulled(bytes(4 * SIZE + 1))), PayloadError, Reason.SIZE, id="more"),
            pytest.param(lambda: Liar(endless=True), PayloadError, Reason.SIZE, id="endless"),
            pytest.param(
                lambda: Liar(pull=[pulled()[0], pb.PullResponse(chunk=b"")], endless=True), PayloadError, Reason.SIZE,
                id="endless nothing",
            ),
            pytest.param(lambda: Liar(pull=[*pulled(), pulled()[0]]), PayloadError, None, id="two headers"),
            pytest.param(lambda: Liar(**answers(NEED, NEED)), PayloadError, None, id="need again"),
            pytest.param(lambda: Liar(**answers(pb.PushResponse())), PayloadError, None, id="no answer"),
            pytest.param(
                lambda: Liar(**answers(pb.PushResponse(refused=pb.PushRefused(reason="x\n", message="\n" * 9999)))),
                RefusedError, Reason.INTERNAL, id="refused",
            ),
        ],
    )  # fmt: skip
    async def test_lies(self, liar: Callable[[], Liar], kind: Any, reason: Reason | None) -> None:
        server = liar()
        error = await ended(server)
        assert isinstance(error, kind), repr(error)
        if reason is not None:
            assert getattr(error, "reason", None) is reason
        assert str(error).isprintable()
        assert len(str(error)) < 800
        assert server.left or isinstance(error, (PayloadError, UnreachableError))

    async def test_a_model_that_is_larger_than_the_server_said(self) -> None:
        error = await ended(Liar(join=joined(parameter_coordinates=1)), max_model_bytes=4 * SIZE - 1)
        assert isinstance(error, RefusedError)
        assert error.reason is Reason.LIMITS

    async def test_a_flood_of_results_takes_no_memory(self) -> None:
        flood = [pb.WatchResponse(closed=types_pb2.RoundResult(round=n)) for n in range(5000)]
        end = pb.WatchResponse(finished=types_pb2.JobResult(reason="quorum"))
        error = await ended(Liar(states=[*flood, end]))
        assert isinstance(error, RunFailedError)
        assert error.reason is Reason.QUORUM

    @pytest.mark.parametrize("reason", [Reason.STAGING_FULL, Reason.TOO_MANY_STREAMS])
    async def test_a_server_without_room_is_tried_again(self, reason: Reason) -> None:
        refused = pb.PushResponse(refused=pb.PushRefused(reason=reason, message="no room"))
        liar = Liar(push=[refused])
        error = await ended(liar, connect_timeout_seconds=1.5)
        assert isinstance(error, RefusedError)
        assert error.reason is reason
        assert liar.joins >= 2  # and gave up only at its limit
        assert liar.left == []


def nested(depth: int) -> str:
    """A codec within a codec within ..."""
    return "rotated:inner=(" * depth + "dqsg" + ")" * depth
