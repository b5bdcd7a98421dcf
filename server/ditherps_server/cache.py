"""What the server holds of workers' samples, so that it need not be sent again.

A round's samples are looked up (`begin`), completed with what a worker sends (`Change.complete`), and enter the cache
only when the contribution that brought them does (`commit`). Until then the cache is as before, and what was looked up
is a copy, so that nothing that happens meanwhile can take it away. As long as commits come in the same order, the cache
is the same on every run.

Entries leave when the byte budget is spent, least recently used first, and all of a worker's at once when it comes with
another version of its samples.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ditherps.errors import OptionError, PayloadError, UserError
from ditherps.files import make, replacing
from ditherps.samples.codec import NOTHING, Batch, SampleCodec
from ditherps.samples.importance import Selection
from ditherps.samples.need import Need, distinct
from ditherps.sampling import Ids
from ditherps.tasks import Features
from ditherps_server.tensorfile import Stored, front

ENTRY_BYTES: Final = 352
"""What an entry counts for besides its indices: about what its place in the cache takes."""


class Rows(Protocol):
    """Where the bytes of entries lie."""

    def put(self, row: bytes) -> int:
        """Keep a row; its place."""
        ...

    def get(self, place: int) -> bytes:
        """The row at a place."""
        ...

    def free(self, place: int) -> None:
        """Forget the row at a place."""
        ...

    def clear(self) -> None:
        """Forget all rows, and give back what they took."""
        ...


class MemoryRows:
    """Rows in memory."""

    def __init__(self) -> None:
        self._rows: dict[int, bytes] = {}
        self._next = 0

    def put(self, row: bytes) -> int:
        """Keep a row; its place."""
        self._rows[self._next] = row
        self._next += 1
        return self._next - 1

    def get(self, place: int) -> bytes:
        """The row at a place."""
        return self._rows[place]

    def free(self, place: int) -> None:
        """Forget the row at a place."""
        del self._rows[place]

    def clear(self) -> None:
        """Forget all rows."""
        self._rows.clear()


class FileRows:
    """Rows of equal size in a file without a name: nobody else can open it, and it goes with this process."""

    def __init__(self, folder: Path, row_bytes: int) -> None:
        """Below a folder, which is made; raises `UserError` where it cannot be."""
        make(folder)
        self._row_bytes = row_bytes
        try:
            self._kept = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}: choose another --cache-dir") from None
        self._file = self._kept.fileno()
        self._unused: list[int] = []
        self._end = 0

    def put(self, row: bytes) -> int:
        """Keep a row; its place. Raises OSError where the disk is full."""
        assert len(row) == self._row_bytes
        place = self._unused[-1] if self._unused else self._end
        written = os.pwrite(self._file, row, place * self._row_bytes)
        if written != self._row_bytes:
            raise OSError(f"the sample cache's file took {written} of {self._row_bytes} bytes")
        if self._unused:
            self._unused.pop()
        else:
            self._end += 1
        return place

    def get(self, place: int) -> bytes:
        """The row at a place."""
        return os.pread(self._file, self._row_bytes, place * self._row_bytes)

    def free(self, place: int) -> None:
        """Forget the row at a place."""
        self._unused.append(place)

    def clear(self) -> None:
        """Forget all rows; the file becomes empty."""
        os.ftruncate(self._file, 0)
        self._unused, self._end = [], 0

    def close(self) -> None:
        """Close the file, which is then gone."""
        self._kept.close()


class Entry(NamedTuple):
    """One sample: the level that is held, its label, and the place of its indices."""

    level: int
    label: int
    place: int


class Change:
    """A round's samples of one worker, and what their contribution brings into the cache.

    Attributes:
        worker: whose.
        ids: (n,) distinct, ascending.
        where: of each sample of the batch among `ids`.
        need: what the cache lacked when the change began.
        batch: as held; complete after `complete`.
    """

    def __init__(
        self, worker: int, version: bytes, ids: Ids, where: NDArray[np.int64], need: Need, batch: Batch
    ) -> None:
        self.worker = worker
        self.version = version
        self.ids = ids
        self.where = where
        self.need = need
        self.batch = batch

    def complete(self, codec: SampleCodec, payload: bytes | bytearray | memoryview) -> None:
        """Add what the worker sent; may be called again after an error, with another payload.

        Raises:
            PayloadError: as `SampleCodec.decode`; the change is then as before.
        """
        rows = np.flatnonzero(self.need.lacking)
        part = Batch(self.batch.labels[rows], self.batch.indices[rows])
        codec.decode(payload, self.ids[rows], self.need.held[rows], self.need.level, part)
        self.batch.labels[rows], self.batch.indices[rows] = part

    def samples(self, codec: SampleCodec) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (b, *shape) float32 and labels (b,) int64 of the batch at the level that was asked for."""
        values = codec.values(self.ids, self.batch.indices, self.need.level)
        where = torch.from_numpy(self.where)
        return values[where], torch.from_numpy(self.batch.labels)[where]


