"""The gRPC servicer: parses, authorises, hands on; decides nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from ditherps import __version__, wire
from ditherps.config import JobConfig, LimitsConfig
from ditherps.errors import PayloadError, Reason, RefusedError
from ditherps.samples.mode import update_codec
from ditherps.text import one_line
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps.v1 import types_pb2
from ditherps_server.admission import Admission, Slots
from ditherps_server.coordinator import Coordinator
from ditherps_server.evaluation import Evaluation
from ditherps_server.gate import Gate
from ditherps_server.staging import Contribution

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class ParameterServerService:
    """Methods as `proto/ditherps/v1/parameter_server.proto` documents them."""

    def __init__(
        self, coordinator: Coordinator, gate: Gate, limits: LimitsConfig, job_id: str, heartbeat_seconds: float
    ) -> None:
        self._coordinator, self._gate = coordinator, gate
        self._admission = Admission(limits, coordinator.job.member_table)
        self._unannounced = Slots("pushes without a header", limits.worker_streams)
        self._pushes = Slots("pushes", limits.worker_streams)
        self._pulls = Slots("pulls", limits.worker_pulls)
        self._watches = Slots("watches", limits.worker_streams)
        self._job_id = job_id
        self._heartbeat_seconds = heartbeat_seconds
        self._started = time.monotonic()

    def _seen(self, fence: types_pb2.Fence, context: Context) -> int:
        """The index of the worker that a message comes from; raises `RefusedError` unless it is the worker's own."""
        members, identity = self._coordinator.members, self._gate.identity(context)
        self._gate.check(identity, members.names[members.check(fence).index])
        return self._coordinator.seen(fence)

    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinResponse:  # noqa: N802
        """Check the rules of compatibility, then let the worker in."""
        coordinator, job = self._coordinator, self._coordinator.job
        codecs = {update_codec(job).name, coordinator.broadcast.codec_name}
        identity = self._gate.identity(context)
        self._admission.join(request.worker if identity is None else identity)
        name = self._gate.name(identity, request.worker)
        level = job.data.level if job.mode == "data" else 0
        check_join(request, job.task, job.mode, level, codecs, 4 * coordinator.model.layout.coordinates)
        session = await coordinator.join(name, request.lease_key, declared_samples(request.samples, job))
        layout = coordinator.model.layout
        return pb.JoinResponse(
            fence=coordinator.members.fence(session),
            index=session.index,
            job=json.dumps(job.model_dump(mode="json"), separators=(",", ":")).encode(),
            layout_digest=layout.digest,
            parameter_coordinates=layout.coordinates,
            buffer_bytes=layout.buffer_bytes,
            chunk_bytes=wire.CHUNK_BYTES,
            heartbeat_seconds=self._heartbeat_seconds,
            idle_timeout_seconds=job.idle_timeout_seconds,
            initial_digest=coordinator.saver.initial_digest,
        )

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchResponse]:  # noqa: N802
        """The present state, then its changes."""
        index = self._seen(request.fence, context)
        with self._watches.hold(index):
            stream = self._coordinator.watch(index)
            try:
                async for response in stream:
                    self._gate.identity(context)  # a token may have been revoked since
                    yield response
            finally:
                self._coordinator.unwatch(index, stream)

    async def Pull(self, request: pb.PullRequest, context: Context) -> AsyncIterator[bytes]:  # noqa: N802
        """What brings the worker to the present model."""
        index = self._seen(request.fence, context)
        held = request.from_version if request.HasField("from_version") else None
        with self._pulls.hold(index):
            answer = self._coordinator.pull(index, held, request.to_version, request.held_digest)
            for message in answer.messages:
                yield message
        self._coordinator.pulled(answer)

    async def Push(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[pb.PushResponse]:  # noqa: N802
        """Take one contribution."""
        identity = self._gate.identity(context) or ""  # a stranger gets no further
        with self._unannounced.hold(identity, self._admission.members_of(identity)):
            first = wire.checked(await self._next(requests))
        if not isinstance(first, pb.PushRequest) or not first.HasField("header"):
            raise PayloadError("a push begins with its header")
        index = self._seen(first.header.fence, context)
        with self._pushes.hold(index):
            async for answer in self._take(index, first.header, requests):
                yield answer

    async def _take(
        self, index: int, header: pb.PushHeader, requests: AsyncIterator[Any]
    ) -> AsyncIterator[pb.PushResponse]:
        try:
            contribution = self._coordinator.admit(index, header)
            if contribution.whole:
                yield pb.PushResponse(accepted=pb.PushAccepted(duplicate=True))
                return
            stream = contribution.stream  # ours, until another Push of the same content is admitted
            yield pb.PushResponse(need=pb.PushNeed(offset=contribution.receiver.received_bytes))
            await self._receive(contribution, stream, requests, header)
            counted = await self._coordinator.deliver(contribution)
        except (RefusedError, PayloadError) as error:
            self._coordinator.refused_update(error.reason, index, str(error))
            yield pb.PushResponse(refused=pb.PushRefused(reason=error.reason.value, message=one_line(str(error))))
            return
        yield pb.PushResponse(accepted=pb.PushAccepted(duplicate=not counted))

    async def _receive(
        self, contribution: Contribution, stream: object, requests: AsyncIterator[Any], header: pb.PushHeader
    ) -> None:
        while not contribution.receiver.complete:
            message = wire.checked(await self._next(requests))
            if not isinstance(message, wire.Chunk):
                raise PayloadError("after its header a push holds chunks only")
            contribution.take(stream, message.data)
            del message  # else every stream holds a chunk while it waits for the next
            self._coordinator.seen(header.fence)

    async def _next(self, requests: AsyncIterator[Any]) -> Any:
        limit = self._coordinator.job.idle_timeout_seconds
        try:
            async with asyncio.timeout(limit):
                return await anext(requests)
        except StopAsyncIteration:
            raise PayloadError("the push ended before its content was whole", Reason.SIZE) from None
        except TimeoutError:
            raise RefusedError(Reason.IDLE_TIMEOUT, f"nothing came for {limit:g} s") from None

    async def Report(self, request: pb.ReportRequest, context: Context) -> pb.ReportResponse:  # noqa: N802
        """Take an evaluation."""
        index = self._seen(request.fence, context)
        if request.shard:
            await self._coordinator.has_samples(request.fence, request.shard)
        if request.HasField("evaluation"):
            e = request.evaluation
            self._coordinator.evaluated(index, Evaluation(e.version, e.loss, e.accuracy, e.samples, e.seconds))
        return pb.ReportResponse()

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Context) -> pb.HeartbeatResponse:  # noqa: N802
        """Note a sign of life."""
        self._seen(request.fence, context)
        return pb.HeartbeatResponse()

    async def Leave(self, request: pb.LeaveRequest, context: Context) -> pb.LeaveResponse:  # noqa: N802
        """Note that a worker goes."""
        reason = wire.reason_of(request.reason) if request.reason else Reason.LEFT
        self._coordinator.leave(self._seen(request.fence, context), reason)
        return pb.LeaveResponse()

    async def Status(self, _: pb.StatusRequest, context: Context) -> pb.StatusResponse:  # noqa: N802
        """What the server does and waits for."""
        self._gate.identity(context)
        response = self._coordinator.status()
        response.job_id = self._job_id
        response.uptime_seconds = time.monotonic() - self._started
        return response


