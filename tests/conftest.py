"""What all tests share: property tests draw the same examples on every run, and how many messages are mutated."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

GROUPS = {"service": "service", "worker": "faults", "faults": "faults", "deploy": "faults"}
"""Folders whose tests have processes, sockets and limits of time: with `pytest -n 2` never two of a group at once."""

settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults", choices=("some", "full"), default="some", help="how many faults tests/faults puts into a run"
    )
    parser.addoption(
        "--mutations", type=int, default=2_000, help="messages that tests/faults/test_mutations.py sends (100000)"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say what `pytest -n` may run beside each other; what takes longest is first."""
    folders = {item: item.path.relative_to(Path(__file__).parent).parts[0] for item in items}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(GROUPS.get(folders[item], item.path.stem)))
    items.sort(key=lambda item: folders[item] not in GROUPS)


@pytest.fixture(scope="session")
def faults_in_full(request: pytest.FixtureRequest) -> bool:
    """Whether as many faults are asked for as the project promises to bear, instead of a few."""
    return bool(request.config.getoption("--faults") == "full")
