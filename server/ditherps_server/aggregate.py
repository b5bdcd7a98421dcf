"""Staged contributions -> one update, in fixed order, chunk by chunk over all senders.

Memory is the update plus the compressed bytes, whatever the number of workers. Each chunk adds the senders in the order
of their index, sources before nested, so the sum does not depend on arrival, threads or the size of the pool.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import torch

from ditherps.codecs import Codec, DecodeReport, Encoded, Role
from ditherps.dither import TILE, Address
from ditherps.errors import Reason, RefusedError
from ditherps.layout import Layout, pack_buffers, unpack_buffers

CHUNK_TILES = 32
"""Tiles of one task: the sum of a chunk (512 KiB) stays in a core's cache while all senders are added."""


@dataclass(frozen=True, slots=True)
class Sender:
    """One worker's encoded update, as the aggregation needs it."""

    role: Role
    codec: Codec
    encoded: Encoded
    address: Address
    weight: float


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

    reports = pool.map(add, spans) if pool is not None else map(add, spans)
    return sum(reports, DecodeReport(0, 0, 0))


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


def mean_buffers(layout: Layout, contributions: Sequence[memoryview], weights: Sequence[float]) -> bytes:
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
