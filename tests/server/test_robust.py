"""Robust rules over real payloads: what they are, what one hostile sender can do, bits, memory; norms, refusals."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from ditherps.codecs import Codec, DecodeReport, Role, codec
from ditherps.config import AggregationConfig, JobConfig
from ditherps.dither import TILE
from ditherps.errors import OptionError, Reason, RefusedError
from ditherps.layout import Layout, TensorSpec, pack_buffers, unpack_buffers
from ditherps_server import blocks
from ditherps_server.aggregate import Aggregate, Sender, aggregate, merged_buffers, norms, weighted_mean
from ditherps_server.app import rules_of
from ditherps_server.rule import check_rule, least_contributions, trimmed
from tests.server.test_aggregate import sender, updates

N = blocks.BLOCK_TILES * TILE + 2 * TILE + 100
"""A whole chunk of the blocks, and a second that ends within a tile."""
MEDIAN, TRIMMED, KRUM = (AggregationConfig(name=name) for name in ("median", "trimmed_mean", "krum"))
MULTI = AggregationConfig(name="krum", chosen=3)
RULES = [MEDIAN, TRIMMED, KRUM, MULTI]
SOURCES, MIXED = [Role.SOURCE] * 8, [Role.SOURCE] * 6 + [Role.NESTED] * 3
CODECS: list[tuple[Codec, list[Role]]] = [
    (codec("none"), SOURCES),
    (codec("dqsg"), SOURCES),
    (codec("dqsg", coder="rans"), SOURCES),
    (codec("ndqsg"), MIXED),
]
by_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name}{rule.chosen}")
by_codec = pytest.mark.parametrize(("chosen", "roles"), CODECS, ids=[repr(c) for c, _ in CODECS])


def made(chosen: Codec, roles: Sequence[Role], vectors: Sequence[torch.Tensor]) -> list[Sender]:
    """Senders of very different weights, which robust rules do not heed."""
    return [sender(chosen, role, i, vectors[i], 1.0 + 1000.0 * (i == 2)) for i, role in enumerate(roles)]


def result(members: Sequence[Sender], rule: AggregationConfig, **options: Any) -> tuple[torch.Tensor, Aggregate]:
    into = torch.full((members[0].encoded.coordinates,), torch.nan)
    return into, aggregate(members, into, rule, **options)


def combined(rows: torch.Tensor, rule: AggregationConfig) -> torch.Tensor:
    """The rule over whole vectors in float64, as its paper says it."""
    count = len(rows)
    if rule.name == "krum":
        scores = []
        for i in range(count):
            distances = sorted(float(((rows[i] - rows[j]) ** 2).sum()) for j in range(count) if j != i)
            scores.append(sum(distances[: count - rule.attackers - 2]))
        return rows[sorted(range(count), key=lambda i: scores[i])[: rule.chosen]].mean(0)
    if rule.name == "median":
        return rows.quantile(0.5, dim=0)
    cut = -(-count // 8)
    return rows.sort(0).values[cut : count - cut].mean(0)


def decoded(members: Sequence[Sender], rule: AggregationConfig) -> list[torch.Tensor]:
    """All vectors, sources first, nested ones by the rule over the sources."""
    sources = [m.codec.decode(m.encoded, m.address).double() for m in members if m.role is Role.SOURCE]
    side = combined(torch.stack(sources), rule).float()
    return sources + [
        m.codec.decode(m.encoded, m.address, side_information=side).double() for m in members if m.role is Role.NESTED
    ]


def reference(members: Sequence[Sender], rule: AggregationConfig) -> torch.Tensor:
    return combined(torch.stack(decoded(members, rule)), rule)


@by_codec
@by_rule
def test_it_is_the_rule_over_whole_vectors(chosen: Codec, roles: list[Role], rule: AggregationConfig) -> None:
    members = made(chosen, roles, updates(len(roles), N))
    into, found = result(members, rule)
    torch.testing.assert_close(into.double(), reference(members, rule), rtol=1e-5, atol=2e-6)
    nested = roles.count(Role.NESTED)
    assert found.report == DecodeReport(nested * N, nested * -(-N // TILE), 0)
    assert len(found.chosen) == (rule.chosen if rule.name == "krum" else len(roles))


@by_codec
@by_rule
def test_threads_and_chunks_change_no_bit(
    chosen: Codec, roles: list[Role], rule: AggregationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = made(chosen, roles, updates(len(roles), N))
    alone = result(members, rule)
    for threads, tiles in ((1, 16), (3, 16), (2, 1), (2, 7)):
        monkeypatch.setattr(blocks, "BLOCK_TILES", tiles)
        with ThreadPoolExecutor(threads) as pool:
            again = result(members, rule, pool=pool)
        assert torch.equal(alone[0], again[0])
        assert alone[1] == again[1]


@by_codec
@by_rule
def test_the_order_of_the_senders_changes_no_bit(chosen: Codec, roles: list[Role], rule: AggregationConfig) -> None:
    members = made(chosen, roles, updates(len(roles), N))
    into, _ = result(members, rule)
    assert torch.equal(result(members[::-1], rule)[0], into)
    assert torch.equal(result([*members[3:], *members[:3]], rule)[0], into)


def test_the_median_of_three_equal_senders_is_theirs() -> None:
    vector = updates(1, N)[0]
    assert torch.equal(result(made(codec("none"), SOURCES[:3], [vector] * 3), MEDIAN)[0], vector)


def test_the_trimmed_mean_without_a_trim_is_the_mean() -> None:
    members = made(codec("dqsg"), SOURCES, updates(8, N))
    mean, untrimmed = AggregationConfig(name="mean"), AggregationConfig(name="trimmed_mean", trim=0)
    torch.testing.assert_close(result(members, untrimmed)[0], result(members, mean)[0], rtol=1e-5, atol=1e-6)
    assert not untrimmed.robust


def test_the_mean_counts_every_worker_alike_and_the_weighted_mean_does_not() -> None:
    members = made(codec("dqsg"), SOURCES, updates(8, N, spread=1.0))
    plain, weighted = (result(members, AggregationConfig(name=name))[0] for name in ("mean", "weighted_mean"))
    alike = [replace(member, weight=1.0) for member in members]
    into = torch.empty(N)
    weighted_mean(alike, into)
    assert torch.equal(plain, into)
    assert not torch.allclose(plain, weighted, atol=0.1)


ATTACKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "flipped": lambda vector: -100 * vector,
    "huge": lambda vector: torch.full_like(vector, 1e30),
    "zero": torch.zeros_like,
    "noise": lambda vector: 50 * torch.randn(len(vector), generator=torch.Generator().manual_seed(5)),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("hostile", [0, 4, 7])
def test_one_of_eight_moves_no_coordinate_beyond_the_others(attack: str, hostile: int) -> None:
    vectors = updates(8, N)
    vectors[hostile] = ATTACKS[attack](vectors[hostile])
    members = made(codec("none"), SOURCES, vectors)
    others = torch.stack(vectors[:hostile] + vectors[hostile + 1 :])
    for rule in RULES:
        into, found = result(members, rule)
        slack = 1e-5 * others.abs().amax(0)  # rounding
        assert (into >= others.amin(0) - slack).all(), rule
        assert (into <= others.amax(0) + slack).all(), rule
        assert (hostile in found.chosen) == (rule.name != "krum")


@by_rule
@pytest.mark.parametrize("hostile", [1, 7], ids=["source", "nested"])
def test_a_hostile_one_among_nested_senders(rule: AggregationConfig, hostile: int) -> None:
    """The others' nested contributions are still decoded right: the side information is robust too."""
    vectors = updates(9, N)
    honest = decoded(made(codec("ndqsg"), MIXED, vectors), rule)
    del honest[hostile]
    vectors[hostile] = -100 * vectors[hostile]
    into, found = result(made(codec("ndqsg"), MIXED, vectors), rule)
    assert found.report.failed_tiles == (-(-N // TILE) if hostile == 7 else 0)
    others = torch.stack(honest)
    slack = 1e-5 * others.abs().amax(0)  # rounding
    assert (into >= others.amin(0) - slack).all()
    assert (into <= others.amax(0) + slack).all()


def test_krum_chooses_those_that_are_close_and_the_lowest_index_among_equals() -> None:
    near = updates(1, N)[0]
    for far in (0, 3, 6):
        vectors = [near + (5.0 + i) * (i == far) for i in range(7)]
        members = made(codec("none"), SOURCES[:7], vectors)
        honest = [i for i in range(7) if i != far]
        assert result(members, KRUM)[1].chosen == (honest[0],)
        assert result(members, AggregationConfig(name="krum", chosen=4))[1].chosen == tuple(honest[:4])
        assert torch.equal(result(members, KRUM)[0], near)


@pytest.mark.parametrize(
    ("rule", "roles", "reason"),
    [
        (MEDIAN, SOURCES[:2], Reason.QUORUM),
        (TRIMMED, SOURCES[:2], Reason.QUORUM),
        (KRUM, SOURCES[:4], Reason.QUORUM),
        (MEDIAN, [Role.SOURCE] * 2 + [Role.NESTED] * 3, Reason.QUORUM),
        (MEDIAN, [Role.NESTED] * 3, Reason.NO_SIDE_INFORMATION),
    ],
)
def test_too_few_are_refused(rule: AggregationConfig, roles: list[Role], reason: Reason) -> None:
    with pytest.raises(RefusedError) as refused:
        result(made(codec("ndqsg"), roles, updates(5, 100)), rule)
    assert refused.value.reason is reason


@pytest.mark.parametrize("count", [8, 24])
def test_memory_is_a_chunk_of_each_sender_not_the_model(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy and torch allocate apart: torch's blocks are counted as they are made, numpy's are traced."""
    n = 80 * TILE
    taken: list[torch.Tensor] = []
    vector = updates(1, n)[0]
    members = [sender(codec("dqsg"), Role.SOURCE, i, vector, 1.0) for i in range(count)]
    real = torch.empty

    def counted(*size: Any, **kind: Any) -> torch.Tensor:
        taken.append(real(*size, **kind))
        return taken[-1]

    monkeypatch.setattr(torch, "empty", counted)
    into = real(n)
    for rule in RULES:
        aggregate(members, into, rule)
        chunk = 4 * TILE * blocks.BLOCK_TILES
        assert sum(block.nbytes for block in taken) <= (count + 1) * chunk * (2 if rule.name == "krum" else 1)
        taken.clear()
        tracemalloc.start()
        aggregate(members, into, rule)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        taken.clear()
        assert peak < (1 << 20) + 8 * count * count * blocks.BLOCK_TILES * 3
    assert count * vector.nbytes > 2 * (count + 1) * chunk


@by_codec
def test_norms_are_those_of_what_is_decoded(chosen: Codec, roles: list[Role]) -> None:
    vectors = [(1.0 + 0.01 * i) * vector for i, vector in enumerate(updates(len(roles), N))]
    members = made(chosen, roles, vectors)
    side = reference([m for m in members if m.role is Role.SOURCE], MEDIAN).float()
    found = norms(members, N, MEDIAN, None)
    for member, norm in zip(members, found, strict=True):
        nested = {"side_information": side} if member.role is Role.NESTED else {}
        decoded = member.codec.decode(member.encoded, member.address, **nested)  # type: ignore[arg-type]
        assert norm == pytest.approx(float(decoded.double().norm()), rel=1e-6)
    with ThreadPoolExecutor(3) as pool:
        assert norms(members, N, MEDIAN, pool) == found


class TestBuffers:
    layout = Layout((), (TensorSpec("mean", (2,), "float32"), TensorSpec("count", (), "int64"),
                         TensorSpec("seen", (), "bool")))  # fmt: skip

    def merged(self, rule: AggregationConfig, chosen: Sequence[int] = range(4)) -> list[Any]:
        values = [([1.0, 10.0], 5, True), ([2.0, 20.0], 6, True), ([3.0, 60.0], 7, False), ([1e9, -1e9], 2**60, False)]
        packed = [
            memoryview(pack_buffers([torch.tensor(mean), torch.tensor(count), torch.tensor(seen)]))
            for mean, count, seen in values
        ]
        merged = merged_buffers(self.layout, packed, [1.0] * 4, rule, chosen)
        return [tensor.tolist() for tensor in unpack_buffers(self.layout, merged)]

    def test_they_pass_the_rule(self) -> None:
        assert self.merged(MEDIAN) == [[2.5, 15.0], 6, False]
        assert self.merged(TRIMMED) == [[2.5, 15.0], 6, False]
        assert self.merged(MULTI, chosen=(0, 1, 2)) == [[2.0, 30.0], 6, True]
        assert self.merged(KRUM, chosen=(1,)) == [[2.0, 20.0], 6, True]

    def test_the_mean_takes_the_largest_count(self) -> None:
        assert self.merged(AggregationConfig(name="mean"))[1:] == [2**60, True]


class TestRule:
    @pytest.mark.parametrize(("trim", "count", "cut"), [(0.125, 8, 1), (0.125, 3, 1), (0.125, 9, 2), (0.25, 8, 2),
                                                        (0.0, 8, 0), (0.1, 10, 1), (0.3, 10, 3)])  # fmt: skip
    def test_the_share_that_is_cut(self, trim: float, count: int, cut: int) -> None:
        assert trimmed(AggregationConfig(name="trimmed_mean", trim=trim), count) == (cut, count - cut)

    @pytest.mark.parametrize("trim", [0.0, 0.1, 0.125, 0.25, 0.4, 0.45])
    def test_something_is_left_of_the_fewest_and_of_all_above(self, trim: float) -> None:
        rule = AggregationConfig(name="trimmed_mean", trim=trim)
        for count in range(least_contributions(rule), 100):
            first, last = trimmed(rule, count)
            assert first < last

    @pytest.mark.parametrize(
        ("says", "options"),
        [
            ("aggregation.name = 'median'", {"aggregation": {"name": "median"}, "workers": 2}),
            ("at least 3 contributions", {"aggregation": {"name": "trimmed_mean"}, "workers": 3, "quorum": 0.5}),
            ("at least 5 contributions", {"aggregation": {"name": "krum"}, "workers": 4}),
            ("at least 7 contributions", {"aggregation": {"name": "krum", "attackers": 2}, "workers": 6}),
            ("at least 7 contributions", {"aggregation": {"name": "krum", "chosen": 4}, "workers": 6}),
            ("at least 3 sources", {"aggregation": {"name": "median"}, "workers": 5, "codec": "ndqsg",
                                    "codec_options": {"side_fraction": 0.4}}),
            ("sample_fraction = 0.2 can leave 2", {"aggregation": {"name": "median"}, "workers": 8,
                                                   "sample_fraction": 0.2}),
            ("min_workers = 2 can leave 2", {"aggregation": {"name": "median"}, "workers": 8, "min_workers": 2}),
            ("only side = 'sources'", {"aggregation": {"name": "median"}, "workers": 8, "codec": "ndqsg",
                                       "codec_options": {"side": "running"}}),
            ("max_norm = 3.0", {"max_norm": 3, "codec": "ndqsg", "codec_options": {"side": "running"}}),
        ],
    )  # fmt: skip
    def test_unsafe_pairs_are_refused_by_name(self, says: str, options: dict[str, Any]) -> None:
        job = JobConfig.model_validate({"codec": "dqsg", **options})
        used = codec(job.codec, **job.codec_options)
        with pytest.raises(OptionError, match=says) as refused:
            check_rule(job, used, rules_of(job, used, server_evaluates=True))
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("name", ["weighted_mean", "mean", "median", "trimmed_mean", "krum"])
    def test_eight_workers_take_every_rule(self, name: str) -> None:
        for chosen in ("dqsg", "ndqsg"):
            workers = 10 if chosen == "ndqsg" and name == "krum" else 8
            job = JobConfig.model_validate({"codec": chosen, "workers": workers, "aggregation": {"name": name}})
            check_rule(job, codec(chosen), rules_of(job, codec(chosen), server_evaluates=True))

    def test_an_option_of_another_rule_is_refused(self) -> None:
        with pytest.raises(ValueError, match="option of trimmed_mean"):
            AggregationConfig(name="krum", trim=0.3)
