"""What the state machine begins with in a server that goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ditherps.codecs import Role
from ditherps_server.checkpoint import Entered
from ditherps_server.redo import Opened
from ditherps_server.replay import Restored
from ditherps_server.rounds import SERVER_EVALUATES, Rules

RULES = Rules(
    workers=2, rounds=4, join_timeout_seconds=30, round_deadline_seconds=20, idle_timeout_seconds=10
)  # fmt: skip


@pytest.mark.parametrize(
    ("evaluator", "server_evaluates", "evaluated"),
    [(None, True, True), (SERVER_EVALUATES, True, False), (SERVER_EVALUATES, False, True), (0, False, False)],
)
def test_nobody_waits_for_an_evaluation_that_nobody_makes(
    evaluator: int | None, server_evaluates: bool, evaluated: bool
) -> None:
    roles = {0: Role.SOURCE, 1: Role.SOURCE}
    opened = Opened(round=3, attempt=0, base_version=3, roles=roles, evaluator=evaluator, encoded=roles, accounts={})
    rules = replace(RULES, server_evaluates=server_evaluates)
    assert Restored(3, opened=opened).state(rules, ("a", "b"), 0.0).evaluated == evaluated


@pytest.mark.parametrize(("version", "returning"), [(4, {1}), (3, set())])
def test_who_was_in_the_last_round_is_waited_for(version: int, returning: set[int]) -> None:
    entered = {0: Entered(2, 0, 2, 2), 1: Entered(version - 1, 0, version, 1)}
    assert Restored(version, entered=entered).state(RULES, ("a", "b"), 0.0).returning == returning
