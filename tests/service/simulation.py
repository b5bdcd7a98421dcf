"""A job in one loop, without server, workers or network: what its run is a function of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import ditherps
from ditherps.codecs import Role
from ditherps.config import JobConfig
from ditherps.dither import Address, Domain
from ditherps.downlink import downlink_codec
from ditherps.feedback import ErrorFeedback
from ditherps.tasks import Task
from ditherps_server.aggregate import Sender, aggregate, merged_buffers
from ditherps_server.broadcast import Broadcast
from ditherps_server.model import ServerModel
from ditherps_server.optimizer import ServerOptimizer
from ditherps_server.rounds import assign_roles
from ditherps_worker.compute import Computer


@dataclass(frozen=True, slots=True)
class Taken:
    """Who took part in a round, in the attempt that closed it."""

    members: Collection[int]
    """Whose contributions entered."""
    invited: tuple[int, ...]
    """On whom the roles depend, ascending."""
    attempt: int = 0

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Taken:
        """As a record of `rounds.jsonl` says it: who was invited is either in, or named as absent."""
        absent = [int(index) for index in record["absent"]]
        return cls(record["workers"], tuple(sorted([*record["workers"], *absent])), record["attempt"])


Participation = Sequence[Taken | Collection[int]]
"""Round by round; indices alone: the members, where all workers were invited."""


def simulated(job: JobConfig, task: Task, members: Participation = ()) -> str:
    """The SHA-256 of the job's model, as `simulated_model`."""
    return simulated_model(job, task, members).sha256


def simulated_model(
    job: JobConfig,
    task: Task,
    members: Participation = (),
    tamper: Callable[[int, torch.Tensor], torch.Tensor] = lambda _, vector: vector,
) -> ServerModel:
    """The job's model. Set torch as a worker does (`make_deterministic`) before.

    `members`: the workers whose contributions entered; default all of them in each round.
    `tamper(index, vector)`: what a worker encodes in place of its update.
    """
    model = ServerModel(task.build(job.model or None, job.seed))
    codec = ditherps.codec(job.codec, **job.codec_options).for_layout(model.layout)
    computers = [Computer(job, index, task, None, torch.device("cpu")) for index in range(job.workers)]
    fraction = getattr(codec.options, "side_fraction", 1.0) if Role.NESTED in codec.roles else 1.0
    everybody = tuple(range(job.workers))
    optimizer = ServerOptimizer(model.x, job.optimizer, job.schedule, job.rounds)
    down = downlink_codec(job.downlink, codec)
    broadcast = Broadcast(job.downlink, job.seed, model, down and down.for_layout(model.layout))
    update = torch.empty_like(model.x)
    feedback = [ErrorFeedback(codec, model.x.numel()) for _ in computers] if job.error_feedback else []
    for round_ in range(job.rounds):
        senders, buffers, weights = [], [], []
        taken = members[round_] if members else everybody
        if not isinstance(taken, Taken):
            taken = Taken(taken, everybody)
        roles = assign_roles(taken.invited, fraction)
        for index, computer in enumerate(computers):
            if index not in taken.members:
                continue
            with torch.no_grad():
                computer.model.flat.copy_(model.w)
            computer.model.load_buffers(model.buffers)
            mine = computer.update(round_)
            address = Address(job.seed, round_, index, Domain.UPDATE, taken.attempt)
            used = codec.for_role(roles[index])
            encoded = (feedback[index] if feedback else used).encode(tamper(index, mine.vector), address)
            senders.append(Sender(roles[index], used, encoded, address, float(mine.samples)))
            buffers.append(memoryview(mine.buffers))
            weights.append(float(mine.samples))
        running = getattr(codec.options, "side", "") == "running"
        _, chosen = aggregate(senders, update, job.aggregation, running_side=running)
        for sender in senders if feedback else ():
            feedback[sender.address.sender].commit(included=True)
        optimizer.apply(update)
        broadcast.step(update)
        model.advance(merged_buffers(model.layout, buffers, weights, job.aggregation, chosen))
    return model
