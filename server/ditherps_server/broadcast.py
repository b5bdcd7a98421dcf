"""The server's way down: takes the steps of w, and answers what workers pull."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import numpy as np
import torch

from ditherps import wire
from ditherps.codecs import Codec
from ditherps.codecs.omega import relative_error
from ditherps.config import DownlinkConfig
from ditherps.downlink import memory_rate, round_to_bf16, rounds_here, step_address, take_step
from ditherps.errors import NonFiniteError, Reason, RefusedError
from ditherps.kernels.cpu import INFINITY_BITS, largest_bits
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps_server.history import Step, StepHistory, Way, cheapest
from ditherps_server.model import ServerModel

STEP_OVERHEAD_BYTES = 12
"""A step's own fields in the header of a pull, about."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What the step of a round's update took and lost."""

    nbytes: int
    nmse: float
    """Expected squared error of C(x - w) over ||x - w||^2."""
    rate: float
    encode_seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A pull's answer: `messages` as they travel, to be read once, and what they hold."""

    messages: Iterable[bytes]
    snapshot: str
    """Codec of the snapshot: `none`, `bf16`, or empty where there is none."""
    snapshot_bytes: int
    steps: int
    step_bytes: int
    buffer_bytes: int
    mismatch: bool = False
    """The worker did not hold what it should."""

    @property
    def payload_bytes(self) -> int:
        """Bytes of the content."""
        return self.snapshot_bytes + self.step_bytes + self.buffer_bytes


class Broadcast:
    """Keeps w behind x with encoded steps, or w = x where `codec` is None.

    `step` runs in a thread while a round closes; `answer` on the event loop, at any time.
    """

    def __init__(
        self, config: DownlinkConfig, seed: int, model: ServerModel, codec: Codec | None, pool: Executor | None = None
    ) -> None:
        self._config, self._seed, self._model, self._codec, self._pool = config, seed, model, codec, pool
        self.history = StepHistory(config.history_steps, config.history_bytes)
        self._rounded: tuple[int, memoryview] | None = None
        """Version and content of the newest bfloat16 snapshot."""
        self._snapshot: tuple[int, Answer] | None = None
        """The newest version that was sent whole."""
        if codec is not None:
            model.part_w()

    @property
    def codec_name(self) -> str:
        """Of the steps; `none` where w travels in float32."""
        return self._codec.name if self._codec else "none"

    @property
    def codec_spec(self) -> str:
        """The same with its options, as the job says it."""
        return self._config.codec or (self._codec.spec if self._codec else "none")

    def step(self, scratch: torch.Tensor) -> StepReport | None:
        """x has moved: w follows, from the model's version to the next. None where w is x.

        `scratch`: float32 of the model's size, overwritten. Raises `EncodingError` naming the parameter where x has
        become infinite or NaN, or too large to be encoded, and leaves w as it was, unless it is x.
        """
        if self._codec is None:
            _check_finite(self._model)
            return None
        began = time.perf_counter()
        model, codec, address = self._model, self._codec, step_address(self._seed, self._model.version)
        torch.sub(model.x, model.w, out=scratch)
        encoded = codec.encode(scratch, address, name=model.layout.name_at, pool=self._pool)
        omega = relative_error(codec, scratch.numpy(), encoded, address)
        step = Step(model.version, encoded, memory_rate(codec, omega), model.digest)
        seconds = time.perf_counter() - began
        take_step(codec, encoded, address, step.rate, model.w, self._pool)
        if rounds_here(self._config, model.version + 1):
            round_to_bf16(model.w)
            self._rounded = (model.version + 1, _bf16_bytes(model.w))
        self.history.add(step)
        return StepReport(encoded.nbytes, omega, step.rate, seconds)

    def answer(self, held: int | None, wanted: int, held_digest: bytes, *, moving: bool) -> Answer:
        """What brings a worker that holds version `held` (None: nothing) of w to version `wanted`.

        `held_digest`: of what it holds, empty where it does not say; what is not the server's version is not built on.
        While `moving`, a thread is changing the model, and only a snapshot that was made before can be sent.
        Raises `RefusedError` (`version_unavailable`) for another version than the present one, and then.
        """
        newest = self._model.version
        if wanted != newest:
            raise RefusedError(Reason.VERSION_UNAVAILABLE, f"version {wanted} is not here; the present one is {newest}")
        if moving:
            if held is None and self._snapshot is not None and self._snapshot[0] == wanted:
                return self._snapshot[1]
            raise RefusedError(Reason.VERSION_UNAVAILABLE, f"version {wanted} is over")
        known = self._digest_at(held) if held is not None and held_digest else None
        mismatch = known is not None and held_digest != known
        way = cheapest(self.history, None if mismatch else held, newest, self._snapshots(newest), STEP_OVERHEAD_BYTES)
        if not way.snapshot:
            return self._made(way, newest)
        if self._snapshot is None or self._snapshot[0] != newest:
            # Made once for all workers; steps cost nothing to send again, and are many.
            made = self._made(way, newest)
            self._snapshot = (newest, replace(made, messages=list(made.messages)))
        return replace(self._snapshot[1], mismatch=mismatch)

    def _digest_at(self, version: int) -> bytes | None:
        """None for a version from which no step leads on: then what is held does not matter."""
        return self._model.digest if version == self._model.version else self.history.digest_at(version)

    def _snapshots(self, newest: int) -> list[tuple[int, int]]:
        found = [(newest, 4 * self._model.w.numel())]
        if self._rounded is not None:
            found.append((self._rounded[0], len(self._rounded[1])))
        return found

    def _made(self, way: Way, newest: int) -> Answer:
        encoding, codec = pb.PULL_ENCODING_STEPS, ""
        parameters = memoryview(b"")
        if way.snapshot and self._rounded is not None and self._rounded[0] == way.first:
            encoding, codec, parameters = pb.PULL_ENCODING_SNAPSHOT_BF16, "bf16", self._rounded[1]
        elif way.snapshot:
            encoding, codec = pb.PULL_ENCODING_SNAPSHOT, "none"
            parameters = self._model.w.numpy().data.cast("B") if self._model.w.numel() else parameters
        buffers = self._model.buffers
        parts = [parameters, *(step.encoded.data.data.cast("B") for step in way.steps), memoryview(buffers)]
        header = pb.PullHeader(
            from_version=way.first, to_version=newest, encoding=encoding, parameter_bytes=len(parameters),
            buffer_bytes=len(buffers), digest=wire.digest_of(*parts),
            steps=[pb.PullStep(bytes=step.nbytes, rate=step.rate) for step in way.steps],
        )  # fmt: skip
        chunks = wire.chunk_messages(pb.PullResponse, parts, wire.CHUNK_BYTES)
        messages = itertools.chain([pb.PullResponse(header=header).SerializeToString()], chunks)
        step_bytes = sum(step.nbytes for step in way.steps)
        return Answer(messages, codec, len(parameters), len(way.steps), step_bytes, len(buffers))


def _check_finite(model: ServerModel) -> None:
    """Raises `NonFiniteError` naming the parameter where x is infinite or NaN."""
    x = model.x.numpy()
    if largest_bits(x.view(np.int32), 0, x.size) >= INFINITY_BITS:
        where = int(np.flatnonzero(~np.isfinite(x))[0])
        raise NonFiniteError(f"{model.layout.name_at(where)}: coordinate {where} is {x[where]}")


def _bf16_bytes(w: torch.Tensor) -> memoryview:
    return w.to(torch.bfloat16).view(torch.int16).numpy().data.cast("B") if w.numel() else memoryview(b"")
