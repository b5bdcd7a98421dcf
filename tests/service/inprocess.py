"""A real server in the test's own event loop, and a raw client that can also say what a worker never would."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import urllib.request
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
import torch

import ditherps
from ditherps import wire
from ditherps.codecs import codec_names
from ditherps.config import JobConfig, ServerConfig
from ditherps.dither import Address, Domain
from ditherps.errors import Reason, RunFailedError
from ditherps.security.credentials import Files, channel_credentials
from ditherps.tasks import Task
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps.v1 import types_pb2
from ditherps_server.app import serve
from ditherps_server.records import RunResult
from tests.tiny import Tiny

CALL_SECONDS = 20.0


@dataclass
class Served:
    """Where a server listens, and the task in which it runs."""

    job: JobConfig
    run_dir: Path
    address: str
    job_id: str
    metrics_port: int | None
    running: asyncio.Task[RunResult]
    closed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def reached(self, version: int) -> None:
        """Returns when the round that makes this version has been recorded."""
        async with self.closed, asyncio.timeout(CALL_SECONDS):
            await self.closed.wait_for(lambda: len(self.records()) >= version)

    async def metric(self, name: str) -> float:
        """The value of one line of /metrics (name with its labels); 0 where there is none yet."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"

        def fetch() -> str:
            with urllib.request.urlopen(url, timeout=5) as response:
                return str(response.read().decode())

        for line in (await asyncio.to_thread(fetch)).splitlines():
            if line.rpartition(" ")[0] == name:
                return float(line.rpartition(" ")[2])
        return 0.0

    def records(self) -> list[dict[str, Any]]:
        """The rounds that have closed."""
        return [json.loads(line) for line in (self.run_dir / "rounds.jsonl").read_text().splitlines()]


@contextlib.asynccontextmanager
async def serving(
    run_dir: Path, *, task: Task | None = None, metrics: bool = False, server: Mapping[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Served]:  # fmt: skip
    """Serve a job of `Tiny` on a free port, or as `server` says; what is left of it ends with the context."""
    job = JobConfig.model_validate(
        {"task": "tiny", "workers": 2, "rounds": 3, "codec": "dqsg", "batch_size": 8, **options}
    )
    ports = {"port": 0, "metrics_port": 0 if metrics else -1}
    config = ServerConfig.model_validate({"run_dir": run_dir, **ports, "threads": 1, **(server or {})})
    (run_dir / "server.json").unlink(missing_ok=True)
    closed = asyncio.Condition()

    async def notify() -> None:
        async with closed:
            closed.notify_all()

    told: set[asyncio.Task[None]] = set()

    def on_round(_: dict[str, Any]) -> None:
        told.add(asyncio.create_task(notify()))

    running = asyncio.create_task(serve(job, config, task or Tiny(), on_round))
    try:
        while not (run_dir / "server.json").exists():
            if (await asyncio.wait([running], timeout=0.01))[0]:
                running.result()
        announced = json.loads((run_dir / "server.json").read_text())
        yield Served(
            job, run_dir, announced["address"], announced["job_id"], announced["metrics_port"], running, closed
        )
    finally:
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(name)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError, RunFailedError):
            await running


@dataclass
class Refused(Exception):  # noqa: N818
    """How an RPC failed."""

    status: grpc.StatusCode
    reason: Reason | None
    message: str = field(compare=False)


async def answered(call: Any) -> Any:
    """What an RPC answers; raises `Refused`."""
    try:
        return wire.checked(await call)
    except grpc.aio.AioRpcError as error:
        raise refused(error) from None


def refused(error: grpc.aio.AioRpcError) -> Refused:
    """A failed RPC as the reason that it gives."""
    refusal = wire.refusal_of(error)
    return Refused(error.code(), refusal.reason if refusal else None, error.details() or "")


class Push:
    """One Push, message by message."""

    def __init__(self, stub: wire.Stub) -> None:
        self.call = stub.Push(timeout=CALL_SECONDS)

    async def send(self, *messages: pb.PushRequest | bytes) -> None:
        for message in messages:
            await self.call.write(message)

    async def answer(self) -> pb.PushResponse:
        """The next answer; raises `Refused` where the RPC has failed."""
        try:
            answer = await self.call.read()
        except grpc.aio.AioRpcError as error:
            raise refused(error) from None
        if answer is grpc.aio.EOF:
            trailers, code = await self.call.trailing_metadata(), await self.call.code()
            metadata = grpc.aio.Metadata()
            raise refused(grpc.aio.AioRpcError(code, metadata, trailers, details=await self.call.details()))
        assert isinstance(answer, pb.PushResponse)
        return answer

    async def end(self) -> None:
        await self.call.done_writing()


