"""One chunk of every sender at a time, decoded side by side, in the memory of a block for each thread."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ditherps.codecs import Codec, DecodeReport, Encoded, Role
from ditherps.dither import TILE, Address
from ditherps.kernels import robust

BLOCK_TILES = 16
"""Tiles of a chunk, 256 KiB of each sender: with fewer, calls cost more than what they decode (measured)."""
IN_FLIGHT = 16
"""Chunks whose results may wait for an earlier one."""

T = TypeVar("T")
SideRule: TypeAlias = Callable[[torch.Tensor, Sequence[int], torch.Tensor], None]
"""(block, rows of the sources, into): the side information of a chunk."""


@dataclass(frozen=True, slots=True)
class Sender:
    """One worker's encoded update, as the aggregation needs it."""

    role: Role
    codec: Codec
    encoded: Encoded
    address: Address
    weight: float


class Blocks:
    """The senders' vectors of `coordinates`, chunk by chunk; row i of a block is sender i."""

    def __init__(
        self, senders: Sequence[Sender], coordinates: int, side_rule: SideRule, pool: Executor | None = None
    ) -> None:
        self._senders, self._side_rule, self._pool = senders, side_rule, pool
        self._sources = [place for place, sender in enumerate(senders) if sender.role is Role.SOURCE]
        self._nested = [place for place, sender in enumerate(senders) if sender.role is Role.NESTED]
        unit = math.lcm(TILE * BLOCK_TILES, *(sender.codec.chunk_coordinates for sender in senders))
        self._unit = min(unit, coordinates)
        self._spans = [(first, min(first + unit, coordinates)) for first in range(0, coordinates, unit)]
        self._own = threading.local()

    def map(self, work: Callable[[tuple[int, int], torch.Tensor, DecodeReport], T]) -> Iterator[T]:
        """`work(span, block, report of the nested senders)` of every chunk, results in the order of the chunks.

        The block is `work`'s to change, and no longer valid after it.
        """

        def decoded(span: tuple[int, int]) -> T:
            block = self._block(span[1] - span[0])
            return work(span, block, self._decode(span, block))

        if self._pool is None:
            yield from map(decoded, self._spans)
            return
        waiting: deque[Future[T]] = deque()
        for span in self._spans:
            waiting.append(self._pool.submit(decoded, span))
            if len(waiting) == IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _block(self, length: int) -> torch.Tensor:
        if not hasattr(self._own, "memory"):
            self._own.memory = torch.empty(len(self._senders) * self._unit)
        memory: torch.Tensor = self._own.memory
        return memory[: len(self._senders) * length].view(len(self._senders), length)

    def _decode(self, span: tuple[int, int], block: torch.Tensor) -> DecodeReport:
        block.numpy().fill(0.0)  # torch would wake its threads for it
        report, side = DecodeReport(), None
        for place in (*self._sources, *self._nested):
            sender = self._senders[place]
            if side is None and sender.role is Role.NESTED:
                side = torch.empty(block.shape[1])
                self._side_rule(block, self._sources, side)
            found = sender.codec.accumulate(
                sender.encoded, sender.address, block[place], 1.0, span, side_information=side
            )
            report += found if sender.role is Role.NESTED else DecodeReport()
        return report

    def squared_norms(self) -> NDArray[np.float64]:
        """The squared norm of each sender, tile by tile in order."""

        def of_tiles(_: object, block: torch.Tensor, __: object) -> NDArray[np.float64]:
            out = np.empty((-(-block.shape[1] // TILE), block.shape[0]))
            robust.squared_norms(block.numpy(), out)
            return out

        return self._summed(of_tiles, np.zeros(len(self._senders)))

    def squared_distances(self) -> NDArray[np.float64]:
        """The squared distance of any two senders, tile by tile in order; infinite where it is not a number."""

        def of_tiles(_: object, block: torch.Tensor, __: object) -> NDArray[np.float64]:
            out = np.empty((-(-block.shape[1] // TILE), block.shape[0], block.shape[0]))
            robust.squared_distances(block.numpy(), out)
            return out

        count = len(self._senders)
        lower = self._summed(of_tiles, np.zeros((count, count)))
        lower[np.isnan(lower)] = np.inf
        return lower + lower.T

    def _summed(
        self, of_tiles: Callable[[object, torch.Tensor, object], NDArray[np.float64]], total: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        for tiles in self.map(of_tiles):
            for tile in tiles:
                total += tile
        return total
