"""The server computes what a worker would: bit for bit at the same samples, one batch after another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ditherps.config import JobConfig
from ditherps.gradient import make_deterministic
from ditherps.samples.codec import NOTHING, SampleCodec
from ditherps.sampling import Ids, Walk, augmentation_keys, split
from ditherps.tasks import Task, load_task
from ditherps_server.cache import SampleCache
from ditherps_server.model import ServerModel
from ditherps_server.trainer import Batch, Trainer, Trainers
from ditherps_worker.compute import Computer
from tests.tiny import Tiny

CPU = torch.device("cpu")
pytestmark = pytest.mark.timeout(600)  # the first use of the kernels compiles them


def job(task: Task, model: str) -> JobConfig:
    return JobConfig(task=task.name, workers=2, model=model, batch_size=8, seed=21)


def batch(task: Task, settings: JobConfig, worker: int, round_: int) -> tuple[Ids, Ids]:
    """Ids and epochs of a round's samples."""
    shards = split(task.load(None, train=True), settings.workers, settings.seed)
    walk = Walk(shards[worker], settings.seed, worker)
    return walk.take(round_ * settings.batch_size, settings.batch_size)


@pytest.mark.parametrize("model", ["linear", "norm", "wide"])
def test_at_the_workers_own_samples_it_is_the_workers_own_update(model: str) -> None:
    """With batch norm, dropout and augmentation, and whatever was computed before."""
    make_deterministic(1)
    task = Tiny()
    settings, samples = job(task, model), task.load(None, train=True)
    server = ServerModel(task.build(model, 9))
    trainer = Trainer(task, model, settings.seed, CPU)
    trainer.take(server)
    for round_, worker in ((3, 0), (3, 1), (4, 1), (3, 0)):
        ids, epochs = batch(task, settings, worker, round_)
        keys = augmentation_keys(settings.seed, epochs, ids)
        found = trainer.compute(Batch(round_, worker, samples.features[ids], samples.labels[ids], keys))
        computer = Computer(settings, worker, task, None, CPU)
        with torch.no_grad():
            computer.model.flat.copy_(server.w)
        computer.model.load_buffers(server.buffers)
        update = computer.update(round_)
        assert torch.equal(found.gradient, update.vector)
        assert (found.buffers, found.loss) == (update.buffers, update.loss)


@pytest.mark.parametrize("model", ["linear", "norm", "wide"])
def test_at_once_or_one_by_one(model: str) -> None:
    """Threads change no bit: with buffers, in groups that are not full, and of a model that draws random numbers."""
    make_deterministic(1)
    task = Tiny()
    settings, samples = job(task, model), task.load(None, train=True)
    server = ServerModel(task.build(model, 9))
    batches = []
    for round_ in range(5):
        ids, epochs = batch(task, settings, round_ % 2, round_)
        keys = augmentation_keys(settings.seed, epochs, ids)
        batches.append(Batch(round_, round_ % 2, samples.features[ids], samples.labels[ids], keys))
    alone = Trainer(task, model, settings.seed, CPU)
    with ThreadPoolExecutor(3) as pool:
        trainers = Trainers(task, model, settings.seed, CPU, pool, 3)
        for moved in (0.0, 1.0):  # the model of a later round
            with torch.no_grad():
                server.w += moved
            alone.take(server)
            for one, found in zip(batches, trainers.compute(server, batches), strict=True):
                expected = alone.compute(one)
                assert torch.equal(found.gradient, expected.gradient)
                assert (found.buffers, found.loss) == (expected.buffers, expected.loss)


def test_lossless_samples_give_the_gradient_of_mode_gradient() -> None:
    """From the wire through cache and codec: at the deepest level it makes no difference which end computes."""
    make_deterministic(1)
    task = load_task("digits")
    settings, samples = job(task, "cnn"), task.load(None, train=True)
    assert task.features is not None
    codec, cache = SampleCodec(task.features, task.classes, settings.seed, 1), SampleCache(task.features, 1 << 20)
    trainer, computer = Trainer(task, "cnn", settings.seed, CPU), Computer(settings, 1, task, None, CPU)
    trainer.take(ServerModel(task.build("cnn", settings.seed)))
    ids, epochs = batch(task, settings, 1, 5)
    for level in (2, codec.deepest):  # first a coarse one, which is refined
        change = cache.begin(codec, 1, ids, level)
        assert set(change.need.held.tolist()) == {NOTHING if level == 2 else 2}
        wanted = change.ids
        payload = codec.encode(wanted, samples.features[wanted], samples.labels[wanted], change.need.held, level)
        change.complete(codec, payload)
        cache.commit(change)
        features, labels = change.samples(codec)
        found = trainer.compute(Batch(5, 1, features, labels, augmentation_keys(settings.seed, epochs, ids)))
        assert torch.equal(found.gradient, computer.update(5).vector) == (level == codec.deepest)
    assert not cache.begin(codec, 1, ids, codec.deepest).need
