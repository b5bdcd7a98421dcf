"""The round's state machine: schedules of joins, deliveries, deaths and deadlines as tables, without a clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditherps.codecs import Role
from ditherps.errors import Reason
from ditherps_server.rounds import (
    SERVER_EVALUATES,
    AbandonRound,
    Action,
    Applied,
    CloseRound,
    Delivered,
    Evaluated,
    Event,
    FinishRun,
    Joined,
    Left,
    OpenRound,
    Phase,
    Rules,
    Seen,
    State,
    Stop,
    Tick,
    Unusable,
    assign_roles,
    step,
    waiting_for,
)

RULES = Rules(
    workers=4,
    rounds=3,
    join_timeout_seconds=30,
    round_deadline_seconds=20,
    idle_timeout_seconds=10,
    evaluation_interval=1000,
)


def run(
    rules: Rules, schedule: Sequence[tuple[float, Event]], state: State | None = None
) -> tuple[State, list[Action]]:
    state = state or State()
    done: list[Action] = []
    for now, event in schedule:
        state, actions = step(rules, state, event, now)
        done += actions
    return state, done


def joins(count: int, now: float = 0.0) -> list[tuple[float, Event]]:
    return [(now, Joined(index, f"worker-{index}")) for index in range(count)]


def evaluated(rules: Rules = RULES) -> tuple[State, list[Action]]:
    """A state in which round 0 is open and its evaluation is in."""
    return run(rules, [*joins(4), (0.0, Evaluated())])


def test_a_round_opens_when_all_workers_are_here() -> None:
    state, done = run(RULES, joins(3))
    assert (state.phase, done) == (Phase.WAITING, [])
    state, done = run(RULES, [(1.0, Joined(3, "worker-3"))], state)
    assert state.phase is Phase.OPEN
    (opened,) = done
    assert isinstance(opened, OpenRound)
    assert (opened.plan.round, opened.plan.attempt, opened.plan.base_version) == (0, 0, 0)
    assert list(opened.plan.roles.items()) == [(index, Role.SOURCE) for index in range(4)]
    assert (opened.plan.opened_at, opened.plan.deadline_at) == (1.0, 21.0)


def test_the_order_of_arrival_changes_nothing() -> None:
    forwards, _ = run(RULES, joins(4))
    backwards, _ = run(RULES, joins(4)[::-1])
    assert forwards.plan == backwards.plan


def test_a_round_closes_with_all_contributions_in_the_order_of_their_index() -> None:
    state, _ = evaluated()
    state, done = run(RULES, [(2.0, Delivered(index)) for index in (3, 1, 0)], state)
    assert (state.phase, done) == (Phase.OPEN, [])
    state, done = run(RULES, [(3.0, Delivered(2))], state)
    assert state.phase is Phase.CLOSING
    (closed,) = done
    assert isinstance(closed, CloseRound)
    assert (closed.members, closed.absent) == ((0, 1, 2, 3), {})


def test_a_duplicate_delivery_counts_once() -> None:
    state, _ = evaluated()
    state, done = run(RULES, [(2.0, Delivered(0))] * 5, state)
    assert (state.delivered, done) == (frozenset({0}), [])


def test_a_round_waits_for_its_evaluation() -> None:
    state, _ = run(RULES, joins(4))
    assert state.plan is not None
    assert state.plan.evaluator == SERVER_EVALUATES
    state, done = run(RULES, [(2.0, Delivered(index)) for index in range(4)], state)
    assert (state.phase, done) == (Phase.OPEN, [])
    assert waiting_for(RULES, state, 2.0) == "the evaluation of version 0"
    state, done = run(RULES, [(3.0, Evaluated())], state)
    assert isinstance(done[0], CloseRound)


def test_the_lowest_worker_evaluates_where_the_server_cannot() -> None:
    rules = replace(RULES, server_evaluates=False)
    state, _ = run(rules, joins(4))
    assert state.plan is not None
    assert state.plan.evaluator == 0
    # It goes before it has evaluated: its absence does not hold the round once the quorum is there.
    rules = replace(rules, quorum=0.5)
    state, done = run(rules, [(1.0, Left(0)), *((2.0, Delivered(index)) for index in (1, 2, 3))], state)
    assert isinstance(done[-1], CloseRound)
    assert done[-1].absent == {0: Reason.LEFT}


def test_rounds_follow_each_other_until_the_last_then_the_final_evaluation() -> None:
    state, done = run(RULES, joins(4))
    for version in range(1, 4):
        state, more = run(
            RULES,
            [(1.0, Evaluated()), *((1.0, Delivered(index)) for index in range(4)), (1.0, Applied(version))],
            state,
        )
        done += more
    opened = [action.plan for action in done if isinstance(action, OpenRound)]
    assert [(plan.round, plan.base_version, len(plan.roles)) for plan in opened] == [
        (0, 0, 4),
        (1, 1, 4),
        (2, 2, 4),
        (3, 3, 0),
    ]
    state, done = run(RULES, [(2.0, Evaluated()), (2.0, Applied(3))], state)
    assert done[-1] == FinishRun(Reason.FINISHED)
    assert state.phase is Phase.FINISHED
    assert step(RULES, state, Joined(0, "worker-0"), 9.0) == (state, ())


def test_deadline_closes_with_a_quorum_and_says_who_was_absent() -> None:
    rules = replace(RULES, quorum=0.75)
    state, _ = evaluated(rules)
    schedule: list[tuple[float, Event]] = [(1.0, Delivered(index)) for index in (0, 2, 3)]
    schedule += [(15.0, Seen(1)), (19.9, Tick())]
    state, done = run(rules, schedule, state)
    assert done == []
    state, done = run(rules, [(20.0, Tick())], state)
    (closed,) = done
    assert isinstance(closed, CloseRound)
    assert closed.members == (0, 2, 3)
    assert closed.absent == {1: Reason.DEADLINE}


def test_a_silent_worker_does_not_hold_a_round_that_has_its_quorum() -> None:
    rules = replace(RULES, quorum=0.75)
    state, _ = evaluated(rules)
    alive: list[tuple[float, Event]] = [(9.0, Delivered(index)) for index in (0, 1, 2)]
    alive += [(9.0, Seen(index)) for index in (0, 1, 2)]
    state, done = run(rules, [*alive, (10.1, Tick())], state)
    (closed,) = done
    assert isinstance(closed, CloseRound)
    assert closed.absent == {3: Reason.SILENT}


def test_without_a_quorum_the_round_is_abandoned_and_opened_again() -> None:
    state, _ = evaluated()
    schedule: list[tuple[float, Event]] = [(1.0, Delivered(0))]
    schedule += [(now, Seen(index)) for now in (8.0, 16.0) for index in range(4)]
    state, done = run(RULES, [*schedule, (20.0, Tick())], state)
    abandoned, opened = done
    assert isinstance(abandoned, AbandonRound)
    assert isinstance(opened, OpenRound)
    assert abandoned.reason is Reason.QUORUM
    # The same plan encodes the same bytes, so the address stays as it was.
    assert (opened.plan.round, opened.plan.attempt) == (0, 0)
    assert state.delivered == frozenset()


def test_an_attempt_counts_only_when_what_is_encoded_changes() -> None:
    rules = replace(RULES, source_fraction=0.5, quorum=0.5)
    state, _ = evaluated(rules)
    assert state.plan is not None
    assert list(state.plan.roles.values()) == [Role.SOURCE, Role.SOURCE, Role.NESTED, Role.NESTED]
    # Without workers 0 and 1 there is no source; in the next attempt worker 2 is one.
    schedule: list[tuple[float, Event]] = [(1.0, Left(0)), (1.0, Left(1))]
    schedule += [(1.0, Delivered(2)), (1.0, Delivered(3))]
    schedule += [(now, Seen(index)) for now in (8.0, 16.0) for index in (2, 3)]
    state, done = run(rules, [*schedule, (20.0, Tick())], state)
    opened = done[-1]
    assert isinstance(opened, OpenRound)
    assert opened.plan.roles == {2: Role.SOURCE, 3: Role.NESTED}
    assert opened.plan.attempt == 1


def test_each_role_has_its_own_quorum() -> None:
    rules = replace(RULES, source_fraction=0.5, quorum=0.5)
    state, _ = evaluated(rules)
    state, done = run(rules, [(1.0, Delivered(2)), (1.0, Delivered(3)), (1.0, Left(0)), (1.0, Left(1))], state)
    assert done == []
    state, done = run(rules, [(1.0, Joined(0, "worker-0")), (2.0, Delivered(0))], state)
    (closed,) = done
    assert isinstance(closed, CloseRound)
    assert (closed.members, closed.absent) == ((0, 2, 3), {1: Reason.LEFT})


def test_abandoning_has_an_end() -> None:
    state, _ = evaluated()
    now, abandoned = 0.0, 0
    while state.phase is not Phase.FINISHED:
        now += 5.0
        state, done = run(RULES, [*((now, Seen(index)) for index in range(4)), (now, Tick())], state)
        abandoned += sum(isinstance(action, AbandonRound) for action in done)
    assert abandoned == RULES.abandon_limit
    assert done[-1] == FinishRun(Reason.QUORUM)
    assert now == RULES.abandon_limit * RULES.round_deadline_seconds


def test_unusable_contributions_abandon_the_round_with_their_reason() -> None:
    state, _ = evaluated()
    state, _ = run(RULES, [(1.0, Delivered(index)) for index in range(4)], state)
    state, done = run(RULES, [(2.0, Unusable(Reason.NO_SIDE_INFORMATION))], state)
    assert isinstance(done[0], AbandonRound)
    assert done[0].reason is Reason.NO_SIDE_INFORMATION


def test_waiting_for_workers_is_bounded() -> None:
    state, done = run(RULES, [*joins(3), (29.0, Tick())])
    assert done == []
    assert waiting_for(RULES, state, 29.0) == "workers: 0 of 4 are here"  # silent by now
    state, done = run(RULES, [(30.0, Tick())], state)
    assert done == [FinishRun(Reason.JOIN_TIMEOUT)]


def test_the_first_round_goes_on_with_a_quorum_after_the_join_timeout() -> None:
    rules = replace(RULES, quorum=0.75, idle_timeout_seconds=100)
    state, done = run(rules, [*joins(3), (29.0, Tick())])
    assert done == []
    state, done = run(rules, [(30.0, Tick())], state)
    (opened,) = done
    assert isinstance(opened, OpenRound)
    assert list(opened.plan.roles) == [0, 1, 2]


def test_a_worker_that_died_is_named() -> None:
    state, _ = evaluated()
    state, _ = run(RULES, [*((1.0, Delivered(index)) for index in (0, 1)), (1.0, Left(2)), (11.0, Seen(3))], state)
    said = waiting_for(RULES, state, 11.0)
    assert said == "contributions: 2 of 4 are here; missing: worker-2 (left), worker-3"


@pytest.mark.parametrize("phase", [Phase.WAITING, Phase.OPEN, Phase.CLOSING])
def test_stop_ends_every_phase(phase: Phase) -> None:
    schedules: dict[Phase, list[tuple[float, Event]]] = {
        Phase.WAITING: joins(2),
        Phase.OPEN: joins(4),
        Phase.CLOSING: [*joins(4), (0.0, Evaluated()), *((0.0, Delivered(index)) for index in range(4))],
    }
    state, _ = run(RULES, schedules[phase])
    assert state.phase is phase
    state, done = run(RULES, [(1.0, Stop(Reason.INTERRUPTED))], state)
    assert done == [FinishRun(Reason.INTERRUPTED)]


@pytest.mark.parametrize(
    ("count", "fraction", "sources"), [(1, 0.5, 1), (2, 0.5, 1), (3, 0.5, 2), (4, 0.5, 2), (4, 0.1, 1), (4, 1.0, 4)]
)
def test_the_first_share_of_the_invited_are_sources(count: int, fraction: float, sources: int) -> None:
    invited = tuple(range(10, 10 + count))
    roles = assign_roles(invited, fraction)
    assert list(roles) == list(invited)
    assert list(roles.values()) == [Role.SOURCE] * sources + [Role.NESTED] * (count - sources)


EVENTS = st.one_of(
    st.builds(Joined, st.integers(0, 3), st.just("worker")),
    st.builds(Left, st.integers(0, 3)),
    st.builds(Seen, st.integers(0, 3)),
    st.builds(Delivered, st.integers(0, 4)),
    st.just(Evaluated()),
    st.just(Tick()),
    st.just(Unusable(Reason.NO_SIDE_INFORMATION)),
    st.just(Applied(-1)),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 8), EVENTS), max_size=120),
    st.sampled_from([0.5, 0.75, 1.0]),
    st.sampled_from([0.5, 1.0]),
)
def test_any_schedule_keeps_the_promises(schedule: list[tuple[float, Event]], quorum: float, fraction: float) -> None:
    """No round closes without its quorum, twice, or out of order; whatever is opened is closed or abandoned."""
    rules = replace(RULES, quorum=quorum, source_fraction=fraction)
    state, now, open_, closed = State(), 0.0, False, -1
    for passed, event in schedule:
        now += passed
        if isinstance(event, Applied):
            event = Applied(state.version + 1)
        state, actions = step(rules, state, event, now)
        for action in actions:
            match action:
                case OpenRound(plan):
                    assert not open_
                    assert plan.round == closed + 1
                    open_ = True
                case CloseRound(plan, members, absent):
                    assert open_
                    assert members == tuple(sorted(members))
                    assert set(members) | set(absent) == set(plan.roles)
                    for role in Role:
                        invited = {index for index, has in plan.roles.items() if has is role}
                        assert len(invited & set(members)) >= quorum * len(invited)
                    open_, closed = False, plan.round
                case AbandonRound(plan, reason):
                    if reason is Reason.NO_SIDE_INFORMATION:
                        closed = plan.round - 1  # it had closed, and could not be applied
                    open_ = False
                case FinishRun():
                    assert state.phase is Phase.FINISHED
    if state.phase is not Phase.FINISHED:
        # Left alone, every state comes to an end: no wait is without a limit.
        for _ in range(1000):
            now += 5.0
            event = Applied(state.version + 1) if state.phase is Phase.CLOSING else Tick()
            state, _ = step(rules, state, event, now)
        assert state.phase is Phase.FINISHED


class TestAServerThatGoesOn:
    """Its machine begins at the version of its checkpoint."""

    def test_it_waits_for_all_before_a_quorum_is_enough(self) -> None:
        rules = replace(RULES, quorum=0.5)
        state, done = run(rules, joins(2), State(round=1, version=1))
        assert (state.phase, done) == (Phase.WAITING, [])
        state, done = run(rules, [(1.0, Seen(0)), (29.0, Seen(0)), (29.0, Seen(1)), (30.0, Tick())], state)
        (opened,) = done
        assert isinstance(opened, OpenRound)
        assert (opened.plan.round, opened.plan.base_version, tuple(opened.plan.roles)) == (1, 1, (0, 1))

    @pytest.mark.parametrize("server_evaluates", [True, False])
    def test_at_the_last_version_nobody_is_invited_any_more(self, server_evaluates: bool) -> None:
        rules = replace(RULES, evaluation_interval=1, server_evaluates=server_evaluates)
        state, done = run(rules, [(0.0, Tick())], State(round=rules.rounds, version=rules.rounds))
        if server_evaluates:
            (opened,) = done
            assert isinstance(opened, OpenRound)
            assert (dict(opened.plan.roles), opened.plan.evaluator) == ({}, SERVER_EVALUATES)
            state, done = run(rules, [(1.0, Evaluated()), (1.0, Applied(rules.rounds))], state)
        assert state.phase is Phase.FINISHED
        assert done[-1] == FinishRun(Reason.FINISHED)
