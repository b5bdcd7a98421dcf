"""Staged contributions -> one update, in fixed order, chunk by chunk over all senders.

Memory is the update plus the compressed bytes, whatever the number of workers, and for robust rules a small chunk of
each sender for each thread. The means add the senders of each chunk in the order of their index, sources before nested;
robust rules order them by value, and ties by index. So no bit depends on arrival, threads or the size of the pool.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ditherps.codecs import DecodeReport, Role
from ditherps.config import AggregationConfig
from ditherps.dither import TILE
from ditherps.errors import Reason, RefusedError
from ditherps.kernels import robust
from ditherps.layout import Layout, pack_buffers, unpack_buffers
from ditherps.pool import on_threads
from ditherps_server.blocks import Blocks, Sender, SideRule
from ditherps_server.rule import least_contributions, trimmed

__all__ = [
    "CHUNK_TILES",
    "Aggregate",
    "Sender",
    "aggregate",
    "mean_buffers",
    "merged_buffers",
    "norms",
    "weighted_mean",
]

CHUNK_TILES = 32
"""Tiles of one task: the sum of a chunk (512 KiB) stays in a core's cache while all senders are added."""


class Aggregate(NamedTuple):
    """What an aggregation found: of the nested decoding, and whose contributions are in it (all of them but with krum).

    `chosen` are places in the sequence of senders, ascending by index.
    """

    report: DecodeReport
    chosen: tuple[int, ...]


def aggregate(
    senders: Sequence[Sender],
    into: torch.Tensor,
    rule: AggregationConfig,
    *,
    running_side: bool = False,
    pool: Executor | None = None,
) -> Aggregate:
    """Write the senders' update by the job's rule into `into` (float32, CPU, one value a coordinate).

    Robust rules form the side information of nested senders by themselves, over the sources. Raises `RefusedError`:
    `no_side_information` when there are nested senders without a source, `quorum` when the senders, or the sources
    among which side information is formed, are too few for the rule.
    """
    everybody = tuple(range(len(senders)))
    if rule.name == "mean":
        senders = [replace(sender, weight=1.0) for sender in senders]
    if rule.name in ("mean", "weighted_mean"):
        return Aggregate(weighted_mean(senders, into, running_side=running_side, pool=pool), everybody)
    _check_counts(senders, rule)
    if rule.name == "krum":
        return _krum(senders, into, rule, pool)

    def middle(span: tuple[int, int], block: torch.Tensor, report: DecodeReport) -> DecodeReport:
        _middle(block, rule, into[span[0] : span[1]])
        return report

    reports = Blocks(senders, len(into), _middle_side(rule), pool).map(middle)
    return Aggregate(sum(reports, DecodeReport()), everybody)


def norms(senders: Sequence[Sender], coordinates: int, rule: AggregationConfig, pool: Executor | None) -> list[float]:
    """The L2 norm of each sender's decoded vector; nested ones are decoded with side information by the rule.

    Raises `RefusedError` as `aggregate`.
    """
    _check_counts(senders, rule)
    side_rule = _side_rule(senders, coordinates, rule, pool)
    squares = Blocks(senders, coordinates, side_rule, pool).squared_norms()
    return [math.sqrt(square) for square in squares.tolist()]


def can_decode(senders: Sequence[Sender], rule: AggregationConfig) -> bool:
    """Whether there are enough sources among the senders for the nested ones to be decoded with."""
    sources = sum(sender.role is Role.SOURCE for sender in senders)
    return sources == len(senders) or sources >= least_contributions(rule)


def _check_counts(senders: Sequence[Sender], rule: AggregationConfig) -> None:
    if all(sender.role is Role.NESTED for sender in senders):
        raise RefusedError(Reason.NO_SIDE_INFORMATION, "nested contributions without any source to decode them with")
    least = least_contributions(rule)
    if len(senders) < least:
        raise RefusedError(Reason.QUORUM, f"{rule.name} takes at least {least} contributions; there are {len(senders)}")
    if not can_decode(senders, rule):
        raise RefusedError(Reason.QUORUM, f"{rule.name} takes at least {least} sources to decode nested contributions")