def declared_samples(asked: int, job: JobConfig) -> int:
    """The samples behind each contribution of a worker that declares `asked`, 0 being the job's own batches.

    Raises `RefusedError` (`weight`) for more than the job allows.
    """
    if asked > job.weight_limit:
        raise RefusedError(
            Reason.WEIGHT,
            f"{asked} samples in a contribution; at most {job.weight_limit} count (max_weight of the job)",
        )
    return asked or job.batch_samples


def check_join(request: pb.JoinRequest, task: str, mode: str, level: int, codecs: set[str], model_bytes: int) -> None:
    """The rules of compatibility between a worker and a job; raises `RefusedError` with the first that fails."""
    limits = request.limits
    rules: list[tuple[bool, Reason, str]] = [
        (
            request.protocol_version == wire.PROTOCOL_VERSION,
            Reason.PROTOCOL_VERSION,
            f"the server speaks protocol {wire.PROTOCOL_VERSION} (ditherps {__version__}), the worker "
            f"{request.protocol_version} (ditherps {request.package_version[:40]!r}): install the same version",
        ),
        (
            request.task in ("", task),
            Reason.TASK_MISMATCH,
            f"the job's task is {task!r}, the worker's {request.task[:80]!r}",
        ),
        (
            mode != "data" or "data" in limits.modes,
            Reason.DATA_NOT_ALLOWED,
            "the job's mode is data: this server would see the worker's samples and labels, quantized; say "
            "--allow-data there to let it",
        ),
        (
            level <= limits.data_level,
            Reason.DATA_NOT_ALLOWED,
            f"samples at level {level} are asked for; the worker allows {limits.data_level}",
        ),
        (mode in limits.modes, Reason.LIMITS, f"the worker does not take mode {mode!r}"),
        *(
            (codec in limits.codecs, Reason.LIMITS, f"the worker does not know codec {codec!r}")
            for codec in sorted(codecs)
        ),
        (
            model_bytes <= limits.model_bytes,
            Reason.LIMITS,
            f"the model takes {model_bytes} bytes, the worker allows {limits.model_bytes}",
        ),
    ]
    for holds, reason, message in rules:
        if not holds:
            raise RefusedError(reason, message)
