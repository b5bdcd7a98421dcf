"""The importance gate: which samples of a batch a worker sends, and what each then counts for.

A sample is kept with the probability p = min(1, c score) and its loss weighted by 1/p, so the gradient stays unbiased
whatever the scores are; scores in proportion to the norms of the samples' gradients give it the least variance. (Hanna
et al., arXiv 2012.07913, have such a layer; their abstract does not give its rule.) The score is the norm of the loss's
gradient in the model's outputs, for a classifier ||softmax - onehot||: that of the last layer's gradient but for the
size of its inputs.

Probabilities are multiples of 1/256, and the coin is the 16-bit lane of the sample's place in the batch, so that the
probability that stands in the message is exactly that with which the sample was kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from ditherps.dither import Address, lanes
from ditherps.errors import OptionError, PayloadError, Reason
from ditherps.layout import FlatModel
from ditherps.tasks import Keys, Task

UNITS: Final = 256  # a probability is a whole number of 1/256
FLOOR: Final = 16
"""The smallest probability, in 256ths: no sample ever counts for more than sixteen."""


def scores(
    task: Task, name: str | None, model: FlatModel, features: torch.Tensor, labels: torch.Tensor, keys: Keys | None
) -> NDArray[np.float64]:
    """How much each sample of a batch would move the model: (n,), at least 0.

    Args:
        task: whose inputs and loss.
        name: of the task's model; None is the default.
        model: w; taken in evaluation mode, so that nothing of it moves on.
        features, labels, keys: (n, ...) of the batch.
    """
    training = model.module.training
    model.module.eval()
    try:
        with torch.no_grad():
            outputs = model.module(task.inputs(name, features, keys).to(model.device))
    finally:
        model.module.train(training)
    outputs = outputs.detach().requires_grad_()
    (slope,) = torch.autograd.grad(task.loss(outputs, labels.to(model.device)), outputs)
    norms: NDArray[np.float64] = slope.reshape(len(labels), -1).to(torch.float64).norm(dim=1).cpu().numpy()
    return norms * len(labels)


def probabilities(scores_: NDArray[np.float64], keep: float) -> NDArray[np.int64]:
    """With which probability to keep each sample, in 256ths: (n,), FLOOR .. 256.

    They are min(1, c score), but never below the floor, with c such that `keep` of the samples are expected, to the
    rounding of each to a 256th. All the same where no score is above 0.

    Args:
        scores_: (n,), finite and at least 0.
        keep: fraction of the samples, FLOOR / 256 to 1.

    Raises:
        OptionError: `keep` is out of this range.
    """
    floor = FLOOR / UNITS
    if not floor <= keep <= 1:
        raise OptionError("keep", keep, f"{floor} to 1")
    positive = scores_[scores_ > 0]
    if positive.size == 0:
        return np.full(len(scores_), round(keep * UNITS), np.int64)
    # The expected number grows with c, in straight lines between where a sample leaves the floor or reaches 1.
    bends = np.sort(np.concatenate([floor / positive, 1 / positive]))
    expected = np.clip(bends[:, None] * scores_, floor, 1).mean(1)
    c = np.interp(keep, expected, bends)
    chances: NDArray[np.int64] = np.rint(np.clip(c * scores_, floor, 1) * UNITS).astype(np.int64)
    return chances


@dataclass(frozen=True, eq=False)
class Selection:
    """The samples of a batch that are kept.

    Attributes:
        kept: (n,) bool.
        chances: (kept,) with which probability each of them was kept, in 256ths.
    """

    kept: NDArray[np.bool_]
    chances: NDArray[np.int64]

    @classmethod
    def toss(cls, chances: NDArray[np.int64], coins: Address) -> Selection:
        """Keep sample i with probability chances[i] / 256; `coins`: address of sample 0's, in domain IMPORTANCE."""
        kept = lanes(coins, len(chances)) < chances * UNITS
        return cls(kept, chances[kept])

    @property
    def weights(self) -> NDArray[np.float64]:
        """(kept,): of each sample's loss, in the place of 1/n."""
        return UNITS / (self.chances * max(len(self.kept), 1))

    def to_bytes(self) -> bytes:
        """A bit a sample, in whole bytes, lowest bit first; then a byte for each that is kept, its chance less one."""
        bits = np.packbits(self.kept, bitorder="little")
        return bits.tobytes() + (self.chances - 1).astype(np.uint8).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, count: int, coins: Address) -> Selection:
        """Read what `to_bytes` wrote of a batch of `count` samples.

        Raises:
            PayloadError: it did not, or a sample's coin says that it is not kept at the chance that is stated.
        """
        front = (count + 7) // 8
        if len(data) < front:
            raise PayloadError(f"a selection of {count} samples cannot take {len(data)} bytes", Reason.SIZE)
        bits = np.unpackbits(np.frombuffer(data, np.uint8, front), bitorder="little").astype(np.bool_)
        kept, rest = bits[:count], bits[count:]
        if len(data) != front + int(kept.sum()):
            raise PayloadError(f"a selection of {kept.sum()} in {count} samples takes other than {len(data)} bytes")
        chances = np.frombuffer(data, np.uint8, offset=front).astype(np.int64) + 1
        tossed = lanes(coins, count)[kept] < chances * UNITS
        if rest.any() or not tossed.all() or (chances < FLOOR).any():
            raise PayloadError("a selection keeps samples against their coins, or below the least chance")
        return cls(kept, chances)
