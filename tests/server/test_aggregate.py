"""Aggregation: equal to a float64 reference, and the same bits for any arrival, any threads, any pool."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from ditherps.codecs import Codec, DecodeReport, Role, codec
from ditherps.dither import TILE, Address, Domain
from ditherps.errors import Reason, RefusedError
from ditherps.layout import FlatModel, Layout, TensorSpec, pack_buffers, unpack_buffers
from ditherps_server import aggregate
from ditherps_server.aggregate import Sender, mean_buffers, weighted_mean

N = 2 * aggregate.CHUNK_TILES * TILE + 3 * TILE + 100
"""Two whole chunks of the aggregation and a third that ends within a tile."""


def updates(count: int, n: int = N, seed: int = 0, spread: float = 0.02) -> list[torch.Tensor]:
    """Vectors near each other, as the updates of one round are."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, generator=generator)
    return [shared + spread * torch.randn(n, generator=generator) for _ in range(count)]


def sender(chosen: Codec, role: Role, index: int, update: torch.Tensor, weight: float) -> Sender:
    used = chosen.for_role(role)
    address = Address(seed=11, round=3, sender=index, domain=Domain.UPDATE)
    return Sender(role, used, used.encode(update, address), address, weight)


def senders(chosen: Codec, roles: Sequence[Role], n: int = N) -> list[Sender]:
    weights = [32.0, 7.0, 64.0, 1.0, 20.0]
    return [
        sender(chosen, role, index, update, weights[index])
        for index, (role, update) in enumerate(zip(roles, updates(len(roles), n), strict=True))
    ]


def reference(members: Sequence[Sender], *, running: bool = False) -> torch.Tensor:
    """The weighted mean in float64, sender after sender, each decoded whole."""
    total, weight = torch.zeros(members[0].encoded.coordinates, dtype=torch.float64), 0.0
    sources = [member for member in members if member.role is Role.SOURCE]
    nested = [member for member in members if member.role is Role.NESTED]
    for member in sources:
        total += member.weight * member.codec.decode(member.encoded, member.address).double()
        weight += member.weight
    side = (total / weight).float()
    for member in nested:
        if running:
            side = (total / weight).float()
        decoded = member.codec.decode(member.encoded, member.address, side_information=side)
        total += member.weight * decoded.double()
        weight += member.weight
    return total / weight


def mean(members: Sequence[Sender], **options: object) -> tuple[torch.Tensor, DecodeReport]:
    into = torch.full((members[0].encoded.coordinates,), torch.nan)
    report = weighted_mean(members, into, **options)  # type: ignore[arg-type]
    return into, report


ALL_SOURCES = [Role.SOURCE] * 4
MIXED = [Role.SOURCE, Role.SOURCE, Role.NESTED, Role.NESTED, Role.NESTED]
CODECS = [
    (codec("none"), ALL_SOURCES),
    (codec("bf16"), ALL_SOURCES),
    (codec("dqsg"), ALL_SOURCES),
    (codec("dqsg", step="rms", resolution=0.5), ALL_SOURCES),
    (codec("dqsg", bucket=0), ALL_SOURCES),
    (codec("dqsg", bucket=64), ALL_SOURCES),
    (codec("ndqsg"), MIXED),
    (codec("ndqsg", bucket=4096, ratio=5), MIXED),
]
IDS = [repr(chosen) for chosen, _ in CODECS]


