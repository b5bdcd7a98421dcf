"""What all tests share: property tests draw the same examples on every run, and how many messages are mutated."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--mutations", type=int, default=2_000, help="messages that tests/faults/test_mutations.py sends (100000)"
    )
