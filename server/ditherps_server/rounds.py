"""The round as a pure state machine: (rules, state, event, now) -> (state, actions).

It holds who takes part and when; it knows nothing of tensors, sockets, files or clocks. Times are seconds of any
monotonic clock. States: waiting for workers -> open -> closing -> (applied, so the next opens) -> ... -> finished.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from ditherps.codecs.base import Role
from ditherps.errors import Reason

SERVER_EVALUATES = -1
"""Stands for the server where a plan names its evaluator."""


class Phase(enum.StrEnum):
    """Where the machine stands."""

    WAITING = "waiting"
    OPEN = "open"
    CLOSING = "closing"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Rules:
    """What a job says about its rounds."""

    workers: int
    rounds: int
    join_timeout_seconds: float
    round_deadline_seconds: float
    idle_timeout_seconds: float
    quorum: float = 1.0
    source_fraction: float = 1.0
    """Share of the invited, the first by index, that are sources; the rest are nested. 1: no nested senders."""
    evaluation_interval: int = 1
    server_evaluates: bool = True
    abandon_limit: int = 5
    """Attempts at one round before the run fails."""

    def needed(self, invited: int) -> int:
        """Contributions that a quorum of `invited` workers takes."""
        return _ceiling(self.quorum * invited)


@dataclass(frozen=True, slots=True)
class Member:
    """A worker in the job's member table, which it never leaves."""

    name: str
    present: bool
    last_seen: float
    why_absent: Reason | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """One attempt at a round. `roles` holds every invited worker, by ascending index."""

    round: int
    attempt: int
    base_version: int
    roles: Mapping[int, Role]
    evaluator: int | None
    opened_at: float
    deadline_at: float


@dataclass(frozen=True, slots=True)
class State:
    """Everything that the machine remembers."""

    phase: Phase = Phase.WAITING
    since: float = 0.0
    """When the present wait began."""
    round: int = 0
    """The round that is open, or comes next."""
    version: int = 0
    members: Mapping[int, Member] = field(default_factory=dict)
    plan: Plan | None = None
    """The open round's plan; while waiting, that of the attempt that was abandoned last, if any."""
    encoded: Mapping[int, Role] = field(default_factory=dict)
    """Roles in which workers may have encoded for the present round and attempt."""
    delivered: frozenset[int] = frozenset()
    evaluated: bool = False
    begun: bool = False
    """A round has opened since the server started: from then on a quorum is enough to open the next."""
    abandoned: int = 0
    """Abandoned attempts at the present round."""

    @property
    def present(self) -> tuple[int, ...]:
        """Indices of the workers that are here, ascending."""
        return tuple(sorted(index for index, member in self.members.items() if member.present))


@dataclass(frozen=True, slots=True)
class Joined:
    """A worker was let in, for the first time or again."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Left:
    """A worker said that it goes, or its session ended."""

    index: int
    reason: Reason = Reason.LEFT


@dataclass(frozen=True, slots=True)
class Seen:
    """A worker gave a sign of life."""

    index: int


@dataclass(frozen=True, slots=True)
class Delivered:
    """A worker's contribution to the open attempt is staged, whole."""

    index: int


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The evaluator's result for the open round's base version is here, or it has none to give."""


@dataclass(frozen=True, slots=True)
class Applied:
    """The closing round's update is in the model, which has this version now."""

    version: int


@dataclass(frozen=True, slots=True)
class Unusable:
    """The closing round's contributions cannot be made into an update."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The run is to end now."""

    reason: Reason


Event = Joined | Left | Seen | Delivered | Evaluated | Applied | Unusable | Tick | Stop


@dataclass(frozen=True, slots=True)
class OpenRound:
    """Tell the workers this plan."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class CloseRound:
    """Make an update of the members' contributions; `absent` says why the other invited are not in."""

    plan: Plan
    members: tuple[int, ...]
    absent: Mapping[int, Reason]


@dataclass(frozen=True, slots=True)
class AbandonRound:
    """Drop the attempt's contributions."""

    plan: Plan
    reason: Reason


@dataclass(frozen=True, slots=True)
class FinishRun:
    """The run is over."""

    reason: Reason


Action = OpenRound | CloseRound | AbandonRound | FinishRun


