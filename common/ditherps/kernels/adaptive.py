"""Steps of the adaptive server optimizers: one pass over the model, both moments and the update.

Reddi et al., "Adaptive federated optimization", arXiv 2003.00295, algorithm 2. All values are float32; a product is
rounded before it enters a sum, and roots and quotients are IEEE's, so the bits are the same on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditherps.kernels.jit import kernel

ADAGRAD, ADAM, YOGI = 0, 1, 2


@kernel
def adaptive_step(
    x: NDArray[np.float32],
    m: NDArray[np.float32],
    v: NDArray[np.float32],
    update: NDArray[np.float32],
    rule: int,
    beta1: np.float32,
    rest1: np.float32,
    beta2: np.float32,
    rest2: np.float32,
    lr: np.float32,
    tau: np.float32,
) -> None:
    """Move x, m and v on along `update`, the negative of the paper's Delta: x -= lr * m / (sqrt(v) + tau).

    `rest1` and `rest2` are 1 - beta1 and 1 - beta2, rounded once. ADAGRAD has no use for beta2.
    """
    for i in range(x.size):
        u = update[i]
        square = u * u
        part = rest2 * square
        old = v[i]
        if rule == ADAGRAD:
            new = old + square
        elif rule == ADAM:
            new = beta2 * old + part
        else:
            # By `part`, towards the square; not at all from the square itself.
            new = old + part if square > old else (old - part if square < old else old)
        first = beta1 * m[i] + rest1 * u
        v[i] = new
        m[i] = first
        x[i] -= lr * first / (np.sqrt(new) + tau)
