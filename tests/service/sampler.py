"""A raw client of a job in mode `data`, which knows what a worker would send, and can say something else."""

from __future__ import annotations

from typing import Any

import torch

from ditherps.codecs import codec_names
from ditherps.samples.mode import update_codec
from ditherps.tasks import Task
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps.v1 import types_pb2
from ditherps_worker.compute import Computer
from ditherps_worker.sampled import SampledUpdate, SampleSender
from tests.service.inprocess import CALL_SECONDS, Peer, Served, answered
from tests.tiny import Tiny

LIMITS = pb.WorkerLimits(
    modes=("gradient", "local", "data"), codecs=codec_names(), model_bytes=1 << 30, data_level=15
)  # fmt: skip


class Sampler(Peer):
    """A peer that lets the server see its samples; its model is that of version 0."""

    computer: Computer
    sender: SampleSender

    async def enter(self, served: Served, name: str, task: Task | None = None) -> None:
        """Join, without saying which samples it has."""
        job, used = served.job, task or Tiny()
        await self.join(name, limits=LIMITS, task=job.task)
        self.computer = Computer(job, self.joined.index, used, None, torch.device("cpu"))
        refinement = update_codec(job).for_layout(self.computer.model.layout) if job.data.refine else None
        self.sender = SampleSender(job, self.joined.index, self.computer, refinement)

    async def ready(self, served: Served, name: str, task: Task | None = None) -> None:
        """Join, and say which samples it has."""
        await self.enter(served, name, task)
        await self.states_shard(self.sender.shard)

    async def changes_shard(self, shard: bytes) -> None:
        """Join again, with other samples: a session says only once which it has; raises `Refused`."""
        await self.join(f"worker-{self.joined.index}", limits=LIMITS)
        await self.states_shard(shard)

    async def states_shard(self, shard: bytes) -> None:
        """Say which samples it has; raises `Refused`."""
        request = pb.ReportRequest(fence=self.fence, shard=shard)
        await answered(self.stub.Report(request, timeout=CALL_SECONDS))

    def sampled(self, plan: types_pb2.RoundPlan, need: bytes | None = None) -> SampledUpdate:
        """What a worker sends."""
        return self.sender.update(plan.round, plan.attempt, plan.need if need is None else need)

    def announced(self, plan: types_pb2.RoundPlan, update: bytes, sample_bytes: int, **changes: Any) -> pb.PushRequest:
        """The first message of a push."""
        return self.header(plan, update, b"", **{"sample_bytes": sample_bytes, **changes})

    async def sends(self, plan: types_pb2.RoundPlan, update: bytes, sample_bytes: int, **changes: Any) -> str:
        """The reason for which a push is refused; nothing where it is accepted."""
        answer = await self.push(self.announced(plan, update, sample_bytes, **changes), update)
        assert answer.HasField("accepted") or answer.HasField("refused")
        return answer.refused.reason

    async def sends_well(self, plan: types_pb2.RoundPlan) -> None:
        """Push what a worker would."""
        good = self.sampled(plan)
        assert await self.sends(plan, good.update, good.sample_bytes) == ""