def step(rules: Rules, state: State, event: Event, now: float) -> tuple[State, tuple[Action, ...]]:
    """The state after `event` at time `now` (seconds), and what is to be done, in order."""
    if state.phase is Phase.FINISHED:
        return state, ()
    match event:
        case Stop(reason):
            return _finish(state, reason, now)
        case Joined(index, name):
            state = _with_member(state, index, Member(name, present=True, last_seen=now))
        case Left(index, reason) if index in state.members:
            gone = replace(state.members[index], present=False, why_absent=reason)
            state = _with_member(state, index, gone)
        case Seen(index) if index in state.members:
            # Presence is for Joined alone: a worker that was declared silent comes back by joining again.
            return _with_member(state, index, replace(state.members[index], last_seen=now)), ()
        case Delivered(index) if state.phase is Phase.OPEN and state.plan and index in state.plan.roles:
            state = replace(state, delivered=state.delivered | {index})
        case Evaluated() if state.phase is Phase.OPEN:
            state = replace(state, evaluated=True)
        case Applied(version) if state.phase is Phase.CLOSING:
            return _advance(rules, replace(state, version=version, round=state.round + 1), now)
        case Unusable(reason) if state.phase is Phase.CLOSING:
            return _abandon(rules, state, reason, now)
        case Tick():
            state = _silence(rules, state, now)
    return _settle(rules, state, now)


def waiting_for(rules: Rules, state: State, now: float) -> str:
    """One sentence: what the server waits for."""
    match state.phase:
        case Phase.WAITING:
            return f"workers: {len(state.present)} of {rules.workers} are here"
        case Phase.OPEN if state.plan is not None:
            pending = [index for index in state.plan.roles if index not in state.delivered]
            if not pending:
                return f"the evaluation of version {state.plan.base_version}"
            shown = ", ".join(_described(state.members[index], now) for index in pending[:3])
            more = f" and {len(pending) - 3} more" if len(pending) > 3 else ""
            invited = len(state.plan.roles)
            return f"contributions: {invited - len(pending)} of {invited} are here; missing: {shown}{more}"
        case Phase.CLOSING:
            return "the update to be applied"
        case _:
            return "nothing"


def _described(member: Member, now: float) -> str:
    if not member.present:
        return f"{member.name} ({member.why_absent})"
    silence = now - member.last_seen
    return f"{member.name} (silent {silence:.0f} s)" if silence >= 10 else member.name


def _with_member(state: State, index: int, member: Member) -> State:
    return replace(state, members={**state.members, index: member})


def _silence(rules: Rules, state: State, now: float) -> State:
    for index, member in state.members.items():
        if member.present and now - member.last_seen > rules.idle_timeout_seconds:
            state = _with_member(state, index, replace(member, present=False, why_absent=Reason.SILENT))
    return state


def _settle(rules: Rules, state: State, now: float) -> tuple[State, tuple[Action, ...]]:
    """Open, close, abandon or finish where the state calls for it."""
    if state.phase is Phase.WAITING:
        return _next(rules, state, now)
    if state.phase is Phase.OPEN:
        return _try_close(rules, state, now)
    return state, ()


def _try_open(rules: Rules, state: State, now: float) -> tuple[State, tuple[Action, ...]]:
    waited = now - state.since >= rules.join_timeout_seconds
    enough = len(state.present) >= rules.needed(rules.workers)
    # The first round waits for everybody as long as it may; later ones go on with a quorum.
    if len(state.present) >= rules.workers or (enough and (state.begun or waited)):
        return _open(rules, state, state.present, now)
    return _finish(state, Reason.JOIN_TIMEOUT, now) if waited else (state, ())


def _open(rules: Rules, state: State, invited: tuple[int, ...], now: float) -> tuple[State, tuple[Action, ...]]:
    roles = assign_roles(invited, rules.source_fraction)
    evaluator = _evaluator(rules, state)
    attempt, encoded = (0, {}) if state.plan is None else (state.plan.attempt, state.encoded)
    if any(encoded.get(index, role) != role for index, role in roles.items()):
        attempt, encoded = attempt + 1, {}
    plan = Plan(state.round, attempt, state.version, roles, evaluator, now, now + rules.round_deadline_seconds)
    opened = replace(
        state, phase=Phase.OPEN, since=now, plan=plan, encoded={**encoded, **roles}, delivered=frozenset(),
        evaluated=evaluator is None, begun=True,
    )  # fmt: skip
    return opened, (OpenRound(plan),)