@dataclass(frozen=True, slots=True)
class Taken:
    """What a contribution's samples are: those that it brings, and those that the cache held.

    Attributes:
        change: the samples.
        epochs: (b,) in which they are taken.
        selection: which of the batch these are; None: all.
    """

    change: Change
    epochs: Ids
    selection: Selection | None


class SampleCache:
    """Samples of all workers of a job, within a byte budget."""

    def __init__(self, features: Features, budget_bytes: int, rows: Rows | None = None) -> None:
        """An empty cache of samples with these features; `rows`: where they lie, by default in memory."""
        if budget_bytes < 0:
            raise OptionError("cache_bytes", budget_bytes, "0 or more bytes")
        self._features = features
        self._budget_bytes = budget_bytes
        self._rows = rows or MemoryRows()
        self._entries: OrderedDict[tuple[int, int], Entry] = OrderedDict()
        self._versions: dict[int, bytes] = {}

    @staticmethod
    def row_bytes(features: Features) -> int:
        """Bytes of a sample's indices."""
        return features.count * _dtype(features).itemsize

    @property
    def entry_bytes(self) -> int:
        """What a sample takes of the budget."""
        return ENTRY_BYTES + self.row_bytes(self._features)

    @property
    def nbytes(self) -> int:
        """What of the budget is in use."""
        return len(self._entries) * self.entry_bytes

    def __len__(self) -> int:
        return len(self._entries)

    def held(self, worker: int, ids: Ids) -> NDArray[np.int64]:
        """(n,): the level that is held of each sample, or `NOTHING`."""
        entries = (self._entries.get((worker, id_)) for id_ in ids.tolist())
        return np.array([NOTHING if entry is None else entry.level for entry in entries], np.int64)

    def admit(self, worker: int, version: bytes) -> None:
        """A worker states the version of its samples: what is held of another version is forgotten."""
        if self._versions.get(worker) != version:
            for key in [key for key in self._entries if key[0] == worker]:
                self._forget(key)
            self._versions[worker] = version

    def begin(self, codec: SampleCodec, worker: int, ids: Ids, level: int) -> Change:
        """Look up the samples of a batch (b,), at `level`: a copy of what is held, and what lacks."""
        codec.checked_level(level)
        names, where = distinct(ids)
        finest = self.held(worker, names)
        batch = Batch(np.zeros(len(names), np.int64), np.zeros((len(names), self._features.count), np.uint16))
        for row, id_ in enumerate(names.tolist()):
            if (entry := self._entries.get((worker, id_))) is not None:
                batch.labels[row] = entry.label
                batch.indices[row] = np.frombuffer(self._rows.get(entry.place), _dtype(self._features))
        if (finest > level).any():
            batch = Batch(batch.labels, codec.coarser(names, batch.indices, finest, level))
        need = Need(np.minimum(finest, level), level)
        return Change(worker, self._versions.get(worker, b""), names, where, need, batch)

    def commit(self, change: Change) -> None:
        """The contribution of a completed change has entered its round; its samples are now the most recent.

        Nothing is kept of samples whose worker has stated another version since.
        """
        if self._versions.get(change.worker, b"") != change.version:
            return
        for row, id_ in enumerate(change.ids.tolist()):
            key = (change.worker, id_)
            entry = self._entries.get(key)
            if entry is None or entry.level < change.need.level:
                if entry is not None:
                    self._forget(key)
                place = self._rows.put(change.batch.indices[row].astype(_dtype(self._features)).tobytes())
                self._entries[key] = Entry(change.need.level, int(change.batch.labels[row]), place)
            self._entries.move_to_end(key)
            while self.nbytes > self._budget_bytes:
                self._forget(next(iter(self._entries)))

    def wipe(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._versions.clear()
        self._rows.clear()

    def save(self, path: Path) -> None:
        """Write all entries, in the order of their use; raises `OSError` as `ditherps.files.replacing`."""
        keys = np.array(list(self._entries), np.int64).reshape(-1, 2)
        facts = np.array([entry[:2] for entry in self._entries.values()], np.int64).reshape(-1, 2)
        versions = json.dumps({str(worker): version.hex() for worker, version in sorted(self._versions.items())})
        form = (len(keys), self.row_bytes(self._features))
        digest = _Digest(self._features, versions, keys, facts, form)
        for row in self._in_order():
            digest.add(row)
        metadata = {"versions": versions, "digest": digest.text}
        tensors = [
            Stored("keys", "I64", keys.shape, keys.nbytes),
            Stored("facts", "I64", facts.shape, facts.nbytes),
            Stored("rows", "U8", form, form[0] * form[1]),
        ]
        with replacing(path) as file:
            file.write(front(metadata, tensors))
            for part in (keys, facts):
                file.write(part.astype("<i8").tobytes())
            file.writelines(self._in_order())

    def _in_order(self) -> Iterator[bytes]:
        """The rows, the least recently used first."""
        return (self._rows.get(entry.place) for entry in self._entries.values())

    def load(self, path: Path) -> None:
        """Become what was saved, or as much of it as fits into the budget.

        Raises:
            PayloadError: the file is damaged, or of samples with other features; the cache is then empty.
        """
        self.wipe()
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                keys, facts, rows = (file.get_tensor(name) for name in ("keys", "facts", "rows"))
            text = metadata["versions"]
            versions = {int(worker): bytes.fromhex(version) for worker, version in json.loads(text).items()}
        except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
            raise PayloadError(f"the sample cache {path.name} cannot be read: {error}") from None
        digest = _Digest(self._features, text, keys, facts, (len(rows), rows.shape[-1]))
        digest.add(np.ascontiguousarray(rows).data)
        if metadata.get("digest") != digest.text or rows.shape != (len(keys), self.row_bytes(self._features)):
            raise PayloadError(f"the sample cache {path.name} is damaged, or holds samples with other features")
        self._versions = versions
        first = max(len(keys) - self._budget_bytes // self.entry_bytes, 0)
        for (worker, id_), (level, label), row in zip(
            keys[first:].tolist(), facts[first:].tolist(), rows[first:], strict=True
        ):
            self._entries[worker, id_] = Entry(level, label, self._rows.put(row.tobytes()))

    def _forget(self, key: tuple[int, int]) -> None:
        self._rows.free(self._entries.pop(key).place)


def _dtype(features: Features) -> np.dtype[np.uint8] | np.dtype[np.uint16]:
    """Of indices: those of 8-bit features fit into bytes at every level."""
    return np.dtype(np.uint8) if features.span <= 256 else np.dtype(np.uint16)


class _Digest:
    """Of what is saved: what the features are, versions, keys and facts of all entries, then their rows."""

    def __init__(
        self, features: Features, versions: str, keys: NDArray[np.int64], facts: NDArray[np.int64],
        form: tuple[int, int],
    ) -> None:  # fmt: skip
        self._state = xxhash.xxh3_128(f"{features!r} {versions} {form}".encode())
        for array in (keys, facts):
            self._state.update(f"{array.dtype} {array.shape}".encode())
            self._state.update(np.ascontiguousarray(array).data)

    def add(self, rows: bytes | memoryview) -> None:
        """The next rows."""
        self._state.update(rows)

    @property
    def text(self) -> str:
        """As it stands in the file."""
        return self._state.hexdigest()
