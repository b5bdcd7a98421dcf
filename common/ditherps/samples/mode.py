"""What mode `data` asks of a job: a task that says what its features are, and a refinement that is unbiased."""

from __future__ import annotations

import numpy as np
import torch

from ditherps.codecs import Codec, Role, parse
from ditherps.codecs import codec as make_codec
from ditherps.config import DataConfig, JobConfig
from ditherps.errors import OptionError
from ditherps.samples.choice import Choice, Plan, choose, most_sample_bits, nominal_bits
from ditherps.samples.codec import NOTHING, Batch, SampleCodec
from ditherps.tasks import Features, Task

MOST_NOMINAL = 1 << 20
"""Coordinates from which a codec's bits are told."""


def update_codec(job: JobConfig) -> Codec:
    """The codec of a job's updates; in mode `data` of the refinement, and `none` where there is none.

    Raises `OptionError` where there is no such codec.
    """
    if job.mode == "data":
        return parse(job.data.refine or "none")
    return make_codec(job.codec, **job.codec_options)


def needs_model(data: DataConfig) -> bool:
    """Whether workers compute gradients too: for the refinement, or for the gate."""
    return bool(data.refine) or data.keep < 1


def sample_codec(job: JobConfig, task: Task, index: int) -> SampleCodec:
    """The codec of one worker's samples; raises `OptionError` where the task has no mode `data`."""
    return SampleCodec(features_of(task), task.classes, job.seed, index)


def features_of(task: Task) -> Features:
    """What the task says of its features; raises `OptionError` where it says nothing."""
    if task.features is None:
        raise OptionError("mode", "data", f"gradient, local: task {task.name} does not declare its features")
    return task.features


def warm_samples(codec: SampleCodec) -> None:
    """Compile or load what samples need at either end, so that no round waits for it."""
    features, level = codec.features, min(2, codec.deepest)
    low = torch.tensor(features.low, dtype=torch.float64).reshape(-1, *[1] * (len(features.shape) - 1))
    values = (torch.zeros(1, *features.shape, dtype=torch.float64) + low).float()
    ids, labels, nothing = np.zeros(1, np.int64), torch.zeros(1, dtype=torch.int64), np.full(1, NOTHING)
    payload = codec.encode(ids, values, labels, nothing, level)
    batch = Batch(np.zeros(1, np.int64), np.zeros((1, features.count), np.uint16))
    codec.decode(payload, ids, nothing, level, batch)
    codec.coarser(ids, batch.indices, np.full(1, level), 0)
    codec.values(ids, batch.indices, level)


def check_mode(data: DataConfig, task: Task) -> None:
    """Raises `OptionError` where mode `data` cannot be: by the task, the level, or the codec of the refinement."""
    deepest = SampleCodec(features_of(task), task.classes, 0, 0).deepest
    if data.level > deepest:
        raise OptionError("data.level", data.level, f"0 to {deepest}, at which task {task.name} is lossless")
    if not data.refine:
        return
    codec = parse(data.refine)
    if not codec.unbiased or codec.roles != (Role.SOURCE,):
        kind = "biased" if not codec.unbiased else "nested"
        raise OptionError(
            "data.refine", data.refine, f"an unbiased codec that stands for itself; {codec.name} is {kind}"
        )


def chosen(job: JobConfig, task: Task, coordinates: int) -> Choice:
    """Whether `mode = auto` takes data or gradients, for a model with so many parameters.

    Without what `data` needs of the task, the answer is `gradient`. A task that does not say how many samples it has
    is taken to send each of them once.
    """
    features = task.features
    if features is None:
        return Choice("gradient", 0.0, 0.0, f"mode = gradient: task {task.name} does not declare its features")
    if job.error_feedback:
        return Choice("gradient", 0.0, 0.0, "mode = gradient: error_feedback = true is of no use with samples")
    check_mode(job.data, task)
    some = min(coordinates, MOST_NOMINAL)
    taken = job.batch_size * job.rounds
    shard = max(task.training_samples // job.workers, 1) if task.training_samples else taken
    # As many entries as there are features' bytes: what the cache counts besides is little (ditherps_server.cache).
    room = job.data.cache_bytes / max(job.workers * shard * features.count, 1)
    plan = Plan(
        task=task.name, coordinates=coordinates,
        gradient_bits=nominal_bits(make_codec(job.codec, **job.codec_options), some),
        features=features.count, sample_bits=most_sample_bits(features, job.data.level), classes=task.classes,
        batch_size=job.batch_size, rounds=job.rounds, shard_samples=shard, cached=min(room, 1.0),
        refinement_bits=nominal_bits(parse(job.data.refine), some) if job.data.refine else 0.0,
    )  # fmt: skip
    return choose(plan)
