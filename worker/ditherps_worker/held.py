"""The model w as a worker holds it, and the steps and snapshots that bring it to another version."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ditherps.codecs import Codec, Encoded
from ditherps.config import DownlinkConfig
from ditherps.downlink import digest, round_to_bf16, rounds_here, step_address, take_step
from ditherps.errors import PayloadError, Reason
from ditherps.layout import FlatModel
from ditherps.v1 import parameter_server_pb2 as pb

_SNAPSHOT_ITEM_BYTES = {pb.PULL_ENCODING_SNAPSHOT: 4, pb.PULL_ENCODING_SNAPSHOT_BF16: 2}
_SNAPSHOT_CODEC = {pb.PULL_ENCODING_SNAPSHOT: "none", pb.PULL_ENCODING_SNAPSHOT_BF16: "bf16"}


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a pull brought: codec, payload bytes and number of models of each part."""

    snapshot: bool
    parts: tuple[tuple[str, int, int], ...]


class HeldModel:
    """w (float32, on the CPU: in the model itself, where that is there), buffers, and their version.

    Whoever computes in the model puts w back into it before `take`; buffers are put back by `restore_buffers`.
    """

    def __init__(
        self, config: DownlinkConfig, seed: int, codec: Codec | None, model: FlatModel, initial_digest: bytes
    ) -> None:
        """Begin with version 0 where the model as the task builds it is the server's, else with nothing.

        `codec`: of the steps; None: w is never sent in steps.
        """
        self._config, self._seed, self._codec, self._model = config, seed, codec, model
        self._w = model.flat if model.device.type == "cpu" else model.flat.cpu()
        self._buffers = model.buffers()
        self._parts: list[memoryview] = []
        self.version: int | None = 0 if digest(self._w, self._buffers) == initial_digest else None
        """None: nothing that could be built on."""
        self.doubted = False
        """The server may know this version as another one, so that it has to be asked."""

    @property
    def coordinates(self) -> int:
        """Length of w."""
        return self._w.numel()

    def forget(self) -> None:
        """Hold nothing."""
        self.version = None

    def restore_buffers(self) -> None:
        """Set the model's buffers to those of this version."""
        self._model.load_buffers(self._buffers)

    def digest_due(self) -> bytes:
        """The digest to show the server with the next pull; empty where its check is not due."""
        if self.version is None or not (
            self.doubted or (self.version and self.version % self._config.digest_every == 0)
        ):
            return b""
        return digest(self._w, self._buffers)

    def room(self, header: pb.PullHeader) -> list[memoryview]:
        """Memory for the content that a header announces, part by part; a float32 snapshot goes straight into w.

        Raises `PayloadError` for what no server would send: nothing is held then but what was.
        """
        size, steps = self.coordinates, [step.bytes for step in header.steps]
        item_bytes = _SNAPSHOT_ITEM_BYTES.get(header.encoding, 0)
        if not item_bytes and (header.encoding != pb.PULL_ENCODING_STEPS or header.from_version != self.version):
            raise PayloadError(f"a pull of encoding {header.encoding} from version {header.from_version} does not fit")
        if header.parameter_bytes != item_bytes * size or header.buffer_bytes != len(self._buffers):
            raise PayloadError(
                f"a model of {header.parameter_bytes} and {header.buffer_bytes} bytes, not {item_bytes * size} and "
                f"{len(self._buffers)}",
                Reason.SIZE,
            )
        if len(steps) != header.to_version - header.from_version or (steps and self._codec is None):
            raise PayloadError(f"{len(steps)} steps from version {header.from_version} to {header.to_version}")
        if header.parameter_bytes + sum(steps) > 4 * size:
            raise PayloadError(f"{sum(steps)} bytes of steps: more than the model takes", Reason.SIZE)
        if not all(0 < step.rate <= 1 for step in header.steps):
            raise PayloadError("a step's rate is not in (0, 1]")
        if header.encoding == pb.PULL_ENCODING_SNAPSHOT:
            self.forget()
            parameters = self._w.numpy().data.cast("B") if size else memoryview(bytearray())
        else:
            parameters = memoryview(bytearray(header.parameter_bytes))
        sizes = (*steps, header.buffer_bytes)
        self._parts = [parameters, *(memoryview(bytearray(nbytes)) for nbytes in sizes)]
        return self._parts

    def take(self, header: pb.PullHeader) -> Pulled:
        """Build the version that came into the room that was made for it.

        Raises `PayloadError` when a step is malformed: nothing of it is held then but what was.
        """
        (parameters, *payloads, buffers), self._parts = self._parts, []
        codec, encoded = self._codec, [Encoded.from_bytes(payload) for payload in payloads]
        for step in encoded:
            assert codec is not None
            codec.validate(step, self.coordinates)
        self.forget()  # until all steps have been taken
        if header.encoding == pb.PULL_ENCODING_SNAPSHOT_BF16 and len(parameters):
            self._w.copy_(torch.frombuffer(parameters, dtype=torch.bfloat16))
        for version, (step, fields) in enumerate(zip(encoded, header.steps, strict=True), header.from_version):
            assert codec is not None
            take_step(codec, step, step_address(self._seed, version), fields.rate, self._w)
            if rounds_here(self._config, version + 1):
                round_to_bf16(self._w)
        if self._w is not self._model.flat:
            with torch.no_grad():
                self._model.flat.copy_(self._w)
        self._buffers, self.version, self.doubted = buffers.tobytes(), header.to_version, False
        return self._counted(header)

    def _counted(self, header: pb.PullHeader) -> Pulled:
        snapshot = _SNAPSHOT_CODEC.get(header.encoding, "")
        steps = self._codec.name if self._codec else "none"
        parts = [(snapshot or steps, header.buffer_bytes, 0)]
        if snapshot:
            parts.append((snapshot, header.parameter_bytes, 1))
        if header.steps:
            parts.append((steps, sum(step.bytes for step in header.steps), len(header.steps)))
        return Pulled(bool(snapshot), tuple(parts))
