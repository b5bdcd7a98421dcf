"""A worker's side of the wire: one channel to the server, every call bounded, every refusal typed."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from ditherps import __version__, wire
from ditherps.config import WorkerConfig
from ditherps.errors import PayloadError, Reason, RefusedError, UnreachableError
from ditherps.text import one_line
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps.v1 import types_pb2
from ditherps_worker.connection import Connection
from ditherps_worker.limits import stated

CALL_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class PushStats:
    """What a contribution's header says beside its content."""

    samples: int
    loss: float
    nmse: float
    compute_seconds: float
    encode_seconds: float
    sample_bytes: int = 0
    """Mode `data`: of the update, its selection and samples."""


class Client:
    """The service, as a worker calls it. Methods raise `RefusedError`, `UnreachableError`, and `PayloadError`
    for messages that are not what they claim to be.
    """

    def __init__(self, config: WorkerConfig, meter: wire.WireMeter) -> None:
        self._config = config
        self._connection = Connection(config, meter)
        self._joined = pb.JoinResponse()

    @property
    def _stub(self) -> wire.Stub:
        return self._connection.stub

    @property
    def fence(self) -> types_pb2.Fence:
        """What stands in every message after Join."""
        return self._joined.fence

    async def close(self) -> None:
        """Close the channel."""
        await self._connection.close()

    async def join(self, lease_key: bytes, limit_seconds: float) -> pb.JoinResponse:
        """Join; waits for a server that is not there yet, at most `limit_seconds`.

        Raises `HandshakeError` as soon as it is certain that no connection will come about.
        """
        await self._connection.renew()
        request = pb.JoinRequest(
            protocol_version=wire.PROTOCOL_VERSION,
            package_version=__version__,
            worker=self._config.name,
            lease_key=lease_key,
            task=self._config.task,
            limits=stated(self._config),
        )
        joining = self._call(self._stub.Join(request, timeout=limit_seconds, wait_for_ready=True))
        self._joined = await self._connection.explained(joining)
        return self._joined

    async def watch(self) -> AsyncIterator[pb.WatchResponse]:
        """The server's present state, then its changes."""
        call = self._stub.Watch(pb.WatchRequest(fence=self.fence))
        try:
            async for response in call:
                yield wire.checked(response)
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None
        finally:
            call.cancel()

    async def pull(
        self, held: int | None, version: int, held_digest: bytes, room: Callable[[pb.PullHeader], list[memoryview]]
    ) -> pb.PullHeader:
        """Read what brings w from version `held` (None: nothing) to `version`.

        `room` makes room for what a header announces, and raises `PayloadError` where that cannot be right.
        `held_digest`: of what is held, empty where its check is not due. Raises `PayloadError` when what comes is not
        what was announced.
        """
        call = self._stub.Pull(
            pb.PullRequest(fence=self.fence, from_version=held, to_version=version, held_digest=held_digest)
        )
        try:
            async with asyncio.timeout(None) as deadline:
                self._give_time(deadline)
                first = wire.checked(await call.read())
                if first is grpc.aio.EOF:
                    raise self._error(await self._failure(call))
                if not isinstance(first, pb.PullResponse) or not first.HasField("header"):
                    raise PayloadError("a pull begins with its header")
                header = first.header
                if header.to_version != version:
                    raise PayloadError(f"asked for version {version}, offered version {header.to_version}")
                parts = room(header)
                await self._receive(call, deadline, parts)
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None
        except TimeoutError:
            raise self._silent() from None
        finally:
            call.cancel()
        if wire.digest_of(*parts) != header.digest:
            raise PayloadError("the model does not have the announced digest", Reason.DIGEST_MISMATCH)
        return header

    async def _receive(self, call: Any, deadline: asyncio.Timeout, parts: list[memoryview]) -> None:
        at, offset = 0, 0
        while (message := wire.checked(await call.read())) is not grpc.aio.EOF:
            self._give_time(deadline)
            if not isinstance(message, wire.Chunk):
                raise PayloadError("after its header a pull holds chunks only")
            data = message.data
            while len(data):
                while at < len(parts) and offset == len(parts[at]):
                    at, offset = at + 1, 0
                if at == len(parts):
                    raise PayloadError("a pull holds more than it announced", Reason.SIZE)
                count = min(len(data), len(parts[at]) - offset)
                parts[at][offset : offset + count] = data[:count]
                data, offset = data[count:], offset + count

    def _give_time(self, deadline: asyncio.Timeout) -> None:
        """Progress: the wait begins anew."""
        deadline.reschedule(asyncio.get_running_loop().time() + self._joined.idle_timeout_seconds)

    async def push(
        self, plan: types_pb2.RoundPlan, update: bytes | memoryview, buffers: bytes, stats: PushStats
    ) -> bool:
        """Send a contribution, from where the server says; True when it counts, False when its round has gone on.

        Raises `RefusedError` when the server does not take it for another reason.
        """
        parts = (update, buffers)
        header = pb.PushHeader(
            fence=self.fence, round=plan.round, attempt=plan.attempt, base_version=plan.base_version, role=plan.role,
            context=plan.context if plan.HasField("context") else None,
            update_bytes=len(update), buffer_bytes=len(buffers), digest=wire.digest_of(*parts), samples=stats.samples,
            loss=None if math.isnan(stats.loss) else stats.loss,
            nmse=None if math.isnan(stats.nmse) else stats.nmse, compute_seconds=stats.compute_seconds,
            encode_seconds=stats.encode_seconds, sample_bytes=stats.sample_bytes,
        )  # fmt: skip
        call = self._stub.Push()
        try:
            async with asyncio.timeout(None) as deadline:
                self._give_time(deadline)
                await call.write(pb.PushRequest(header=header))
                answer = await self._answer(call)
                if answer.HasField("need"):
                    answer = await self._send(call, deadline, parts, answer.need.offset)
                await call.done_writing()
                await call.code()
        except asyncio.InvalidStateError:
            raise self._error(await self._failure(call)) from None
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None
        except TimeoutError:
            raise self._silent() from None
        finally:
            call.cancel()
        if answer.HasField("refused"):
            reason = wire.reason_of(answer.refused.reason)
            if reason in (Reason.LATE, Reason.WRONG_ROUND):
                return False
            raise RefusedError(reason, one_line(answer.refused.message))
        if not answer.HasField("accepted"):
            raise PayloadError("a push was answered neither with accepted nor with refused")
        return True

    async def _send(
        self, call: Any, deadline: asyncio.Timeout, parts: Sequence[bytes | memoryview], offset: int
    ) -> pb.PushResponse:
        """Send the content from `offset` until the server answers, which it may do before the end."""
        answering = asyncio.ensure_future(self._answer(call))
        try:
            # Writing fails once the server has said its last word; that answer, or the call's status, tells why.
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                for message in wire.chunk_messages(pb.PushRequest, parts, self._joined.chunk_bytes, offset):
                    if answering.done():
                        break
                    self._give_time(deadline)
                    await call.write(message)
            self._give_time(deadline)
            return await answering
        finally:
            answering.cancel()

    async def _answer(self, call: Any) -> pb.PushResponse:
        answer = wire.checked(await call.read())
        if not isinstance(answer, pb.PushResponse):
            raise self._error(await self._failure(call))
        return answer

    async def report(self, evaluation: pb.Evaluation) -> None:
        """Send an evaluation."""
        await self._call(
            self._stub.Report(pb.ReportRequest(fence=self.fence, evaluation=evaluation), timeout=CALL_SECONDS)
        )

    async def has_samples(self, shard: bytes) -> None:
        """Say which samples this worker has."""
        await self._call(self._stub.Report(pb.ReportRequest(fence=self.fence, shard=shard), timeout=CALL_SECONDS))

    async def heartbeat(self) -> None:
        """Give a sign of life."""
        await self._call(self._stub.Heartbeat(pb.HeartbeatRequest(fence=self.fence), timeout=CALL_SECONDS))

    async def leave(self, reason: Reason) -> None:
        """Say that this worker goes."""
        await self._call(self._stub.Leave(pb.LeaveRequest(fence=self.fence, reason=reason.value), timeout=2.0))

    async def _call(self, call: Any) -> Any:
        try:
            return wire.checked(await call)
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None

    async def _failure(self, call: Any) -> grpc.aio.AioRpcError:
        return grpc.aio.AioRpcError(
            await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
        )

    def _error(self, error: grpc.aio.AioRpcError) -> RefusedError | UnreachableError:
        refusal = wire.refusal_of(error)
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            self._connection.doubt()
        return refusal or UnreachableError(
            f"server {self._config.server}: {error.code().name}: {one_line(error.details() or '')}"
        )

    def _silent(self) -> UnreachableError:
        self._connection.doubt()
        limit = self._joined.idle_timeout_seconds
        return UnreachableError(f"server {self._config.server} has been silent for {limit:g} s")
