"""What the tests of the worker share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ditherps.gradient import make_deterministic


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """As a worker sets torch; afterwards as it was."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    make_deterministic(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