def assign_roles(invited: tuple[int, ...], source_fraction: float) -> dict[int, Role]:
    """Roles of the invited workers (indices, ascending): the first share are sources (algorithms.md, section 1.2)."""
    sources = max(1, _ceiling(source_fraction * len(invited)))
    return {index: Role.SOURCE if place < sources else Role.NESTED for place, index in enumerate(invited)}


def _ceiling(value: float) -> int:
    """The ceiling, for a product that may have been rounded up: 0.55 * 20 is 11."""
    return math.ceil(value - 1e-9)


def _evaluator(rules: Rules, state: State) -> int | None:
    due = state.round % rules.evaluation_interval == 0 or state.round >= rules.rounds
    if not due:
        return None
    if rules.server_evaluates:
        return SERVER_EVALUATES
    return state.present[0] if state.present else None


def _try_close(rules: Rules, state: State, now: float) -> tuple[State, tuple[Action, ...]]:
    plan = state.plan
    assert plan is not None
    pending = [index for index in plan.roles if index not in state.delivered]
    late = now >= plan.deadline_at
    if any(state.members[index].present for index in pending) and not late:
        return state, ()
    if not state.evaluated and not late and _can_evaluate(state, plan):
        return state, ()
    if has_quorum(rules, plan, state.delivered):
        absent = {index: state.members[index].why_absent or Reason.DEADLINE for index in pending}
        members = tuple(index for index in plan.roles if index in state.delivered)
        return replace(state, phase=Phase.CLOSING, since=now), (CloseRound(plan, members, absent),)
    return _abandon(rules, state, Reason.QUORUM, now) if late else (state, ())


def _can_evaluate(state: State, plan: Plan) -> bool:
    if plan.evaluator is None:
        return False
    return plan.evaluator == SERVER_EVALUATES or state.members[plan.evaluator].present


def excluding(action: CloseRound, indices: Collection[int], reason: Reason) -> CloseRound:
    """The same closing without the contributions of `indices`."""
    return CloseRound(
        action.plan, tuple(index for index in action.members if index not in indices),
        {**action.absent, **dict.fromkeys(indices, reason)},
    )  # fmt: skip


def has_quorum(rules: Rules, plan: Plan, delivered: frozenset[int]) -> bool:
    """Whether enough workers of each role have delivered."""
    for role in Role:
        invited = [index for index, has in plan.roles.items() if has is role]
        if len(delivered.intersection(invited)) < rules.needed(len(invited)):
            return False
    return True


def _abandon(rules: Rules, state: State, reason: Reason, now: float) -> tuple[State, tuple[Action, ...]]:
    assert state.plan is not None
    dropped = AbandonRound(state.plan, reason)
    state = replace(
        state, phase=Phase.WAITING, since=now, delivered=frozenset(), evaluated=False, abandoned=state.abandoned + 1
    )
    if state.abandoned >= rules.abandon_limit:
        state, actions = _finish(state, reason, now)
    else:
        state, actions = _next(rules, state, now)
    return state, (dropped, *actions)


def _advance(rules: Rules, state: State, now: float) -> tuple[State, tuple[Action, ...]]:
    state = replace(state, phase=Phase.WAITING, since=now, plan=None, encoded={}, delivered=frozenset(), abandoned=0)
    return _next(rules, state, now)


def _next(rules: Rules, state: State, now: float) -> tuple[State, tuple[Action, ...]]:
    """Open the next round, or wait for who is needed for it; after the last one evaluate, and finish."""
    if state.round < rules.rounds:
        return _try_open(rules, state, now)
    if state.round == rules.rounds and _evaluator(rules, state) is not None:
        # One past the last round nobody is invited: it is there to evaluate the final model.
        return _open(rules, state, (), now)
    return _finish(state, Reason.FINISHED, now)


def _finish(state: State, reason: Reason, now: float) -> tuple[State, tuple[Action, ...]]:
    return replace(state, phase=Phase.FINISHED, since=now), (FinishRun(reason),)
