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
    Awaited,
    CloseRound,
    Delivered,
    Evaluated,
    Event,
    FinishRun,
    Joined,
    Left,
    Listening,
    OpenRound,
    Phase,
    Rules,
    Seen,
    State,
    Stop,
    Suspend,
    Tick,
    Unusable,
    Unwritten,
    assign_roles,
    invite,
    step,
    waiting,
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
    assert waiting(RULES, state, 2.0) == (Awaited.EVALUATION, 0.0, "the evaluation of version 0")
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
    said = "workers: 0 of the 4 that a round needs are here; the run ends in 1 s without them"  # silent by now
    assert waiting(RULES, state, 29.0) == (Awaited.WORKERS, 0.0, said)
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
    said = "contributions: 2 of 4 are here; missing: worker-2 (left), worker-3"
    assert waiting(RULES, state, 11.0) == (Awaited.CONTRIBUTIONS, 0.0, said)


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
    st.builds(Suspend, st.floats(0, 500)),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 8), EVENTS), max_size=120),
    st.sampled_from([0.5, 0.75, 1.0]),
    st.sampled_from([0.5, 1.0]),
    st.sampled_from([0.5, 1.0]),
    st.sampled_from([0, 1, 3]),
)
def test_any_schedule_keeps_the_promises(
    schedule: list[tuple[float, Event]], quorum: float, fraction: float, sample_fraction: float, min_workers: int
) -> None:
    """No round closes without its quorum, twice, or out of order; whatever is opened is closed, abandoned, or left to
    the next server."""
    rules = replace(
        RULES, quorum=quorum, source_fraction=fraction, sample_fraction=sample_fraction, min_workers=min_workers
    )
    state, now, open_, closed, suspending = State(), 0.0, False, -1, False
    for passed, event in schedule:
        now += passed
        if isinstance(event, Applied):
            event = Applied(state.version + 1)
        state, actions = step(rules, state, event, now)
        suspending = suspending or isinstance(event, Suspend)
        said = waiting(rules, state, now)
        assert said.since <= now
        assert said.sentence
        for action in actions:
            match action:
                case OpenRound(plan):
                    assert not open_
                    assert plan.round == closed + 1
                    assert not (suspending and plan.roles)
                    here = len(state.present)
                    assert not plan.roles or here >= rules.fewest_present
                    assert len(plan.roles) in (0, rules.invited(here))
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
                case FinishRun(reason):
                    assert state.phase is (Phase.SUSPENDED if reason is Reason.SUSPENDED else Phase.FINISHED)
                    assert suspending or reason is not Reason.SUSPENDED
    # Left alone, every state comes to an end: no wait is without a limit.
    for _ in range(1000):
        now += 5.0
        event = Applied(state.version + 1) if state.phase is Phase.CLOSING else Tick()
        state, _ = step(rules, state, event, now)
    assert state.phase in (Phase.FINISHED, Phase.SUSPENDED)


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

    LAST = State(round=RULES.rounds, version=RULES.rounds, returning=frozenset({1, 2}))

    @pytest.mark.parametrize(
        ("schedule", "finished_at"),
        [
            ([], 10.0),
            ([Listening(0), Joined(1, "worker-1"), Joined(2, "worker-2")], 10.0),  # who joined may not listen yet
            ([Listening(1)], 10.0),
            ([Listening(1), Listening(2)], 1.0),
            ([Suspend(500.0)], 1.0),
            ([Stop(Reason.INTERRUPTED)], 1.0),
        ],
    )
    def test_the_workers_of_the_last_round_are_told_of_the_end(self, schedule: list[Event], finished_at: float) -> None:
        rules, state = replace(RULES, server_evaluates=False), self.LAST
        state, done = run(rules, [(0.0, Tick()), *((1.0, event) for event in schedule)], state)
        if finished_at > 1:
            assert waiting(rules, state, 1.0).sentence.endswith("to come back before the run is over, at most 9 s")
            state, done = run(rules, [(9.9, Tick())], state)
            assert done == []
            state, done = run(rules, [(10.0, Tick())], state)
        assert isinstance(done[0], OpenRound if len(state.present) else FinishRun)

    def test_a_worker_that_came_back_evaluates_the_last_version(self) -> None:
        rules = replace(RULES, server_evaluates=False)
        state, done = run(rules, [(0.0, Tick()), *joins(3, 1.0)], self.LAST)
        assert done == []
        state, done = run(rules, [(2.0, Listening(2)), (2.0, Listening(1))], state)
        (opened,) = done
        assert isinstance(opened, OpenRound)
        assert opened.plan.evaluator == 0


