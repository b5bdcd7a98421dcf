"""Mode `data`: the server computes the gradient of each worker's batch at the samples as it holds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from ditherps.gradient import backward, seed_torch
from ditherps.layout import FlatModel
from ditherps.tasks import Keys, Task
from ditherps_server.model import ServerModel


class Batch(NamedTuple):
    """One worker's samples of a round; what is not its address as `ditherps.gradient.backward` takes it."""

    round: int
    worker: int
    features: Tensor
    labels: Tensor
    keys: Keys | None
    weights: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Computed:
    """Of one worker's batch: `gradient` (float32, flat, CPU, overwritten by the next), buffers after it, and loss."""

    gradient: Tensor
    buffers: bytes
    loss: float


class Trainer:
    """A copy of the model w that workers hold, and what they would compute with it.

    Every batch begins with the round's own buffers, and is a batch of its own for batch norm; dropout draws what the
    worker draws. So the same samples give the same bits as at a worker with the same kind of device. Set torch as a
    worker does (`ditherps.gradient.make_deterministic`) before.
    """

    def __init__(self, task: Task, name: str | None, seed: int, device: torch.device) -> None:
        """For a model of the task (None: its default) in the job with this seed."""
        self._task, self._name, self._seed = task, name, seed
        self._model = FlatModel(task.build(name, seed), device)
        self._buffers = self._model.buffers()
        self._out = torch.empty(self._model.layout.coordinates)

    def take(self, model: ServerModel) -> None:
        """Begin a round at the server's w."""
        with torch.no_grad():
            self._model.flat.copy_(model.w)
        self._buffers = model.buffers

    def compute(self, batch: Batch, *, seeded: bool = True) -> Computed:
        """The gradient at one batch, whichever came before; unless `seeded`, of a model that draws nothing."""
        self._model.load_buffers(self._buffers)
        self._model.module.train()
        if seeded:
            seed_torch(self._seed, batch.round, batch.worker)
        features, labels, keys, weights = batch[2:]
        loss = backward(self._task, self._name, self._model, features, labels, keys, weights)
        self._out.copy_(self._model.gradient)
        return Computed(self._out, self._model.buffers(), float(loss))


class Trainers:
    """Computes the batches of a round, several at once on a CPU, to the bits of one after the other.

    All threads share torch's generator. Only a model that draws nothing from it can be computed in several of them, and
    the generator's state afterwards tells: if it has moved, the batches are computed again, one by one, and so are all
    that follow.
    """

    def __init__(
        self, task: Task, name: str | None, seed: int, device: torch.device, pool: Executor | None = None, most: int = 1
    ) -> None:
        """As `Trainer`; `most` batches at once in the threads of `pool`, each with a copy of the model of its own."""
        self._arguments = (task, name, seed, device)
        self._pool = pool
        self._most = most if pool is not None and device.type == "cpu" else 1
        self._trainers = [Trainer(*self._arguments)]

    def compute(self, model: ServerModel, batches: Iterable[Batch]) -> Iterator[Computed]:
        """The gradients of a round at the server's w, in this order; each holds until the next is asked for."""
        rest = iter(batches)
        taken = 0
        while group := list(islice(rest, self._most)):
            while len(self._trainers) < len(group):
                self._trainers.append(Trainer(*self._arguments))
            for trainer in self._trainers[taken : len(group)]:
                trainer.take(model)
            taken = max(taken, len(group))
            found = self._at_once(group) if len(group) > 1 else None
            yield from found or map(self._trainers[0].compute, group)

    def _at_once(self, group: Sequence[Batch]) -> list[Computed] | None:
        """None where the model turns out to draw random numbers."""
        assert self._pool is not None
        threads, before = torch.get_num_threads(), torch.get_rng_state()

        def compute(trainer: Trainer, batch: Batch) -> Computed:
            torch.set_num_threads(threads)  # each thread has a number of its own
            return trainer.compute(batch, seeded=False)

        found = list(self._pool.map(compute, self._trainers, group))
        if torch.equal(before, torch.get_rng_state()):
            return found
        self._most = 1
        del self._trainers[1:]
        return None
