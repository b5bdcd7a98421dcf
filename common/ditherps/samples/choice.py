"""`mode = auto`: whether samples or gradients take fewer bits, and the sentence that says so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ditherps.codecs import Codec
from ditherps.dither import Address, Domain
from ditherps.tasks import Features


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job would send.

    Attributes:
        task: its name.
        coordinates: parameters of the model.
        gradient_bits: of a coordinate, in mode `gradient`.
        features: of a sample.
        sample_bits: of a feature, in mode `data`, when the sample is sent for the first time.
        classes: of labels.
        batch_size: samples of a worker in a round.
        rounds: of the job.
        shard_samples: of one worker.
        cached: fraction of the samples for which the cache has room, 0 to 1.
        refinement_bits: of a coordinate; 0 without refinement.
    """

    task: str
    coordinates: int
    gradient_bits: float
    features: int
    sample_bits: float
    classes: int
    batch_size: int
    rounds: int
    shard_samples: int
    cached: float = 0.0
    refinement_bits: float = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """A mode, the bits of a worker's round on average in both, and why."""

    mode: Literal["data", "gradient"]
    data_bits: float
    gradient_bits: float
    sentence: str


def nominal_bits(codec: Codec, coordinates: int) -> float:
    """Bits a coordinate that the codec takes for a Gaussian vector; coded gradients mostly take fewer."""
    vector = torch.randn(coordinates, generator=torch.Generator().manual_seed(0))
    return codec.encode(vector, Address(0, 0, 0, Domain.UPDATE)).bits_per_coordinate


def most_sample_bits(features: Features, level: int) -> float:
    """Bits a feature at a level for values that are spread evenly over their range: others take fewer.

    With a known dither the two cells at the ends of the range are cut off, which over all dithers is 1 / (2 ln 2) of
    a bit at level 0, and half as much at each further one. Integers take no more than their own bits.
    """
    return min(level + 2.0**-level / (2 * math.log(2)), math.log2(features.span))


def hit_rate(cached: float) -> float:
    """How often a sample is still held when it comes again, in a cache with room for this fraction of all samples.

    Each epoch has an order of its own. Between a sample's places a in one epoch and b in the next (both 0 to 1) come
    1 - a (1 - b) of the others; least recently used out, it is still there where that is below `cached`.
    """
    absent = 1.0 - cached
    return 1.0 if absent <= 0 else cached + absent * math.log(absent)


def choose(plan: Plan) -> Choice:
    """The mode that takes fewer bits on the way up; `gradient`, whose updates are exact, where they are equal."""
    taken = plan.batch_size * plan.rounds
    first = min(taken, plan.shard_samples)
    sent = first + (taken - first) * (1 - hit_rate(plan.cached))
    label = math.log2(plan.classes) if plan.classes > 1 else 0.0
    samples = sent / plan.rounds * (plan.features * plan.sample_bits + label)
    refinement = plan.coordinates * plan.refinement_bits
    data, gradient = samples + refinement, plan.coordinates * plan.gradient_bits
    mode: Literal["data", "gradient"] = "data" if data < gradient else "gradient"
    refined = f" and {_bits(refinement)} of refinement" if refinement else ""
    sentence = (
        f"mode = {mode}: for {plan.task} a worker's round takes about {_bits(data)} as data "
        f"({sent / plan.rounds:.3g} of {plan.batch_size} samples of {plan.features} features at "
        f"{plan.sample_bits:.3g} bits{refined}) and {_bits(gradient)} as a gradient "
        f"({plan.coordinates} coordinates at {plan.gradient_bits:.3g} bits)"
    )
    return Choice(mode, data, gradient, sentence)


def _bits(bits: float) -> str:
    """A number of bits for people."""
    for size, unit in ((1e9, "Gbit"), (1e6, "Mbit"), (1e3, "kbit")):
        if bits >= size:
            return f"{bits / size:.3g} {unit}"
    return f"{bits:.3g} bit"