class TestWhoIsInvited:
    """More workers than a round takes."""

    RULES = replace(RULES, workers=10, seed=7, sample_fraction=0.3, round_deadline_seconds=5)

    def test_it_is_a_function_of_seed_round_and_who_is_here(self) -> None:
        here = tuple(range(10))
        rounds = [invite(self.RULES, round_, here) for round_ in range(5)]
        # Fixed for good: a run has to be reproducible by any later version.
        assert rounds == [(2, 3, 9), (2, 7, 8), (2, 4, 8), (3, 7, 9), (4, 5, 6)]
        assert rounds != [invite(replace(self.RULES, seed=8), round_, here) for round_ in range(5)]
        # Who is not here is passed over; the others keep their order.
        assert set(invite(self.RULES, 0, tuple(index for index in here if index != 3))) > {2, 9}

    @pytest.mark.parametrize(
        ("fraction", "present", "count"),
        [(0.3, 10, 3), (0.3, 9, 3), (0.3, 1, 1), (0.01, 10, 1), (1.0, 7, 7), (0.55, 20, 11)],
    )
    def test_how_many(self, fraction: float, present: int, count: int) -> None:
        rules = replace(self.RULES, sample_fraction=fraction)
        invited = invite(rules, 0, tuple(range(present)))
        assert len(invited) == rules.invited(present) == count
        assert list(invited) == sorted(set(invited))

    def test_everybody_is_invited_equally_often(self) -> None:
        """3000 rounds of 3 of 10: 900 times each, with a standard deviation of 25."""
        count = [0] * 10
        for round_ in range(3000):
            for index in invite(self.RULES, round_, tuple(range(10))):
                count[index] += 1
        assert all(abs(times - 900) < 125 for times in count)

    def test_a_reopened_attempt_invites_the_same(self) -> None:
        rules = replace(self.RULES, min_workers=5)
        state, done = run(replace(rules, min_workers=10), [*joins(10), (0.0, Evaluated()), (5.0, Tick())])
        opened = [action.plan for action in done if isinstance(action, OpenRound)]
        assert [list(plan.roles) for plan in opened] == [[2, 3, 9]] * 2
        assert [plan.attempt for plan in opened] == [0, 0]
        # One of them goes: another takes its place, and the two others encode what they did.
        _, done = run(rules, [(6.0, Left(9)), (10.0, Tick())], state)
        (plan,) = [action.plan for action in done if isinstance(action, OpenRound)]
        assert set(plan.roles) > {2, 3}
        assert plan.attempt == 0

    def test_the_others_have_no_part_in_it(self) -> None:
        state, _ = run(self.RULES, [*joins(10), (0.0, Evaluated()), (1.0, Delivered(0)), (1.0, Left(1))])
        assert (state.phase, state.delivered) == (Phase.OPEN, frozenset())
        assert waiting(self.RULES, state, 1.0).sentence == (
            "contributions: 0 of 3 are here; missing: worker-2, worker-3, worker-9"
        )
        state, done = run(self.RULES, [(1.0, Delivered(index)) for index in (2, 3, 9)], state)
        (closed,) = done
        assert isinstance(closed, CloseRound)
        assert (closed.members, closed.absent) == ((2, 3, 9), {})

    def test_roles_and_the_evaluator_are_the_inviteds(self) -> None:
        rules = replace(self.RULES, source_fraction=0.5, server_evaluates=False)
        state, _ = run(rules, joins(10))
        assert state.plan is not None
        assert state.plan.roles == {2: Role.SOURCE, 3: Role.SOURCE, 9: Role.NESTED}
        assert state.plan.evaluator == 2


