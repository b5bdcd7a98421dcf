"""The way down: the server keeps the exact model x, all hold the model w, and a step of w is an encoded C(x - w).

EF21-P (Gruntkowska, Tyurin, Richtarik, "EF21-P and friends", arXiv 2209.15218) and MCM (Philippenko, Dieuleveut,
"Preserved central model for faster bidirectional compression", arXiv 2102.12528) in one form: after each update of x
the server encodes the difference once for all workers, and everybody takes the same step from the same bytes,

    w <- w + rate * C(x - w).

w is bit-identical everywhere, x stays exact at the server, and what a step loses is in the next difference. Gradients
are taken at w.
"""

from __future__ import annotations

import math
from concurrent.futures import Executor

import numpy as np
import torch
from torch import Tensor

from ditherps.codecs import Codec, Encoded, Role, parse
from ditherps.config import DownlinkConfig
from ditherps.dither import SERVER, TILE, Address, Domain
from ditherps.errors import OptionError
from ditherps.pool import on_threads
from ditherps.wire import digest_of

LAG_LIMIT = 1.0
"""Rounds by which w may lag before a run warns."""


def downlink_codec(config: DownlinkConfig, uplink: Codec) -> Codec | None:
    """The codec of the steps of w; None where w is x, and travels in float32.

    Raises:
        OptionError: there is no such codec, or steps cannot be encoded with it.
    """
    try:
        codec = parse(config.codec) if config.codec else uplink.for_role(Role.SOURCE).for_model()
    except OptionError as error:
        raise OptionError(f"downlink.{error.option}", error.value, error.allowed) from None
    if codec.name == "none" and config.snapshot != "float32":
        raise OptionError("downlink.snapshot", config.snapshot, "float32, where the model travels whole in float32")
    if codec.needs_side_information:
        raise OptionError("downlink.codec", config.codec, "a codec without side information, such as dqsg")
    return None if codec.name == "none" else codec


def step_address(seed: int, version: int) -> Address:
    """Where the dither of the step from `version` to the next lies.

    A server that goes on from an older version takes that step anew, with the same dither: of the two only one counts.
    """
    return Address(seed=seed, round=version, sender=SERVER, domain=Domain.DOWNLINK)


def memory_rate(codec: Codec, omega: float) -> float:
    """How much of a decoded step w takes, as float32.

    All of it with a contractive codec (EF21-P). Of an unbiased one's it takes 1 / (1 + omega), omega its relative
    squared error: then E||x - w||^2 shrinks to omega / (1 + omega) of what it was, the least that any rate reaches, and
    stays bounded however large omega is (MCM's condition on its memory, up to a constant). Of a codec that is neither,
    as `terngrad` with its clipping, it takes the same, without that promise.
    """
    return 1.0 if codec.contractive else float(np.float32(1.0 / (1.0 + omega)))


def lag_rounds(omega: float, rate: float) -> float:
    """||x - w||^2 over the squared norm of one move of x, in the long run: about the rounds by which w is behind.

    A step leaves the share e of the difference, e = omega / (1 + omega) at the rate 1 / (1 + omega), else omega; so
    V = e (V + 1), where moves of x are not correlated with what is left.
    """
    left = omega if rate == 1.0 else omega / (1.0 + omega)
    return left / (1.0 - left) if left < 1.0 else math.inf


def take_step(
    codec: Codec, encoded: Encoded, address: Address, rate: float, w: Tensor, pool: Executor | None = None
) -> None:
    """w += rate * decoded, in place: the same bits on every machine, with any number of threads.

    `w`: contiguous float32 on the CPU.

    Raises:
        PayloadError: the step is malformed; w is unchanged.
    """
    codec.validate(encoded, len(w))
    unit = math.lcm(codec.chunk_coordinates, TILE * 32)
    spans = [(first, min(first + unit, len(w))) for first in range(0, len(w), unit)]

    def take(span: tuple[int, int]) -> None:
        codec.accumulate(encoded, address, w[slice(*span)], rate, span)

    on_threads(pool, take, spans)


def rounds_here(config: DownlinkConfig, version: int) -> bool:
    """Whether both ends round w to bfloat16 when it reaches `version`."""
    return config.snapshot == "bf16" and version > 0 and version % config.snapshot_every == 0


def round_to_bf16(w: Tensor) -> None:
    """Round w (float32) to the nearest bfloat16, ties to even, in place."""
    w.copy_(w.to(torch.bfloat16))


def digest(w: Tensor, buffers: bytes) -> bytes:
    """XXH3-128 of w (float32, CPU), then the buffers: equal on both ends, or the worker gets a snapshot."""
    return digest_of(w.numpy().data.cast("B") if w.numel() else b"", buffers)
