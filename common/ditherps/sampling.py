"""Which samples a worker has, which it takes in a round, and how well a model does on samples.

Every random choice is addressed in the dither stream, so both ends know the ids of a round's samples, and what comes
out depends neither on the order of calls nor on what was called before.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import scipy.special
import torch
from numpy.typing import NDArray
from torch import nn

from ditherps.dither import SERVER, Address, Domain, permutation, uniforms, words_at
from ditherps.errors import OptionError, UserError
from ditherps.tasks.base import Keys, Samples, Task

Ids = NDArray[np.int64]
"""Sample ids: rows of `Samples`."""

SplitKind = Literal["iid", "dirichlet", "key"]
"""How a dataset is dealt to workers."""


def split(samples: Samples, workers: int, seed: int, kind: SplitKind = "iid", alpha: float = 0.5) -> list[Ids]:
    """Deal a dataset to workers; each sample goes to exactly one, and every worker gets at least one.

    Args:
        samples: the dataset.
        workers: how many shards.
        seed: the 64-bit job seed.
        kind: `iid`: shards of equal size (to one sample) of a random permutation. `dirichlet`: each class is divided
            among the workers in proportions drawn from a symmetric Dirichlet distribution (Hsu, Qi, Brown 2019).
            `key`: whole groups (all digits of a writer) go to workers, so that shards are about equally large.
        alpha: for `dirichlet`, its concentration: small is skewed, large approaches `iid` with unequal sizes.

    Returns:
        The sorted sample ids of each worker, by index.

    Raises:
        OptionError: more workers than samples (or groups), an unknown kind, alpha not a positive number, or `key` for a
            dataset without groups.
    """
    units = len(samples)
    if kind == "key" and samples.groups is not None:
        units = len(np.unique(samples.groups.numpy()))
    if not 1 <= workers <= units:
        raise OptionError("workers", workers, f"1 to {units}, the number of {'groups' if kind == 'key' else 'samples'}")
    if kind == "iid":
        owner = _iid(len(samples), workers, seed)
    elif kind == "dirichlet":
        if not (np.isfinite(alpha) and alpha > 0):
            raise OptionError("alpha", alpha, "a number above 0")
        owner = _dirichlet(samples.labels.numpy(), workers, seed, alpha)
    elif kind == "key":
        if samples.groups is None:
            raise OptionError("split", kind, "iid, dirichlet (this dataset does not say whom a sample came from)")
        owner = _by_key(samples.groups.numpy(), workers, seed)
    else:
        raise OptionError("split", kind, ["iid", "dirichlet", "key"])
    return [np.flatnonzero(owner == worker) for worker in range(workers)]


def _address(seed: int, start: int = 0) -> Address:
    return Address(seed=seed, round=0, sender=SERVER, domain=Domain.SPLIT, start=start)


def _iid(count: int, workers: int, seed: int) -> Ids:
    """The worker of each of `count` samples."""
    owner = np.empty(count, np.int64)
    for worker, ids in enumerate(np.array_split(permutation(_address(seed), count), workers)):
        owner[ids] = worker
    return owner


def _dirichlet(labels: NDArray[np.int64], workers: int, seed: int, alpha: float) -> Ids:
    """The worker of each sample; class by class in proportions of their own."""
    order = permutation(_address(seed), len(labels))
    classes = np.unique(labels)
    # The permutation used the words 0 .. n-1, of four coordinates each; the proportions use those after them.
    after = _address(seed, start=4 * len(labels))
    uniform = uniforms(after, 2 * len(classes) * workers).reshape(2, len(classes), workers)
    # Gamma(alpha) = Gamma(alpha + 1) * U**(1/alpha), in logarithms: it underflows for small alpha.
    logarithms = np.log(scipy.special.gammaincinv(alpha + 1.0, uniform[0])) + np.log(uniform[1]) / alpha
    proportions = np.exp(logarithms - logarithms.max(axis=1, keepdims=True))
    shares = np.cumsum(proportions, axis=1) / proportions.sum(axis=1, keepdims=True)
    owner = np.empty(len(labels), np.int64)
    for label, share in zip(classes, shares, strict=True):
        members = order[labels[order] == label]
        borders = np.floor(share[:-1] * len(members) + 0.5).astype(np.int64)
        for worker, ids in enumerate(np.split(members, borders)):
            owner[ids] = worker
    # Nobody is left without samples: who has most gives the one with the highest id.
    sizes = np.bincount(owner, minlength=workers)
    for poor in np.flatnonzero(sizes == 0):
        rich = sizes.argmax()
        owner[np.flatnonzero(owner == rich)[-1]] = poor
        sizes[rich] -= 1
        sizes[poor] += 1
    return owner


def _by_key(groups: NDArray[np.int64], workers: int, seed: int) -> Ids:
    """The worker of each sample; largest groups first, each to whoever has least."""
    _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    shuffled = permutation(_address(seed), len(sizes))
    owner = np.empty(len(sizes), np.int64)
    load = np.zeros(workers, np.int64)
    for group in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        owner[group] = worker = load.argmin()
        load[worker] += sizes[group]
    return owner[group_of]


class Walk:
    """A worker's endless walk through its shard: epoch after epoch, each in a random order of its own.

    Position p of the walk is in epoch p // len(shard). Any part of it can be taken at any time: the order of an epoch
    is addressed by the epoch and the worker. The last two are kept, since rounds mostly follow each other.
    """

    def __init__(self, shard: Ids, seed: int, worker: int) -> None:
        """Walk through `shard` (n,) as worker number `worker` of the job with this 64-bit seed.

        Raises:
            UserError: the shard is empty.
        """
        if len(shard) == 0:
            raise UserError(f"worker {worker} has no samples")
        self._shard = shard
        self._seed = seed
        self._worker = worker
        self._kept: dict[int, Ids] = {}

    def take(self, first: int, count: int) -> tuple[Ids, Ids]:
        """The samples at positions first .. first + count - 1.

        Returns:
            Their ids and the epochs in which each is taken, both (count,) int64.
        """
        epochs, offsets = np.divmod(np.arange(first, first + count, dtype=np.int64), len(self._shard))
        ids = np.empty(count, np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            ids[here] = self._order(epoch)[offsets[here]]
        return ids, epochs

    def _order(self, epoch: int) -> Ids:
        order = self._kept.get(epoch)
        if order is None:
            address = Address(seed=self._seed, round=epoch, sender=self._worker, domain=Domain.ORDER)
            order = self._shard[permutation(address, len(self._shard))]
            if len(self._kept) == 2:
                del self._kept[next(iter(self._kept))]
            self._kept[epoch] = order
        return order


def augmentation_keys(seed: int, epochs: Ids, ids: Ids) -> Keys:
    """The key that augments each sample: it depends on the job's seed, the epoch and the sample, not on the worker.

    Args:
        seed: the 64-bit job seed.
        epochs: (n,) epochs and
        ids: (n,) sample ids, as `Walk.take` gives them.

    Returns:
        (n,) uint64, for `Task.inputs`.
    """
    keys = np.empty(len(ids), np.uint64)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        address = Address(seed=seed, round=epoch, sender=SERVER, domain=Domain.AUGMENTATION)
        keys[here] = words_at(address, ids[here])
    return keys


class Evaluation(NamedTuple):
    """How well a model does: mean loss, and the fraction of samples that it gets right."""

    loss: float
    accuracy: float


def evaluate(
    task: Task, model: str | None, network: nn.Module, samples: Samples, device: torch.device | str, batch: int = 500
) -> Evaluation:
    """Loss and accuracy of a network, in evaluation mode and without augmentation.

    Args:
        task: whose loss and metric.
        model: name of the network's model; None is the default.
        network: on `device`; its mode is afterwards what it was before.
        samples: what to evaluate on.
        device: where to compute.
        batch: samples at a time.

    Raises:
        UserError: there are no samples.
    """
    if len(samples) == 0:
        raise UserError(f"task {task.name} has no samples to evaluate on")
    training = network.training
    network.eval()
    loss, correct = 0.0, 0
    try:
        with torch.inference_mode():
            for first in range(0, len(samples), batch):
                labels = samples.labels[first : first + batch].to(device)
                features = samples.features[first : first + batch].to(device)
                outputs = network(task.inputs(model, features, None))
                loss += float(task.loss(outputs, labels)) * len(labels)
                correct += task.correct(outputs, labels)
    finally:
        network.train(training)
    return Evaluation(loss / len(samples), correct / len(samples))