class TestMinWorkers:
    RULES = replace(RULES, min_workers=2)

    def test_a_round_opens_as_soon_as_they_are_here(self) -> None:
        state, done = run(self.RULES, joins(1))
        assert done == []
        assert waiting(self.RULES, state, 1.0).sentence == (
            "workers: 1 of the 2 that a round needs are here; the run ends in 29 s without them"
        )
        state, done = run(self.RULES, [(1.0, Joined(3, "worker-3"))], state)
        (opened,) = done
        assert isinstance(opened, OpenRound)
        assert list(opened.plan.roles) == [0, 3]

    def test_later_rounds_need_as_many(self) -> None:
        schedule = [*joins(2), (0.0, Evaluated()), (1.0, Delivered(0)), (1.0, Delivered(1)), (1.0, Left(1))]
        state, _ = run(self.RULES, [*schedule, (2.0, Applied(1))])
        assert (state.phase, state.version) == (Phase.WAITING, 1)
        state, done = run(self.RULES, [(3.0, Joined(2, "worker-2"))], state)
        assert isinstance(done[0], OpenRound)

    def test_too_few_for_too_long(self) -> None:
        _, done = run(self.RULES, [*joins(1), *((now, Seen(0)) for now in (9.0, 18.0, 27.0)), (30.0, Tick())])
        assert done == [FinishRun(Reason.JOIN_TIMEOUT)]


def gone(count: int = 4, now: float = 1.0) -> list[tuple[float, Event]]:
    return [(now, Left(index, Reason.SILENT)) for index in range(count)]


