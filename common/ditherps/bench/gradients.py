"""`ditherps bench gradients`: a real update to measure codecs on, as one worker of an uncompressed run would send it.

The run is the one of `ditherps local --codec none`, in one process: the same split, batches, augmentation, initial
model, mean over the workers, optimizer and schedule. Buffers (batch-norm statistics) stay here: no gradient depends on
them.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ditherps.config import JobConfig
from ditherps.dither import Address, Domain, words
from ditherps.errors import OptionError
from ditherps.layout import FlatModel
from ditherps.optimizers import make_optimizer, make_schedule
from ditherps.sampling import Walk, augmentation_keys, split
from ditherps.tasks import Task


def save_gradient(job: JobConfig, task: Task, data_dir: Path | None, round_: int, path: Path) -> dict[str, str]:
    """Train up to a round, and write worker 0's update in it as tensor `update` (float32, flat) of a safetensors file.

    Args:
        job: of the run; its codec does not matter.
        task: its task.
        data_dir: where the data is.
        round_: of the update: that many updates made the model.
        path: of the file.

    Returns:
        The file's metadata: task, model, round, loss (of worker 0's batch), workers, seed.

    Raises:
        OptionError: the run has no such round, or its workers send no gradients.
        DataMissingError: the data is not there.
    """
    if not 0 <= round_ < job.rounds:
        raise OptionError("rounds", round_, f"0 to {job.rounds - 1} (--set rounds=N makes the run longer)")
    if job.mode != "gradient":
        raise OptionError("mode", job.mode, "gradient")
    threads = torch.get_num_threads()
    torch.set_num_threads(job.compute_threads)
    try:
        update, loss = _update(job, task, data_dir, round_)
    finally:
        torch.set_num_threads(threads)
    model = job.model or next(iter(task.models))
    about = {"task": job.task, "model": model, "round": round_, "loss": loss, "workers": job.workers, "seed": job.seed}
    metadata = {key: str(value) for key, value in about.items()}
    beside = path.with_name(path.name + ".part")
    save_file({"update": update}, beside, metadata)
    os.replace(beside, path)
    return metadata


def _update(job: JobConfig, task: Task, data_dir: Path | None, last: int) -> tuple[Tensor, float]:
    """Worker 0's gradient and loss in round `last`."""
    name = job.model or None
    model = FlatModel(task.build(name, job.seed))
    model.module.train()
    samples = task.load(data_dir, train=True)
    shards = split(samples, job.workers, job.seed, job.split.kind, job.split.alpha)
    walks = [Walk(shard, job.seed, worker) for worker, shard in enumerate(shards)]
    x = torch.nn.Parameter(model.flat)
    optimizer = make_optimizer(x, job.optimizer)
    schedule = make_schedule(optimizer, job.schedule, job.rounds)
    mean = torch.empty_like(model.flat)

    def gradient(worker: int, round_: int) -> float:
        """Leave a worker's gradient in `model.gradient`; its loss."""
        seed = words(Address(job.seed, round_, worker, Domain.COMPUTE), 1)[0]
        torch.manual_seed(int(seed) & (2**63 - 1))
        ids, epochs = walks[worker].take(round_ * job.batch_size, job.batch_size)
        rows = torch.from_numpy(ids)
        inputs = task.inputs(name, samples.features[rows], augmentation_keys(job.seed, epochs, ids))
        model.gradient.zero_()
        loss = task.loss(model.module(inputs), samples.labels[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    with torch.random.fork_rng(devices=[]):
        for round_ in range(last):
            mean.zero_()
            for worker in range(job.workers):
                gradient(worker, round_)
                mean.add_(model.gradient, alpha=1 / job.workers)
            x.grad = mean
            optimizer.step()
            schedule.step()
        loss = gradient(0, last)
    return model.gradient, loss
