"""A job in one loop, without server, workers or network: what its run is a function of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ditherps.codecs import Codec, Encoded, Role
from ditherps.codecs import codec as make_codec
from ditherps.config import JobConfig
from ditherps.dither import Address, Domain
from ditherps.downlink import downlink_codec
from ditherps.feedback import ErrorFeedback
from ditherps.samples.importance import Selection, probabilities, scores
from ditherps.samples.mode import sample_codec, update_codec
from ditherps.sampling import Walk, augmentation_keys
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


Tamper = Callable[[int, torch.Tensor], torch.Tensor]


class Gathered(NamedTuple):
    """What of a round's contributions enters the model beside their update."""

    buffers: Sequence[bytes]
    weights: Sequence[float]
    chosen: Sequence[int]


class _Gather(Protocol):
    def gather(self, round_: int, taken: Taken, into: torch.Tensor) -> Gathered:
        """Leave the update of a round in `into`."""
        ...


def simulated_model(
    job: JobConfig, task: Task, members: Participation = (), tamper: Tamper = lambda _, vector: vector
) -> ServerModel:
    """The job's model. Set torch as a worker does (`make_deterministic`) before.

    `members`: the workers whose contributions entered; default all of them in each round.
    `tamper(index, vector)`: what a worker encodes in place of its update.
    """
    model = ServerModel(task.build(job.model or None, job.seed))
    codec = update_codec(job).for_layout(model.layout)
    everybody = tuple(range(job.workers))
    optimizer = ServerOptimizer(model.x, job.optimizer, job.schedule, job.rounds)
    down = downlink_codec(job.downlink, codec)
    broadcast = Broadcast(job.downlink, job.seed, model, down and down.for_layout(model.layout))
    gatherer: _Gather = (
        _Samples(job, task, model, codec) if job.mode == "data" else _Updates(job, task, model, codec, tamper)
    )
    update = torch.empty_like(model.x)
    for round_ in range(job.rounds):
        taken = members[round_] if members else everybody
        if not isinstance(taken, Taken):
            taken = Taken(taken, everybody)
        found = gatherer.gather(round_, taken, update)
        optimizer.apply(update)
        broadcast.step(update)
        model.advance(
            merged_buffers(model.layout, found.buffers, list(found.weights), job.aggregation, tuple(found.chosen))
        )
    return model


def _computers(job: JobConfig, task: Task) -> list[Computer]:
    return [Computer(job, index, task, None, torch.device("cpu")) for index in range(job.workers)]


def _hold(computer: Computer, model: ServerModel) -> None:
    """Bring a worker to the present w."""
    with torch.no_grad():
        computer.model.flat.copy_(model.w)
    computer.model.load_buffers(model.buffers)


class _Updates:
    """Contributions are encoded updates."""

    def __init__(self, job: JobConfig, task: Task, model: ServerModel, codec: Codec, tamper: Tamper) -> None:
        self._job, self._model, self._codec, self._tamper = job, model, codec, tamper
        self._computers = _computers(job, task)
        self._feedback = [ErrorFeedback(codec, model.x.numel()) for _ in self._computers] if job.error_feedback else []

    def gather(self, round_: int, taken: Taken, into: torch.Tensor) -> Gathered:
        """Leave the update of a round in `into`."""
        job, codec, feedback = self._job, self._codec, self._feedback
        senders, buffers, weights = [], [], []
        fraction = getattr(codec.options, "side_fraction", 1.0) if Role.NESTED in codec.roles else 1.0
        roles = assign_roles(taken.invited, fraction)
        for index in sorted(taken.members):
            computer = self._computers[index]
            _hold(computer, self._model)
            mine = computer.update(round_)
            address = Address(job.seed, round_, index, Domain.UPDATE, taken.attempt)
            used = codec.for_role(roles[index])
            encoded = (feedback[index] if feedback else used).encode(self._tamper(index, mine.vector), address)
            senders.append(Sender(roles[index], used, encoded, address, float(mine.samples)))
            buffers.append(mine.buffers)
            weights.append(float(mine.samples))
        running = getattr(codec.options, "side", "") == "running"
        _, chosen = aggregate(senders, into, job.aggregation, running_side=running)
        for sender in senders if feedback else ():
            feedback[sender.address.sender].commit(included=True)
        return Gathered(buffers, weights, chosen)


class _Samples:
    """Contributions are quantized samples, and where the job asks for it a refinement: every batch anew, no cache."""

    def __init__(self, job: JobConfig, task: Task, model: ServerModel, codec: Codec) -> None:
        """`codec`: of the refinement."""
        self._job, self._task, self._model, self._refinement = job, task, model, codec
        self._computers = _computers(job, task)
        self._walks = [Walk(computer.shard, job.seed, index) for index, computer in enumerate(self._computers)]

    def gather(self, round_: int, taken: Taken, into: torch.Tensor) -> Gathered:
        """Leave the update of a round in `into`."""
        job, plain = self._job, make_codec("none")
        parts = {index: self._contribution(round_, taken.attempt, index) for index in sorted(taken.members)}
        weights = [float(job.batch_size)] * len(parts)
        if job.aggregation.name in ("mean", "weighted_mean"):
            into.zero_()
            for gradient, refinement, address, _ in parts.values():
                into.add_(gradient * torch.tensor(1 / len(parts)))  # multiply, then add
                if refinement is not None:
                    self._refinement.accumulate(refinement, address, into, 1 / len(parts), (0, len(into)))
            chosen = tuple(range(len(parts)))
        else:
            senders = []
            for gradient, refinement, address, _ in parts.values():
                if refinement is not None:
                    gradient += self._refinement.decode(refinement, address)
                encoded = plain.encode(gradient, address)
                senders.append(Sender(Role.SOURCE, plain, encoded, address, float(job.batch_size)))
            _, chosen = aggregate(senders, into, job.aggregation)
        return Gathered([part.buffers for part in parts.values()], weights, chosen)

    def _contribution(self, round_: int, attempt: int, index: int) -> _Contribution:
        job, computer, codec = self._job, self._computers[index], sample_codec(self._job, self._task, index)
        _hold(computer, self._model)
        features, labels = computer.samples.features, computer.samples.labels
        ids, epochs = self._walks[index].take(round_ * job.batch_size, job.batch_size)
        keys = augmentation_keys(job.seed, epochs, ids)
        kept, weights = np.ones(len(ids), np.bool_), None
        if job.data.keep < 1:
            found = scores(self._task, computer.name, computer.model, features[ids], labels[ids], keys)
            coins = Address(job.seed, round_, index, Domain.IMPORTANCE)
            selection = Selection.toss(probabilities(found, job.data.keep), coins)
            kept, weights = selection.kept, torch.from_numpy(selection.weights).float()
        true = torch.zeros_like(self._model.x)
        if job.data.refine:
            computer.gradient_at(round_, features[ids], labels[ids], keys)
            true.copy_(computer.model.gradient)
            computer.model.load_buffers(self._model.buffers)
        sent = ids[kept]
        quantized = codec.quantized(sent, features[sent], job.data.level)
        values = codec.values(sent, quantized, job.data.level)
        computer.gradient_at(round_, values, labels[sent], keys[kept], weights)
        gradient, refinement = computer.model.gradient.clone(), None
        address = Address(job.seed, round_, index, Domain.UPDATE, attempt)
        if job.data.refine:
            refinement = self._refinement.encode(true - gradient, address)
        return _Contribution(gradient, refinement, address, computer.model.buffers())


class _Contribution(NamedTuple):
    gradient: torch.Tensor
    refinement: Encoded | None
    address: Address
    buffers: bytes