class TestNobodyIsHere:
    """All workers are gone: the run ends join_timeout later, wherever it stands."""

    RULES = replace(RULES, round_deadline_seconds=600)

    def test_before_a_round(self) -> None:
        state, done = run(self.RULES, [(29.9, Tick())])
        assert done == []
        assert run(self.RULES, [(30.0, Tick())], state)[1] == [FinishRun(Reason.JOIN_TIMEOUT)]

    def test_in_an_open_round(self) -> None:
        state, done = run(self.RULES, [(0.5, Delivered(0)), *gone(), (30.9, Tick())], evaluated(self.RULES)[0])
        assert done == []
        said = "workers: none is here, and 1 of 4 contributions are; the run ends in 10 s without them"
        assert waiting(self.RULES, state, 21.0) == (Awaited.WORKERS, 1.0, said)
        assert run(self.RULES, [(31.0, Tick())], state)[1] == [FinishRun(Reason.JOIN_TIMEOUT)]

    def test_one_that_comes_back_begins_the_wait_anew(self) -> None:
        schedule = [*gone(), (20.0, Joined(2, "worker-2")), (21.0, Left(2)), (50.9, Tick())]
        state, done = run(self.RULES, schedule, evaluated(self.RULES)[0])
        assert done == []
        assert run(self.RULES, [(51.0, Tick())], state)[1] == [FinishRun(Reason.JOIN_TIMEOUT)]

    def test_silence_is_noticed_first(self) -> None:
        state, _ = run(self.RULES, [(10.1, Tick())], evaluated(self.RULES)[0])
        assert (state.present, state.empty_since) == ((), 10.1)
        assert run(self.RULES, [(40.0, Tick())], state)[1] == []
        assert run(self.RULES, [(40.2, Tick())], state)[1] == [FinishRun(Reason.JOIN_TIMEOUT)]

    def test_a_deadline_in_between_does_not_begin_the_wait_anew(self) -> None:
        state, done = run(RULES, [*gone(), (20.0, Tick())], evaluated()[0])
        assert [type(action) for action in done] == [AbandonRound]
        assert waiting(RULES, state, 20.0).since == 1.0
        assert run(RULES, [(31.0, Tick())], state)[1] == [FinishRun(Reason.JOIN_TIMEOUT)]

    def test_while_an_update_is_applied(self) -> None:
        schedule = [*((0.0, Delivered(index)) for index in range(4)), *gone(), (50.0, Tick())]
        state, done = run(self.RULES, schedule, evaluated(self.RULES)[0])
        assert (state.phase, [type(action) for action in done]) == (Phase.CLOSING, [CloseRound])
        assert run(self.RULES, [(50.0, Applied(1))], state)[1] == [FinishRun(Reason.JOIN_TIMEOUT)]

    def test_the_last_round_needs_nobody_any_more(self) -> None:
        """The server evaluates the final model, however long that takes."""
        state = State(round=3, version=3)
        state, _ = run(self.RULES, [(0.0, Tick()), (500.0, Tick())], state)
        assert waiting(self.RULES, state, 500.0).awaited is Awaited.EVALUATION
        assert run(self.RULES, [(501.0, Evaluated()), (501.0, Applied(3))], state)[1][-1] == FinishRun(Reason.FINISHED)

    def test_a_quorum_that_waits_for_its_evaluation_needs_nobody(self) -> None:
        rules = replace(self.RULES, quorum=0.5)
        state, _ = run(rules, joins(4))
        state, done = run(rules, [(0.5, Delivered(0)), (0.5, Delivered(1)), *gone(), (90.0, Tick())], state)
        assert done == []
        assert waiting(rules, state, 90.0).awaited is Awaited.EVALUATION
        assert isinstance(run(rules, [(90.0, Evaluated())], state)[1][0], CloseRound)

    def test_where_it_was_asked_to_wait_it_waits(self) -> None:
        rules = replace(self.RULES, waits_for_workers=True)
        state, done = run(rules, [*gone(), (500.0, Tick())], evaluated(rules)[0])
        assert done == []
        state, done = run(rules, [(9000.0, Tick()), (99_999.0, Tick())], state)
        assert [type(action) for action in done] == [AbandonRound]
        assert waiting(rules, state, 99_999.0) == (
            Awaited.WORKERS, 1.0, "workers: 0 of the 4 that a round needs are here; there is no limit"
        )  # fmt: skip
        state, done = run(rules, joins(3, 100_000.0), state)  # one is missing, and waited for as well
        assert done == []
        state, done = run(rules, [(100_001.0, Joined(3, "worker-3"))], state)
        assert isinstance(done[0], OpenRound)


