"""The gradient of a batch, computed alike by a worker and, in mode `data`, by the server.

What comes out is a function of the model, the samples, and the address of the round's randomness alone. The masks of
dropout come from torch's generator of the device that computes, seeded by that address: equal at both ends where both
compute on the same kind of device.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from ditherps.dither import Address, Domain, words
from ditherps.errors import OptionError
from ditherps.layout import FlatModel
from ditherps.tasks import Keys, Task


def pick_device(name: str, index: int = 0) -> torch.device:
    """`auto`: one of this machine's GPUs, by the worker's index, or the CPU where there is none.

    Raises `OptionError` for a GPU that is not there.
    """
    if name == "auto":
        return torch.device(f"cuda:{index % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError("--device", name, f"auto, cpu; this machine has {torch.cuda.device_count()} GPUs")
    return device


def make_deterministic(threads: int) -> None:
    """Set torch so that the same input gives the same bits: threads, algorithms, no TF32."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False


def seed_torch(seed: int, round_: int, worker: int) -> None:
    """Seed torch for what a worker's batches of a round draw from it, such as the masks of dropout."""
    word = words(Address(seed, round_, worker, Domain.COMPUTE), 1)[0]
    torch.manual_seed(int(word) & (2**63 - 1))


def backward(
    task: Task,
    name: str | None,
    model: FlatModel,
    features: Tensor,
    labels: Tensor,
    keys: Keys | None,
    weights: Tensor | None = None,
) -> Tensor:
    """Leave the gradient of a batch's loss in `model.gradient`, in the mode that the module is in; buffers move on.

    Args:
        task: whose inputs and loss.
        name: of the task's model; None is the default.
        model: w, on any device.
        features: (n, *shape), as stored or reconstructed; may be empty where weights are given.
        labels: (n,).
        keys: (n,) to augment with.
        weights: (n,) of the samples' losses in their sum; None: 1/n each, which is the task's own mean.

    Returns:
        The loss, detached.
    """
    model.gradient.zero_()
    if weights is not None and len(labels) == 0:
        return torch.zeros((), device=model.device)
    if weights is not None and len(labels) == 1:
        # Batch norm refuses to train on a single value; the same sample twice has the same mean and no variance.
        features, labels, weights = (torch.cat([column, column]) for column in (features, labels, weights / 2))
        keys = None if keys is None else np.concatenate([keys, keys])
    outputs = model.module(task.inputs(name, features, keys).to(model.device))
    labels = labels.to(model.device)
    if weights is None:
        loss = task.loss(outputs, labels)
    else:
        losses = [task.loss(outputs[i : i + 1], labels[i : i + 1]) for i in range(len(labels))]
        loss = torch.stack(losses) @ weights.to(model.device)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()