def _middle(block: torch.Tensor, rule: AggregationConfig, into: torch.Tensor) -> None:
    """The median or trimmed mean of the rows of `block`."""
    first, last = trimmed(rule, len(block))
    pairs = robust.sorting_network(len(block), first, last)
    robust.middle_mean(block.numpy().view(np.int32), pairs, np.int64(first), np.int64(last), into.numpy())


def _middle_side(rule: AggregationConfig) -> SideRule:
    return lambda block, sources, into: _middle(block[list(sources)], rule, into)


def _mean_side(rows: Sequence[int] | None = None, weights: Sequence[float] | None = None) -> SideRule:
    """The mean of `rows` (default: of all sources), added in their order; `weights` are of all rows."""

    def mean(block: torch.Tensor, sources: Sequence[int], into: torch.Tensor) -> None:
        chosen = sources if rows is None else rows
        into.zero_()
        for row in chosen:
            into.add_(block[row] if weights is None else block[row] * weights[row])
        into.div_(len(chosen) if weights is None else sum(weights[row] for row in chosen))

    return mean


def _side_rule(senders: Sequence[Sender], coordinates: int, rule: AggregationConfig, pool: Executor | None) -> SideRule:
    match rule.name:
        case "median" | "trimmed_mean":
            return _middle_side(rule)
        case "krum" if any(sender.role is Role.NESTED for sender in senders):
            places = [place for place, sender in enumerate(senders) if sender.role is Role.SOURCE]
            sources = [senders[place] for place in places]
            distances = Blocks(sources, coordinates, _mean_side(), pool).squared_distances()
            return _mean_side([places[near] for near in _chosen(distances, sources, rule)])
        case "weighted_mean":
            return _mean_side(weights=[sender.weight for sender in senders])
        case _:
            return _mean_side()


def _krum(senders: Sequence[Sender], into: torch.Tensor, rule: AggregationConfig, pool: Executor | None) -> Aggregate:
    """Passes over the chunks: distances between the sources where there are nested senders, between all, the mean."""
    blocks = Blocks(senders, len(into), _side_rule(senders, len(into), rule, pool), pool)
    chosen = _chosen(blocks.squared_distances(), senders, rule)
    mean = _mean_side(chosen)

    def add(span: tuple[int, int], block: torch.Tensor, report: DecodeReport) -> DecodeReport:
        mean(block, (), into[span[0] : span[1]])
        return report

    reports = blocks.map(add)
    return Aggregate(sum(reports, DecodeReport()), chosen)


def _chosen(distances: NDArray[np.float64], senders: Sequence[Sender], rule: AggregationConfig) -> tuple[int, ...]:
    """The places with the smallest sums of squared distances to their n - f - 2 nearest; ties and result by index."""
    nearest = len(senders) - rule.attackers - 2
    # Row by row without the sender itself, added from the nearest on.
    scores = [sum(np.sort(np.delete(row, place))[:nearest].tolist()) for place, row in enumerate(distances)]
    indices = [sender.address.sender for sender in senders]
    best = sorted(range(len(senders)), key=lambda place: (scores[place], indices[place]))[: rule.chosen]
    return tuple(sorted(best, key=lambda place: indices[place]))