class TestSuspend:
    """The server has to go, and another goes on."""

    def test_before_a_round_at_once(self) -> None:
        state, done = run(RULES, [*joins(3), (1.0, Suspend(21.0))])
        assert (state.phase, done) == (Phase.SUSPENDED, [FinishRun(Reason.SUSPENDED)])
        assert step(RULES, state, Joined(3, "worker-3"), 2.0) == (state, ())

    def test_an_open_round_may_close_and_no_other_opens(self) -> None:
        state, done = run(RULES, [(1.0, Delivered(0)), (2.0, Suspend(12.0))], evaluated()[0])
        assert done == []
        assert waiting(RULES, state, 4.0).sentence == (
            "contributions: 1 of 4 are here; missing: worker-1, worker-2, worker-3; "
            "the run is suspended in 8 s at the latest"
        )
        state, done = run(RULES, [(5.0, Delivered(index)) for index in (1, 2, 3)], state)
        assert [type(action) for action in done] == [CloseRound]
        assert waiting(RULES, state, 5.0).sentence == "the update to be applied; the run is suspended after it"
        state, done = run(RULES, [(13.0, Tick()), (14.0, Applied(1))], state)
        assert done == [FinishRun(Reason.SUSPENDED)]
        assert (state.phase, state.round, state.version) == (Phase.SUSPENDED, 1, 1)

    def test_a_round_that_does_not_close_is_left_open(self) -> None:
        rules = replace(RULES, quorum=0.5, idle_timeout_seconds=100)
        schedule: list[tuple[float, Event]] = [(1.0, Delivered(0)), (1.0, Delivered(1))]
        schedule += [(2.0, Suspend(12.0)), (11.9, Tick())]
        state, done = run(rules, schedule, evaluated(rules)[0])
        assert done == []
        # Not even with a quorum: nobody is left out because the server goes.
        state, done = run(rules, [(12.0, Tick())], state)
        assert done == [FinishRun(Reason.SUSPENDED)]
        assert (state.delivered, state.round) == (frozenset({0, 1}), 0)

    @pytest.mark.parametrize(("asked", "reason"), [(True, Reason.SUSPENDED), (False, Reason.DISK_FULL)])
    def test_a_round_that_cannot_be_written_down_is_left(self, asked: bool, reason: Reason) -> None:
        schedule: list[tuple[float, Event]] = [(1.0, Delivered(index)) for index in range(4)]
        schedule += [(2.0, Suspend(12.0))] if asked else []
        state, done = run(RULES, [*schedule, (12.0, Tick()), (12.0, Unwritten())], evaluated()[0])
        assert done[1:] == [FinishRun(reason)]
        assert (state.round, state.delivered) == (0, frozenset(range(4)))

    def test_it_does_not_wait_for_workers_that_are_gone(self) -> None:
        _, done = run(RULES, [(1.0, Suspend(500.0)), *gone()], evaluated()[0])
        assert done == [FinishRun(Reason.SUSPENDED)]

    def test_a_round_that_is_abandoned_is_not_opened_again(self) -> None:
        alive: list[tuple[float, Event]] = [(now, Seen(index)) for now in (8.0, 16.0) for index in range(4)]
        state, done = run(RULES, [(1.0, Suspend(500.0)), *alive, (20.0, Tick())], evaluated()[0])
        assert [type(action) for action in done] == [AbandonRound, FinishRun]
        assert state.phase is Phase.SUSPENDED

    @pytest.mark.parametrize(("evaluated_at", "reason"), [(11.0, Reason.FINISHED), (13.0, Reason.SUSPENDED)])
    def test_a_run_that_is_all_but_over_is_finished(self, evaluated_at: float, reason: Reason) -> None:
        schedule: list[tuple[float, Event]] = [(2.0, Suspend(12.0)), (evaluated_at, Tick())]
        schedule += [(evaluated_at, Evaluated()), (evaluated_at, Applied(3))]
        _, done = run(RULES, [(0.0, Tick()), *schedule], State(round=3, version=3))
        assert done[-1] == FinishRun(reason)

    def test_an_end_is_an_end(self) -> None:
        _, done = run(RULES, [(1.0, Suspend(500.0)), (2.0, Stop(Reason.INTERRUPTED))], evaluated()[0])
        assert done == [FinishRun(Reason.INTERRUPTED)]


def test_the_end_is_waited_for_too() -> None:
    state, _ = run(RULES, [(1.0, Stop(Reason.INTERRUPTED))])
    assert waiting(RULES, state, 2.0) == (Awaited.FAREWELL, 1.0, "the workers to hear that the run is over")
    state, _ = run(RULES, [(1.0, Suspend(9.0))])
    assert waiting(RULES, state, 2.0) == (Awaited.FAREWELL, 1.0, "the workers to hear that the run is suspended")


def test_the_first_round_says_with_how_many_it_opens() -> None:
    rules = replace(RULES, quorum=0.75, idle_timeout_seconds=100)
    state, _ = run(rules, joins(3))
    said = waiting(rules, state, 10.0).sentence
    assert said == "workers: 3 of 4 are here; the round opens without the others in 20 s"
