"""What all tests share: property tests draw the same examples on every run, and how many messages are mutated."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults", choices=("some", "full"), default="some", help="how many faults tests/faults puts into a run"
    )
    parser.addoption(
        "--mutations", type=int, default=2_000, help="messages that tests/faults/test_mutations.py sends (100000)"
    )


@pytest.fixture(scope="session")
def faults_in_full(request: pytest.FixtureRequest) -> bool:
    """Whether as many faults are asked for as the project promises to bear, instead of a few."""
    return bool(request.config.getoption("--faults") == "full")
