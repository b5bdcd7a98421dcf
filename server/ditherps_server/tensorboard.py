"""The rounds' scalars as TensorBoard reads them; the record is `rounds.jsonl`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ditherps.errors import UserError

SCALARS = {
    "loss/train": "train_loss", "loss/test": "test_loss", "accuracy/test": "test_accuracy",
    "error/update_nmse": "nmse", "error/step_nmse": "step_nmse", "error/step_lag_rounds": "step_lag_rounds",
    "learning_rate": "learning_rate", "seconds/round": "round_seconds", "seconds/compute": "compute_seconds",
    "seconds/encode": "encode_seconds", "seconds/decode": "decode_seconds",
}  # fmt: skip
"""Field of a round's record, by the scalar's name."""
_BITS = {
    "bits/up": "uplink_bytes", "bits/down": "downlink_bytes", "bits/up_total": "uplink_total_bytes",
    "bits/down_total": "downlink_total_bytes",
}  # fmt: skip


class Board:
    """Event files of one run."""

    def __init__(self, folder: Path, version: int) -> None:
        """`version`: with which the run goes on; what an earlier server wrote of later rounds is hidden.

        Raises `UserError` where TensorBoard is not installed, or the folder cannot be made.
        """
        try:
            tensorboard: Any = importlib.import_module("torch.utils.tensorboard")  # untyped
        except ImportError:
            raise UserError("--tensorboard needs another package: pip install 'ditherps[tensorboard]'") from None
        try:
            self._writer = tensorboard.SummaryWriter(str(folder), purge_step=version + 1)
        except OSError as error:
            raise UserError(f"--tensorboard {folder} cannot be written: {error.strerror}") from None

    def add(self, record: Mapping[str, Any]) -> None:
        """One more round: a record of `rounds.jsonl`. Its scalars stand at the version that it made."""
        values = {name: record[field] for name, field in SCALARS.items()}
        values |= {name: 8 * record[field] for name, field in _BITS.items()}
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, record["version"])

    def close(self) -> None:
        """Write what is not written yet."""
        self._writer.close()