class Peer:
    """A worker's side of the wire without a worker."""

    def __init__(self, address: str, certs: Path | None = None, token: str = "") -> None:
        self.address = address
        if certs is None:
            self.channel = grpc.aio.insecure_channel(address, options=wire.CHANNEL_OPTIONS)
        else:
            credentials = channel_credentials(Files(certs))
            self.channel = grpc.aio.secure_channel(address, credentials, options=wire.CHANNEL_OPTIONS)
        self.meter = wire.WireMeter()
        self.stub = wire.Stub(self.channel, self.meter, token)
        self.joined = pb.JoinResponse()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.channel.close()

    @property
    def fence(self) -> types_pb2.Fence:
        return self.joined.fence

    async def join(self, name: str = "", **changes: Any) -> pb.JoinResponse:
        """Join, and keep the answer."""
        request = pb.JoinRequest(
            protocol_version=wire.PROTOCOL_VERSION, package_version="test", worker=name, task="tiny",
            limits=pb.WorkerLimits(modes=("gradient", "local"), codecs=codec_names(), model_bytes=1 << 30),
        )  # fmt: skip
        for key, value in changes.items():
            if key == "limits":
                request.limits.CopyFrom(value)
            else:
                setattr(request, key, value)
        self.joined = await answered(self.stub.Join(request, timeout=CALL_SECONDS))
        return self.joined

    async def status(self) -> pb.StatusResponse:
        response = await answered(self.stub.Status(pb.StatusRequest(), timeout=CALL_SECONDS))
        assert isinstance(response, pb.StatusResponse)
        return response

    async def states(self) -> list[str]:
        """The members' states, by index."""
        return [member.state for member in (await self.status()).members]

    def watch(self) -> Any:
        return self.stub.Watch(pb.WatchRequest(fence=self.fence), timeout=CALL_SECONDS)

    async def plan(self) -> types_pb2.RoundPlan:
        """The plan of the open round, as this worker gets it."""
        call = self.watch()
        try:
            while not (state := wire.checked(await call.read())).HasField("opened"):
                pass
            return types_pb2.RoundPlan.FromString(state.opened.SerializeToString())
        finally:
            call.cancel()

    async def pulled(self, version: int, held: int | None = None, digest: bytes = b"") -> tuple[pb.PullHeader, bytes]:
        """The header and the content of a pull; raises `Refused`."""
        request = pb.PullRequest(fence=self.fence, from_version=held, to_version=version, held_digest=digest)
        call = self.stub.Pull(request, timeout=CALL_SECONDS)
        content = b""
        try:
            header = wire.checked(await call.read())
            while (message := wire.checked(await call.read())) is not grpc.aio.EOF:
                content += message.data
        except grpc.aio.AioRpcError as error:
            raise refused(error) from None
        assert header.header.to_version == version
        assert wire.digest_of(content) == header.header.digest
        return header.header, content

    async def pull(self, version: int) -> bytes:
        """The content of a snapshot; raises `Refused`."""
        return (await self.pulled(version))[1]

    def update(self, plan: types_pb2.RoundPlan, seed: int = 0, codec: str = "dqsg", **options: Any) -> bytes:
        """An encoded update for the open round, as its plan wants it."""
        vector = torch.randn(self.joined.parameter_coordinates, generator=torch.Generator().manual_seed(seed))
        address = Address(1, plan.round, self.joined.index, Domain.UPDATE, plan.attempt)
        return ditherps.codec(codec, **options).encode(vector, address).to_bytes()

    def header(
        self, plan: types_pb2.RoundPlan, update: bytes, buffers: bytes | None = None, **changes: Any
    ) -> pb.PushRequest:
        """The first message of a push."""
        buffers = bytes(self.joined.buffer_bytes) if buffers is None else buffers
        header = pb.PushHeader(
            fence=self.fence, round=plan.round, attempt=plan.attempt, base_version=plan.base_version, role=plan.role,
            update_bytes=len(update), buffer_bytes=len(buffers), digest=wire.digest_of(update, buffers), samples=8,
            loss=1.0,
        )  # fmt: skip
        for key, value in changes.items():
            if isinstance(value, (types_pb2.Fence, types_pb2.ContextId)):
                getattr(header, key).CopyFrom(value)
            else:
                setattr(header, key, value)
        return pb.PushRequest(header=header)

    def pushing(self) -> Push:
        return Push(self.stub)

    async def push(
        self, header: pb.PushRequest, content: bytes | Iterable[bytes], chunk_bytes: int = 1 << 20
    ) -> pb.PushResponse:
        """A whole push; the last answer."""
        push = self.pushing()
        await push.send(header)
        answer = await push.answer()
        if answer.HasField("need"):
            parts = [content] if isinstance(content, bytes) else list(content)
            answering = asyncio.ensure_future(push.answer())
            # The server may answer before the end; then writing fails, and the answer says why.
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await push.send(*wire.chunk_messages(pb.PushRequest, parts, chunk_bytes, answer.need.offset))
                await push.end()
            answer = await answering
        return answer