def weighted_mean(
    senders: Sequence[Sender], into: torch.Tensor, *, running_side: bool = False, pool: Executor | None = None
) -> DecodeReport:
    """Write the senders' weighted mean into `into` (float32, CPU, one value a coordinate); reports the nested decoding.

    Side information of nested senders is the mean of the sources, or with `running_side` the paper's running mean over
    all senders decoded before (algorithms.md, section 1.2). Senders stand in the order of their index. Raises
    `RefusedError` (`no_side_information`) when there are nested senders without a source.
    """
    ordered = sorted(senders, key=lambda sender: sender.role is Role.NESTED)
    sources = [sender for sender in ordered if sender.role is Role.SOURCE]
    nested = ordered[len(sources) :]
    if nested and not sources:
        raise RefusedError(Reason.NO_SIDE_INFORMATION, "nested contributions without any source to decode them with")
    total = sum(sender.weight for sender in ordered)
    sources, nested = ([replace(sender, weight=sender.weight / total) for sender in part] for part in (sources, nested))
    unit = math.lcm(TILE * CHUNK_TILES, *(sender.codec.chunk_coordinates for sender in ordered))
    spans = [(first, min(first + unit, len(into))) for first in range(0, len(into), unit)]

    def add(span: tuple[int, int]) -> DecodeReport:
        return _add_chunk(sources, nested, into[span[0] : span[1]], span, running_side)

    return sum(on_threads(pool, add, spans), DecodeReport(0, 0, 0))


def _add_chunk(
    sources: Sequence[Sender],
    nested: Sequence[Sender],
    total: torch.Tensor,
    span: tuple[int, int],
    running_side: bool,
) -> DecodeReport:
    total.zero_()
    report = DecodeReport(0, 0, 0)
    weight = 0.0
    for sender in sources:
        sender.codec.accumulate(sender.encoded, sender.address, total, sender.weight, span)
        weight += sender.weight
    side = torch.div(total, weight) if nested else None
    for place, sender in enumerate(nested):
        if running_side and place:
            torch.div(total, weight, out=side)
        report += sender.codec.accumulate(
            sender.encoded, sender.address, total, sender.weight, span, side_information=side
        )
        weight += sender.weight
    return report


def mean_buffers(layout: Layout, contributions: Sequence[bytes | memoryview], weights: Sequence[float]) -> bytes:
    """The workers' buffers as one: the weighted mean of floating-point ones, the maximum of integers and booleans."""
    unpacked = [unpack_buffers(layout, data) for data in contributions]
    total = sum(weights)
    merged = []
    for position, spec in enumerate(layout.buffers):
        values = [tensors[position] for tensors in unpacked]
        if spec.torch_dtype.is_floating_point:
            mean = torch.zeros(spec.shape, dtype=torch.float64)
            for value, weight in zip(values, weights, strict=True):
                mean += value.double() * (weight / total)
            merged.append(mean.to(spec.torch_dtype))
        else:
            merged.append(torch.stack(values).amax(0))
    return pack_buffers(merged)


def merged_buffers(
    layout: Layout,
    contributions: Sequence[bytes | memoryview],
    weights: Sequence[float],
    rule: AggregationConfig,
    chosen: Sequence[int],
) -> bytes:
    """The workers' buffers as one, by the job's rule over those that it chose for the update.

    Floating-point ones pass the rule itself. Integers and booleans take the maximum with the means, as `mean_buffers`,
    and with robust rules the lower median, which is what some worker counted, and which no single one decides.
    """
    if not rule.robust and rule.name != "trimmed_mean":
        return mean_buffers(layout, contributions, weights if rule.name == "weighted_mean" else [1.0] * len(weights))
    unpacked = [unpack_buffers(layout, contributions[place]) for place in chosen]
    first, last = (0, len(unpacked)) if rule.name == "krum" else trimmed(rule, len(unpacked))
    merged = []
    for position, spec in enumerate(layout.buffers):
        ranked = torch.stack([tensors[position] for tensors in unpacked]).sort(0).values
        if spec.torch_dtype.is_floating_point:
            total = torch.zeros(spec.shape, dtype=torch.float64)
            for value in ranked[first:last]:
                total += value.double()
            merged.append(total.div_(last - first).to(spec.torch_dtype))
        else:
            merged.append(ranked[(len(unpacked) - 1) // 2])
    return pack_buffers(merged)