@pytest.mark.parametrize(("chosen", "roles"), CODECS, ids=IDS)
def test_it_is_the_weighted_mean(chosen: Codec, roles: list[Role]) -> None:
    members = senders(chosen, roles)
    into, report = mean(members)
    torch.testing.assert_close(into.double(), reference(members), rtol=1e-5, atol=2e-6)
    nested = sum(role is Role.NESTED for role in roles)
    assert report.tiles == nested * -(-N // TILE)
    assert report.coordinates == nested * N
    assert report.failed_tiles == 0


def test_unquantized_vectors_give_their_own_mean() -> None:
    vectors = updates(3)
    members = [sender(codec("none"), Role.SOURCE, i, vector, float(i + 1)) for i, vector in enumerate(vectors)]
    expected = sum((i + 1) * vector.double() for i, vector in enumerate(vectors)) / 6
    torch.testing.assert_close(mean(members)[0].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("chosen", "roles"), CODECS, ids=IDS)
def test_the_pool_changes_no_bit(chosen: Codec, roles: list[Role]) -> None:
    members = senders(chosen, roles)
    alone, report = mean(members)
    for threads in (1, 2, 5):
        with ThreadPoolExecutor(threads) as pool:
            into, again = mean(members, pool=pool)
        assert torch.equal(into, alone)
        assert again == report


def test_it_does_not_depend_on_what_was_in_the_memory_or_on_an_earlier_round() -> None:
    members = senders(codec("dqsg"), ALL_SOURCES)
    first, _ = mean(members)
    into = torch.full((N,), 3.0)
    weighted_mean(members, into)
    assert torch.equal(into, first)


@pytest.mark.parametrize("chunk_tiles", [1, 7, 1000])
def test_the_size_of_its_chunks_changes_no_bit(chunk_tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen, roles in (CODECS[2], CODECS[6]):
        members = senders(chosen, roles)
        before = mean(members)
        monkeypatch.setattr(aggregate, "CHUNK_TILES", chunk_tiles)
        after = mean(members)
        assert torch.equal(before[0], after[0])
        assert before[1] == after[1]


@pytest.mark.parametrize("n", [0, 1, TILE - 1, TILE, TILE + 1])
def test_lengths_about_a_tile(n: int) -> None:
    for chosen, roles in (CODECS[0], CODECS[2], CODECS[6]):
        members = senders(chosen, roles, n)
        torch.testing.assert_close(mean(members)[0].double(), reference(members), rtol=1e-5, atol=2e-6)


class TestNested:
    def test_sources_stand_before_nested_whatever_their_index(self) -> None:
        chosen, vectors = codec("ndqsg"), updates(4)
        roles = [Role.NESTED, Role.SOURCE, Role.NESTED, Role.SOURCE]
        members = [sender(chosen, role, i, vectors[i], 8.0) for i, role in enumerate(roles)]
        into, report = mean(members)
        torch.testing.assert_close(into.double(), reference(members), rtol=1e-5, atol=2e-6)
        assert (report.tiles, report.failed_tiles) == (2 * -(-N // TILE), 0)

    def test_where_decoding_succeeds_nested_equals_plain(self) -> None:
        """Same fine step, side information near enough: the nested senders' share is dqsg's bit for bit."""
        chosen, vectors = codec("ndqsg"), updates(3)
        members = [sender(chosen, MIXED[i + 1], i, vectors[i], 4.0) for i in range(3)]
        assert [member.role for member in members] == [Role.SOURCE, Role.NESTED, Role.NESTED]
        plain = [sender(chosen, Role.SOURCE, i, vectors[i], 4.0) for i in range(3)]
        nested, report = mean(members)
        assert report.failed_tiles == 0
        assert torch.equal(nested, mean(plain)[0])
        assert members[1].encoded.nbytes < plain[1].encoded.nbytes

    def test_running_side_information_is_the_mean_of_all_before(self) -> None:
        members = senders(codec("ndqsg", side="running", ratio=3), MIXED)
        into, _ = mean(members, running_side=True)
        torch.testing.assert_close(into.double(), reference(members, running=True), rtol=1e-5, atol=2e-6)

    def test_running_and_sources_differ_where_the_sources_are_far(self) -> None:
        """A source far off and nested senders that agree: only the running mean comes near them."""
        chosen, n = codec("ndqsg", bucket=4096), 4 * TILE
        near = updates(4, n, spread=0.001)
        vectors = [near[0] + 1.2 * torch.randn(n, generator=torch.Generator().manual_seed(9)), *near[1:]]
        weights = [1.0, 1000.0, 1.0, 1.0]
        members = [
            sender(chosen, Role.SOURCE if i == 0 else Role.NESTED, i, vector, weights[i])
            for i, vector in enumerate(vectors)
        ]
        by_sources, running = mean(members)[1], mean(members, running_side=True)[1]
        assert 0 < running.failed_tiles <= by_sources.failed_tiles
        assert by_sources.tiles == running.tiles == 3 * 4

    def test_failed_tiles_are_reported(self) -> None:
        chosen, n = codec("ndqsg"), 3 * TILE
        vector = updates(1, n)[0]
        far = vector.clone()
        far[TILE + 5] = -far[TILE + 5] + 5
        members = [sender(chosen, Role.SOURCE, 0, far, 1.0), sender(chosen, Role.NESTED, 1, vector, 1.0)]
        report = mean(members)[1]
        assert (report.tiles, report.failed_tiles) == (3, 1)

    def test_nested_without_a_source_is_refused(self) -> None:
        members = [sender(codec("ndqsg"), Role.NESTED, i, vector, 1.0) for i, vector in enumerate(updates(2, 100))]
        with pytest.raises(RefusedError) as refused:
            mean(members)
        assert refused.value.reason is Reason.NO_SIDE_INFORMATION


class TestBuffers:
    layout = Layout(
        (),
        (TensorSpec("mean", (3,), "float32"), TensorSpec("count", (), "int64"), TensorSpec("seen", (2,), "bool"),
         TensorSpec("half", (1,), "float16")),
    )  # fmt: skip

    def packed(self, mean: list[float], count: int, seen: list[bool], half: float) -> memoryview:
        tensors = [
            torch.tensor(mean, dtype=torch.float32),
            torch.tensor(count),
            torch.tensor(seen),
            torch.tensor([half]).half(),
        ]
        return memoryview(pack_buffers(tensors))

    def test_floats_are_averaged_and_counts_take_the_largest(self) -> None:
        merged = mean_buffers(
            self.layout,
            [self.packed([1, 2, 3], 2**40, [True, False], 1.0), self.packed([5, 2, -1], 3, [False, False], 3.0)],
            [3.0, 1.0],
        )
        mean_, count, seen, half = unpack_buffers(self.layout, merged)
        assert mean_.tolist() == [2.0, 2.0, 2.0]
        assert (int(count), seen.tolist(), half.tolist()) == (2**40, [True, False], [1.5])

    def test_one_workers_buffers_stay_as_they_are(self) -> None:
        one = self.packed([0.1, -1e-30, 3e30], 7, [True, True], 0.1)
        assert mean_buffers(self.layout, [one], [17.0]) == bytes(one)

    def test_equal_buffers_stay_as_they_are(self) -> None:
        one = self.packed([0.1, -1e-30, 3e30], 7, [True, True], 0.1)
        assert mean_buffers(self.layout, [one] * 3, [1.0, 2.0, 4.0]) == bytes(one)

    def test_without_buffers(self) -> None:
        assert mean_buffers(FlatModel(nn.Linear(1, 1)).layout, [memoryview(b"")] * 2, [1.0, 1.0]) == b""

    def test_float64_reference(self) -> None:
        draw = random.Random(4)
        values = [[draw.gauss(0, 10) for _ in range(3)] for _ in range(5)]
        weights = [draw.randint(1, 99) for _ in range(5)]
        merged = mean_buffers(self.layout, [self.packed(v, 0, [False] * 2, 0.0) for v in values],
                              [float(w) for w in weights])  # fmt: skip
        expected = torch.tensor(values, dtype=torch.float32).double().T @ torch.tensor(weights).double() / sum(weights)
        torch.testing.assert_close(unpack_buffers(self.layout, merged)[0].double(), expected, rtol=1e-6, atol=1e-6)
