"""Evaluation at the server, where it has test data."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ditherps.errors import DataMissingError
from ditherps.layout import FlatModel
from ditherps.sampling import evaluate
from ditherps.tasks import Samples, Task
from ditherps_server.model import ServerModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Loss and accuracy of one version over a test set."""

    version: int
    loss: float
    accuracy: float
    samples: int
    seconds: float


class Evaluator:
    """Evaluates versions of the server's model on a copy of it."""

    def __init__(self, task: Task, model: str | None, samples: Samples) -> None:
        self._task = task
        self._model = model
        self._samples = samples
        self._copy = FlatModel(task.build(model, seed=0), gradient=False)
        self._version = 0
        self._ended = threading.Event()
        self._copy.module.register_forward_pre_hook(lambda *_: self._check())

    @classmethod
    def where_possible(cls, task: Task, model: str | None, data_dir: Path | None, *, must: bool) -> Evaluator | None:
        """An evaluator, or None where the test data is missing; `must` lets that error through."""
        try:
            return cls(task, model, task.load(data_dir, train=False))
        except DataMissingError as error:
            if must:
                raise
            log.info("no test data here, so a worker evaluates: %s", error)
            return None

    def take(self, model: ServerModel) -> None:
        """Copy the version that `run` is to evaluate."""
        model.copy_into(self._copy)
        self._version = model.version

    def end(self) -> None:
        """Nobody wants a result any more: what runs raises `RuntimeError` at its next batch (any thread)."""
        self._ended.set()

    def _check(self) -> None:
        if self._ended.is_set():
            raise RuntimeError("the evaluation was ended")

    def run(self) -> Evaluation:
        """Evaluate the copy (any thread, one at a time)."""
        began = time.perf_counter()
        loss, accuracy = evaluate(self._task, self._model, self._copy.module, self._samples, "cpu")
        return Evaluation(self._version, loss, accuracy, len(self._samples), time.perf_counter() - began)
