"""The codecs without a dither: `none` and `bf16`; and what the package exports."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from ditherps import Address, Domain, codec
from ditherps.codecs.base import HEADER
from ditherps.errors import EncodingError
from ditherps.kernels import warm

ADDRESS = Address(seed=1, round=2, sender=3, domain=Domain.UPDATE)


def gaussian(n: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 4097, 10000])
def test_none_is_lossless(n: int) -> None:
    x = gaussian(n)
    encoded = codec("none").encode(x, ADDRESS)
    assert torch.equal(codec("none").decode(encoded, ADDRESS), x)
    assert encoded.nbytes == codec("none").max_nbytes(n) == HEADER.size + 4 * n


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 4097, 10000])
def test_bf16_rounds_to_nearest(n: int) -> None:
    x = gaussian(n)
    encoded = codec("bf16").encode(x, ADDRESS)
    assert torch.equal(codec("bf16").decode(encoded, ADDRESS), x.bfloat16().float())
    assert encoded.nbytes == codec("bf16").max_nbytes(n) == HEADER.size + 2 * n


def test_values_that_round_to_infinity_are_refused_by_bf16() -> None:
    with pytest.raises(EncodingError, match=r"coordinate 1 .* bfloat16"):
        codec("bf16").encode(torch.tensor([1.0, 3.4e38]), ADDRESS)


@pytest.mark.parametrize("name", ["none", "bf16"])
def test_spans_and_weights(name: str) -> None:
    used = codec(name)
    x, before = gaussian(10000), gaussian(10001)[:10000].clone()
    encoded = used.encode(x, ADDRESS)
    whole = used.decode(encoded, ADDRESS)
    assert torch.equal(used.decode(encoded, ADDRESS, span=(4096, 10000)), whole[4096:])
    into = before.clone()
    used.accumulate(encoded, ADDRESS, into, -0.7)
    np.testing.assert_array_equal(into.numpy(), before.numpy() + np.float32(-0.7) * whole.numpy())


@pytest.mark.parametrize("name", ["none", "bf16", "dqsg", "ndqsg"])
def test_warm_runs_every_role(name: str) -> None:
    warm(codec(name))


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, ditherps; assert not {'torch', 'numba', 'numpy'} & set(sys.modules); "
        "assert ditherps.__version__; assert 'codec' in dir(ditherps); ditherps.codec('none'); "
        "assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
