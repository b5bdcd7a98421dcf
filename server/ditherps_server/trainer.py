"""Mode `data`: the server computes the gradient of each worker's batch at the samples as it holds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditherps.gradient import backward, seed_torch
from ditherps.layout import FlatModel
from ditherps.tasks import Keys, Task
from ditherps_server.model import ServerModel


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

    def compute(
        self,
        round_: int,
        worker: int,
        features: Tensor,
        labels: Tensor,
        keys: Keys | None,
        weights: Tensor | None = None,
    ) -> Computed:
        """The gradient at one batch, whichever came before; arguments as `ditherps.gradient.backward`."""
        self._model.load_buffers(self._buffers)
        self._model.module.train()
        seed_torch(self._seed, round_, worker)
        loss = backward(self._task, self._name, self._model, features, labels, keys, weights)
        self._out.copy_(self._model.gradient)
        return Computed(self._out, self._model.buffers(), float(loss))
