"""A task whose rounds take as long as a test wants."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from torch import Tensor

from ditherps.tasks import Samples
from tests.tiny import Tiny

PACE_FILE = "pace"


class Paced(Tiny):
    """`Tiny`, but each training step of a worker takes the seconds that a file in its data folder says; else none."""

    _pace: Path | None = None

    def load(self, data_dir: Path | None, *, train: bool) -> Samples:
        """As ever; also learns where the pace is written."""
        self._pace = data_dir and data_dir / PACE_FILE
        return super().load(data_dir, train=train)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """As ever, a while later."""
        if self._pace is not None and outputs.requires_grad:
            with contextlib.suppress(FileNotFoundError):
                time.sleep(float(self._pace.read_text()))
        return super().loss(outputs, labels)
