"""A job in one loop, without server, workers or network: what its run is a function of."""

from __future__ import annotations

import torch

import ditherps
from ditherps.codecs import Role
from ditherps.config import JobConfig
from ditherps.dither import Address, Domain
from ditherps.tasks import Task
from ditherps_server.aggregate import Sender, mean_buffers, weighted_mean
from ditherps_server.model import ServerModel
from ditherps_server.optimizer import ServerOptimizer
from ditherps_server.rounds import assign_roles
from ditherps_worker.compute import Computer


def simulated(job: JobConfig, task: Task) -> str:
    """The SHA-256 of the job's model. Set torch as a worker does (`make_deterministic`) before."""
    model, codec = ServerModel(task.build(job.model or None, job.seed)), ditherps.codec(job.codec, **job.codec_options)
    computers = [Computer(job, index, task, None, torch.device("cpu")) for index in range(job.workers)]
    fraction = getattr(codec.options, "side_fraction", 1.0) if Role.NESTED in codec.roles else 1.0
    roles = assign_roles(tuple(range(job.workers)), fraction)
    optimizer = ServerOptimizer(model.x, job.optimizer, job.schedule, job.rounds)
    update = torch.empty_like(model.x)
    for round_ in range(job.rounds):
        senders, buffers, weights = [], [], []
        for index, computer in enumerate(computers):
            model.copy_into(computer.model)
            mine = computer.update(round_)
            address = Address(job.seed, round_, index, Domain.UPDATE)
            used = codec.for_role(roles[index])
            senders.append(Sender(roles[index], used, used.encode(mine.vector, address), address, float(mine.samples)))
            buffers.append(memoryview(mine.buffers))
            weights.append(float(mine.samples))
        weighted_mean(senders, update, running_side=getattr(codec.options, "side", "") == "running")
        optimizer.apply(update)
        model.advance(mean_buffers(model.layout, buffers, weights))
    return model.sha256
