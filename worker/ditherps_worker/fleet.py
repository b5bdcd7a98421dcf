"""Many light workers in one process: every message of a real worker on a channel of its own, nothing computed.

What a light worker pushes was encoded before the run, and is pushed again in every round. The server decodes it with
the dither of that round: what differs from a real worker's is the value of the update, neither its size nor the time
that it takes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

from ditherps import codec as make_codec
from ditherps import kernels, wire
from ditherps.codecs import Role
from ditherps.config import JobConfig, WorkerConfig
from ditherps.dither import Address, Domain
from ditherps.downlink import downlink_codec
from ditherps.errors import Reason, RefusedError, RunFailedError, UnreachableError
from ditherps.layout import FlatModel
from ditherps.tasks import Task
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps.v1 import types_pb2
from ditherps_worker.client import CALL_SECONDS, Client, PushStats
from ditherps_worker.held import HeldModel

VECTOR_SEED = 5
_ROLES = {Role.SOURCE: types_pb2.ROLE_SOURCE, Role.NESTED: types_pb2.ROLE_NESTED}
_STATS = PushStats(samples=1, loss=0.0, nmse=0.0, compute_seconds=0.0, encode_seconds=0.0)

Updates: TypeAlias = Mapping[int, memoryview]
"""An encoded update for each role of a plan that the codec knows."""


class SharedModel:
    """w as all light workers hold it, built once: the first that has pulled a version brings it to all."""

    def __init__(self, held: HeldModel) -> None:
        self._held = held
        self._due: dict[int | None, bytes] = {}

    @property
    def version(self) -> int | None:
        """None: nothing is held."""
        return self._held.version

    def digest_due(self, version: int | None) -> bytes:
        """What a worker that holds `version` shows the server with its next pull."""
        return self._due.get(version, b"")

    def take(self, header: pb.PullHeader, parts: Sequence[memoryview]) -> None:
        """Go to the version that a worker has pulled, if none has before."""
        before = self.version
        if before == header.to_version:
            return
        for into, part in zip(self._held.room(header), parts, strict=True):
            into[:] = part
        self._held.take(header)
        # Others may still be on their way from the version before.
        self._due = {before: self.digest_due(before), self.version: self._held.digest_due()}


class LightWorker:
    """One member of the job, with its own channel and its own place in the rounds."""

    def __init__(self, client: Client, updates: Updates) -> None:
        """`updates`: what it pushes in every round."""
        self._client, self._updates = client, updates
        self._watched = client.watch()
        self._version: int | None = None
        self.joined = pb.JoinResponse()

    async def join(self) -> None:
        """Become a member; raises what `Client.join` does."""
        self.joined = await self._client.join(b"", CALL_SECONDS)

    async def work(self, shared: SharedModel) -> types_pb2.JobResult:
        """Take part in every round until the server says the end; the stream stays open for `leave`."""
        self._version = shared.version
        buffers = bytes(self.joined.buffer_bytes)
        done: tuple[int, int] | None = None
        beating = asyncio.create_task(self._beat(self.joined.heartbeat_seconds))
        try:
            async for state in self._watched:
                if state.HasField("finished"):
                    return state.finished
                if not state.HasField("opened") or (state.opened.round, state.opened.attempt) == done:
                    continue
                plan = state.opened
                await self._pull(shared, plan.base_version)
                if plan.role != types_pb2.ROLE_UNSPECIFIED:
                    await self._client.push(plan, self._updates[plan.role], buffers, _STATS)
                done = (plan.round, plan.attempt)
        finally:
            beating.cancel()
        raise UnreachableError("the server ended a watch before the end of the job")

    async def _pull(self, shared: SharedModel, version: int) -> None:
        if self._version == version:
            return
        parts: list[memoryview] = []

        def room(header: pb.PullHeader) -> list[memoryview]:
            sizes = (header.parameter_bytes, *(step.bytes for step in header.steps), header.buffer_bytes)
            parts.extend(memoryview(bytearray(size)) for size in sizes)
            return parts

        header = await self._client.pull(self._version, version, shared.digest_due(self._version), room)
        shared.take(header, parts)
        self._version = version

    async def _beat(self, interval_seconds: float) -> None:
        while True:
            await asyncio.sleep(interval_seconds)
            await self._client.heartbeat()

    async def leave(self) -> None:
        """Say goodbye, as a worker does at the end of the job; the server may be gone by then."""
        with contextlib.suppress(UnreachableError, RefusedError):
            await self._client.leave(Reason.FINISHED)
        await self._client.close()


class Fleet:
    """The workers of one job, all of them light."""

    def __init__(self, job: JobConfig, task: Task) -> None:
        """Encode what they will push, each with the dither of its own index in round 0."""
        self._job, self._model = job, FlatModel(task.build(job.model or None, job.seed), gradient=False)
        self._codec = make_codec(job.codec, **job.codec_options)
        kernels.warm(self._codec)
        size, generator = self._model.layout.coordinates, torch.Generator().manual_seed(VECTOR_SEED)
        vector = 1e-3 * torch.randn(size, generator=generator)
        self._updates = [self._encoded(index, vector) for index in range(job.workers)]

    def _encoded(self, index: int, vector: torch.Tensor) -> Updates:
        codec = self._codec.for_layout(self._model.layout)
        address = Address(seed=self._job.seed, round=0, sender=index, domain=Domain.UPDATE)
        return {_ROLES[role]: codec.for_role(role).encode(vector, address).data.data for role in codec.roles}

    async def run(self, address: str, at_end: Callable[[], None]) -> None:
        """Join the server at `address`, take part in every round, and leave.

        `at_end` is called when the first of them is told the end, before the server goes.
        Raises `RunFailedError` when the job does not come to its end, and what a worker raises.
        """
        meter = wire.WireMeter()
        workers = [
            LightWorker(Client(WorkerConfig(server=address, name=name, task=self._job.task), meter), updates)
            for name, updates in zip(self._job.member_table, self._updates, strict=True)
        ]
        await asyncio.gather(*(worker.join() for worker in workers))
        shared = SharedModel(self._held(workers[0].joined.initial_digest))
        working = [asyncio.create_task(worker.work(shared)) for worker in workers]
        await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
        at_end()
        results = await asyncio.gather(*working)
        await asyncio.gather(*(worker.leave() for worker in workers))
        if results[0].reason != Reason.FINISHED:
            raise RunFailedError(wire.reason_of(results[0].reason), f"the server ended the job: {results[0].reason}")

    def _held(self, initial_digest: bytes) -> HeldModel:
        job, model = self._job, self._model
        down = downlink_codec(job.downlink, self._codec)
        if down is not None:
            kernels.warm(down)
            down = down.for_layout(model.layout)
        return HeldModel(job.downlink, job.seed, down, model, initial_digest)
