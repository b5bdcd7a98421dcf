"""What a worker keeps on disk, so that one that is started again goes on as if it had not been away."""

from __future__ import annotations

import json
import logging
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ditherps.errors import DitherpsError, UserError
from ditherps.feedback import ErrorFeedback, StateDict
from ditherps.files import replacing
from ditherps_worker.client import PushStats

log = logging.getLogger(__name__)

LEASE_FILE = "lease.key"
FEEDBACK_FILE = "feedback.safetensors"
LEASE_KEY_BYTES = 16
_BUFFERS = "buffers"


@dataclass(slots=True)
class Encoded:
    """A contribution that may have to be sent again: same plan, same bytes."""

    plan: tuple[int, int, int, int, bytes]
    """Round, attempt, base version, role, and in mode `data` what the server holds."""
    update: bytes | memoryview
    buffers: bytes
    stats: PushStats


class KeptState:
    """The folder of one worker; without a folder nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def lease_key(self) -> bytes:
        """The key under which this worker leases its slot: the same one in all of its lives.

        Raises `UserError` where it can be neither read nor written.
        """
        if self._folder is None:
            return secrets.token_bytes(LEASE_KEY_BYTES)
        path = self._folder / LEASE_FILE
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if path.exists() and len(key := path.read_bytes()) == LEASE_KEY_BYTES:
                return key
            key = secrets.token_bytes(LEASE_KEY_BYTES)
            with replacing(path) as file:
                file.write(key)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: choose another --state-dir") from None
        return key

    def save(self, feedback: ErrorFeedback, sent: Encoded, job_id: str, index: int) -> None:
        """Keep both states of error feedback: the error, and the contribution whose result is not known yet.

        `sent`: that contribution, which is to be sent as it is: computed once more it might be another one. Belongs
        before its push. Raises `OSError` where there is no room; what was kept stays.
        """
        if self._folder is None:
            return
        state = feedback.state_dict()
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        tensors[_BUFFERS] = torch.from_numpy(np.frombuffer(sent.buffers, np.uint8).copy())
        metadata = {
            "job_id": job_id,
            "index": str(index),
            "values": json.dumps({key: value for key, value in state.items() if not isinstance(value, Tensor)}),
            "plan": json.dumps(sent.plan[:4]),
            "stats": json.dumps(asdict(sent.stats)),
        }
        with replacing(self._folder / FEEDBACK_FILE) as file:
            file.write(save(tensors, metadata))

    def restore(self, feedback: ErrorFeedback, job_id: str, index: int) -> Encoded | None:
        """Bring error feedback to where it stood; returns the contribution whose result is not known yet.

        It stays as it is where nothing of this job and of its slot `index` is kept. Raises `UserError` for a file that
        is damaged.
        """
        path = self._folder / FEEDBACK_FILE if self._folder is not None else None
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if (metadata.get("job_id"), metadata.get("index")) != (job_id, str(index)):
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            buffers, stats = tensors.pop(_BUFFERS).numpy().tobytes(), PushStats(**json.loads(metadata["stats"]))
            round_, attempt, base_version, role = json.loads(metadata["plan"])
            state: StateDict = {**json.loads(metadata["values"]), **tensors}
            feedback.load_state_dict(state)
        except DitherpsError as error:
            raise UserError(f"{path} does not fit this job: {error}") from None
        except Exception as error:  # whatever safetensors may find wrong with it
            raise UserError(f"{path} is damaged ({error}): remove it, and the error that it held is lost") from None
        log.info("error feedback goes on from %s", path)
        if feedback.encoded is None:
            return None
        return Encoded((round_, attempt, base_version, role, b""), feedback.encoded.data.data, buffers, stats)
