"""What a worker computes in a round: a gradient, or the difference that several local steps make.

The result is a function of the job, the model, the data, the worker's index and the round alone: batches are slices of
addressed permutations, torch's seed is addressed, algorithms are deterministic, and a local optimizer starts afresh
each round.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim import SGD

from ditherps.config import JobConfig
from ditherps.gradient import backward, seed_torch
from ditherps.layout import FlatModel
from ditherps.sampling import Evaluation, Ids, Walk, augmentation_keys, evaluate, split
from ditherps.tasks import Keys, Samples, Task


@dataclass(frozen=True, slots=True)
class Update:
    """What the server's optimizer is to step along, and what stands behind it.

    `vector`: float32, flat, on the worker's device; overwritten by the next round.
    """

    vector: torch.Tensor
    buffers: bytes
    samples: int
    loss: float
    seconds: float


class Computer:
    """A worker's model, its share of the data, and its walk through it.

    Attributes:
        task, name: what is trained, and the task's name of the model.
        model: w.
        samples: of all workers; the worker takes those of its `shard`, ascending ids.
    """

    def __init__(self, job: JobConfig, index: int, task: Task, data_dir: Path | None, device: torch.device) -> None:
        """Load the data and build the model.

        Raises `UserError` (`DataMissingError`) when the data is not there, or cannot be split as the job says.
        """
        self._job, self._index, self._data_dir = job, index, data_dir
        self.task, self.name = task, job.model or None
        self.model = FlatModel(task.build(self.name, job.seed), device)
        self.samples = task.load(data_dir, train=True)
        self.shard = split(self.samples, job.workers, job.seed, job.split.kind, job.split.alpha)[index]
        self._walk = Walk(self.shard, job.seed, index)
        self._test: Samples | None = None
        self._base = torch.empty_like(self.model.flat) if job.mode == "local" else None

    def update(self, round_: int) -> Update:
        """The update of round `round_` at the w that `self.model` holds, bit for bit also after it; buffers move on."""
        began = time.perf_counter()
        seed_torch(self._job.seed, round_, self._index)
        self.model.module.train()
        losses = self._local(round_) if self._job.mode == "local" else self._gradient(round_)
        loss = float(sum(losses)) / len(losses)
        samples = self._job.batch_size * len(losses)
        return Update(self.model.gradient, self.model.buffers(), samples, loss, time.perf_counter() - began)

    def _gradient(self, round_: int) -> list[torch.Tensor]:
        """Leave the gradient of the round's batch in `self.model.gradient`; its loss."""
        return [self._backward(*self._walk.take(round_ * self._job.batch_size, self._job.batch_size))]

    def _local(self, round_: int) -> list[torch.Tensor]:
        """Leave w_before - w_after of the round's local steps in `self.model.gradient`; their losses."""
        assert self._base is not None
        self._base.copy_(self.model.flat)
        weights = torch.nn.Parameter(self.model.flat)
        weights.grad = self.model.gradient
        local = self._job.local
        optimizer = SGD([weights], lr=local.lr, momentum=local.momentum)
        losses = []
        for step in range(local.steps):
            first = (round_ * local.steps + step) * self._job.batch_size
            losses.append(self._backward(*self._walk.take(first, self._job.batch_size)))
            if local.proximal_mu:
                # FedProx (Li et al., arXiv 1812.06127): the gradient of mu/2 ||w - w_round||^2.
                self.model.gradient.add_(self.model.flat - self._base, alpha=local.proximal_mu)
            optimizer.step()
        # A step of the server along w_before - w_after with learning rate 1 is the mean of the local models (FedAvg).
        torch.sub(self._base, self.model.flat, out=self.model.gradient)
        self.model.flat.copy_(self._base)  # the next round's step is one of this w
        return losses

    def _backward(self, ids: Ids, epochs: Ids) -> torch.Tensor:
        rows = torch.from_numpy(ids)
        keys = augmentation_keys(self._job.seed, epochs, ids)
        return backward(
            self.task, self.name, self.model, self.samples.features[rows], self.samples.labels[rows], keys
        )  # fmt: skip

    def batch(self, round_: int) -> tuple[Ids, Keys]:
        """Ids of a round's samples, and the keys that augment them."""
        ids, epochs = self._walk.take(round_ * self._job.batch_size, self._job.batch_size)
        return ids, augmentation_keys(self._job.seed, epochs, ids)

    def gradient_at(
        self, round_: int, features: torch.Tensor, labels: torch.Tensor, keys: Keys, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Leave the gradient at a batch of round `round_` in `self.model.gradient`; its loss; buffers move on.

        Arguments as `ditherps.gradient.backward`.
        """
        seed_torch(self._job.seed, round_, self._index)
        self.model.module.train()
        return backward(self.task, self.name, self.model, features, labels, keys, weights)

    def evaluate(self) -> tuple[Evaluation, int]:
        """Loss and accuracy of the model that `self.model` holds, and how many test samples stand behind them."""
        if self._test is None:
            self._test = self.task.load(self._data_dir, train=False)
        result = evaluate(self.task, self.name, self.model.module, self._test, self.model.device)
        return result, len(self._test)
