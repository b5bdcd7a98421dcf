"""A shard's ids, said once and in few bits."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditherps.errors import PayloadError, UserError
from ditherps.samples.shard import VERSION_BYTES, pack, read, unpack, version
from ditherps.sampling import split
from ditherps.tasks import Samples, load_task


@given(st.one_of(st.sets(st.integers(0, 2**32 - 1), max_size=40), st.sets(st.integers(0, 80), max_size=60)))
def test_it_arrives(ids: set[int]) -> None:
    shard = np.array(sorted(ids), np.int64)
    found = unpack(pack(shard))
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, shard)


@pytest.mark.parametrize("workers", [1, 4, 100])
def test_it_takes_little_more_than_there_are_choices(workers: int) -> None:
    samples = Samples(torch.zeros(60_000, 1), torch.zeros(60_000, dtype=torch.int64))
    shard = split(samples, workers, 3)[0]
    share = 1 / workers
    entropy = 60_000 * (-share * np.log2(share) - (1 - share) * np.log2(max(1 - share, 1e-9)))
    # A run of all samples takes a bit each; of others Rice codes lose some per cent to the entropy.
    assert 8 * len(pack(shard)) < max(1.08 * entropy, 60_000 * (workers == 1)) + 200
    np.testing.assert_array_equal(unpack(pack(shard)), shard)


@pytest.mark.parametrize("shard", [[3, 3], [4, 2], [-1, 2], [0, 2**32]])
def test_what_is_no_shard_is_not_packed(shard: list[int]) -> None:
    with pytest.raises(UserError, match="ascend"):
        pack(np.array(shard))


@given(st.binary(max_size=60))
def test_noise_is_refused_or_ascends(data: bytes) -> None:
    try:
        found = unpack(data)
    except PayloadError:
        return
    assert (np.diff(found) > 0).all()
    assert found.size == 0 or 0 <= found[0] <= found[-1] < 2**32


def test_damage_is_refused() -> None:
    data = pack(np.array([1, 5, 9, 200, 3000]))
    for size in range(len(data)):
        with pytest.raises(PayloadError):
            unpack(data[:size])
    with pytest.raises(PayloadError):
        unpack(data + b"\0")
    beyond = struct.pack("<IBI", 2, 32, 3) + b"\x06" + b"\xff" * 8  # 2^32 + 2^32 - 1, and as much again
    with pytest.raises(PayloadError, match="beyond 32 bits"):
        unpack(beyond)
    with pytest.raises(PayloadError):  # sizes that would take gigabytes
        unpack(struct.pack("<IBI", 2**32 - 1, 32, 2**32 - 1))


def test_it_takes_memory_for_as_many_as_there_can_be() -> None:
    """Not for as many as a message can name, which a bit is enough for."""
    many = bytes(VERSION_BYTES) + pack(np.arange(1 << 20))
    most = bytes(VERSION_BYTES) + struct.pack("<IBI", 1 << 25, 0, 1 << 25) + b"\xff" * (1 << 22)
    long = bytes(VERSION_BYTES) + struct.pack("<IBI", 1 << 16, 32, 1 << 16) + b"\xff" * ((1 << 13) + (1 << 18))
    assert len(read(many, 1 << 20)[1]) == 1 << 20
    for data, samples, match, ids in (
        (many, 1000, "at most 1000", 0), (most, 0, "at most", 0), (long, 1 << 16, "beyond 32 bits", 1 << 16),
    ):  # fmt: skip
        tracemalloc.start()
        with pytest.raises(PayloadError, match=match):
            read(data, samples)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * len(data) + 80 * ids + (1 << 16), match


def test_the_version_changes_with_ids_labels_and_features() -> None:
    samples = load_task("digits").load(None, train=True)
    shard = np.arange(0, 300, 3)
    first = version(samples, shard)
    assert version(samples, shard.copy()) == first
    assert len(first) == 16
    assert version(samples, shard + 1) != first
    for row, changed in ((3, True), (4, False)):  # one that it has, and one that it has not
        features, labels = samples.features.clone(), samples.labels.clone()
        features[row, 2, 2] += 1
        labels[row] = (labels[row] + 1) % 10
        assert (version(Samples(features, samples.labels), shard) != first) == changed
        assert (version(Samples(samples.features, labels), shard) != first) == changed
