"""The round as a pure state machine: (rules, state, event, now) -> (state, actions).

It holds who takes part and when; it knows nothing of tensors, sockets, files or clocks. Times are seconds of any
monotonic clock. States: waiting for workers -> open -> closing -> (applied, so the next opens) -> ... -> finished.
A run can be suspended in between: the server goes, and another goes on from what it leaves behind.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ditherps.codecs.base import Role
from ditherps.dither import SERVER, Address, Domain, words_at
from ditherps.errors import Reason

SERVER_EVALUATES = -1
"""Stands for the server where a plan names its evaluator."""
RETURN_SECONDS = 10.0


class Phase(enum.StrEnum):
    """Where the machine stands."""

    WAITING = "waiting"
    OPEN = "open"
    CLOSING = "closing"
    FINISHED = "finished"
    SUSPENDED = "suspended"


class Awaited(enum.StrEnum):
    """What the server waits for: one closed list for sentences and the gauge's label."""

    WORKERS = "workers"
    CONTRIBUTIONS = "contributions"
    EVALUATION = "evaluation"
    UPDATE = "update"
    FAREWELL = "farewell"
    """The workers have to be told how the run ended."""


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
    seed: int = 0
    """The job's: whom a round invites follows from it."""
    sample_fraction: float = 1.0
    """Share of the present workers that a round invites."""
    min_workers: int = 0
    """How many have to be here for a round to open; 0: all, later and after `join_timeout_seconds` a quorum."""
    waits_for_workers: bool = False
    """Whether to wait for workers without a limit."""

    def needed(self, invited: int) -> int:
        """Contributions that a quorum of `invited` workers takes."""
        return _ceiling(self.quorum * invited)

    @property
    def fewest_present(self) -> int:
        """With fewer workers no round ever opens."""
        return self.min_workers or self.needed(self.workers)

    def invited(self, present: int) -> int:
        """How many of `present` workers a round invites."""
        return min(present, max(1, _ceiling(self.sample_fraction * present)))


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
    empty_since: float | None = None
    """When the last worker went; None while one is here."""
    returning: frozenset[int] = frozenset()
    """After the last round of a job that another server had begun: workers that were in it, and do not listen yet."""
    suspend_at: float | None = None
    """When the run is suspended at the latest, where that was asked for: until then the open round may close."""

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
class Listening:
    """A worker is told of every change from now on."""

    index: int


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
class Unwritten:
    """There is no room to write down that the closing round is closed: its contributions are not applied."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The run is to end now."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Suspend:
    """The server has to go: open no round any more, and leave the open one as it is at this time (seconds)."""

    at: float


Event = (
    Joined | Left | Listening | Seen | Delivered | Evaluated | Applied | Unusable | Unwritten | Tick | Stop | Suspend
)


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
    """The run is over; or, with the reason `suspended`, it is for another server to go on with."""

    reason: Reason


Action = OpenRound | CloseRound | AbandonRound | FinishRun


def step(rules: Rules, state: State, event: Event, now: float) -> tuple[State, tuple[Action, ...]]:
    """The state after `event` at time `now` (seconds), and what is to be done, in order."""
    if state.phase in (Phase.FINISHED, Phase.SUSPENDED):
        return state, ()
    match event:
        case Stop(reason):
            return _finish(state, reason, now)
        case Suspend(at):
            state = replace(state, suspend_at=at)
        case Joined(index, name):
            state = _with_member(state, index, Member(name, present=True, last_seen=now))
        case Left(index, reason) if index in state.members:
            gone = replace(state.members[index], present=False, why_absent=reason)
            state = _with_member(state, index, gone)
        case Listening(index):
            state = replace(state, returning=state.returning - {index})
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
        case Unwritten() if state.phase is Phase.CLOSING:
            return _finish(state, Reason.DISK_FULL, now) if state.suspend_at is None else _suspend(state, now)
        case Tick():
            state = _silence(rules, state, now)
    if state.present:
        state = replace(state, empty_since=None)
    elif state.empty_since is None:
        state = replace(state, empty_since=now)
    return _settle(rules, state, now)


class Waiting(NamedTuple):
    """What the server waits for, and since when."""

    awaited: Awaited
    since: float
    sentence: str


def waiting(rules: Rules, state: State, now: float) -> Waiting:
    """What the server waits for at time `now` (seconds)."""
    match state.phase:
        case Phase.WAITING if state.round >= rules.rounds:
            left = max(0.0, state.since + _return_seconds(rules) - now)
            sentence = f"{len(state.returning)} workers to come back before the run is over, at most {left:.0f} s"
            return Waiting(Awaited.FAREWELL, state.since, sentence)
        case Phase.WAITING:
            return _waiting_for_workers(rules, state, now)
        case Phase.OPEN:
            found = _waiting_in_round(rules, state, now)
        case Phase.CLOSING:
            found = Waiting(Awaited.UPDATE, state.since, "the update to be applied")
        case Phase.FINISHED:
            return Waiting(Awaited.FAREWELL, state.since, "the workers to hear that the run is over")
        case Phase.SUSPENDED:
            return Waiting(Awaited.FAREWELL, state.since, "the workers to hear that the run is suspended")
    if state.suspend_at is None:
        return found
    left = max(0.0, state.suspend_at - now)
    suffix = f"in {left:.0f} s at the latest" if state.phase is Phase.OPEN else "after it"
    return found._replace(sentence=f"{found.sentence}; the run is suspended {suffix}")


def _waiting_for_workers(rules: Rules, state: State, now: float) -> Waiting:
    since, here = _awaits_workers_since(state), len(state.present)
    left = max(0.0, since + rules.join_timeout_seconds - now)
    if here >= rules.fewest_present:  # the first round waits for the others
        sentence = f"workers: {here} of {rules.workers} are here; the round opens without the others in {left:.0f} s"
    else:
        sentence = f"workers: {here} of the {rules.fewest_present} that a round needs are here; {_limit(rules, left)}"
    return Waiting(Awaited.WORKERS, since, sentence)


def _waiting_in_round(rules: Rules, state: State, now: float) -> Waiting:
    plan, pending = _plan_of(state), _pending(state)
    if not _any_present(state, pending) and has_quorum(rules, plan, state.delivered):
        return Waiting(Awaited.EVALUATION, state.since, f"the evaluation of version {plan.base_version}")
    here = f"{len(plan.roles) - len(pending)} of {len(plan.roles)}"
    if state.empty_since is not None:
        left = max(0.0, state.empty_since + rules.join_timeout_seconds - now)
        sentence = f"workers: none is here, and {here} contributions are; {_limit(rules, left)}"
        return Waiting(Awaited.WORKERS, state.empty_since, sentence)
    shown = ", ".join(_described(state.members[index], now) for index in pending[:3])
    more = f" and {len(pending) - 3} more" if len(pending) > 3 else ""
    return Waiting(Awaited.CONTRIBUTIONS, state.since, f"contributions: {here} are here; missing: {shown}{more}")


def _limit(rules: Rules, left_seconds: float) -> str:
    return "there is no limit" if rules.waits_for_workers else f"the run ends in {left_seconds:.0f} s without them"


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
    present = state.present
    waited = now - _awaits_workers_since(state) >= rules.join_timeout_seconds
    enough = len(present) >= rules.fewest_present
    # The first round waits for everybody as long as it may; later ones go on with a quorum.
    if len(present) >= rules.workers or (enough and (rules.min_workers or state.begun or waited)):
        return _open(rules, state, invite(rules, state.round, present), now)
    if waited and not rules.waits_for_workers:
        return _finish(state, Reason.JOIN_TIMEOUT, now)
    return state, ()


def _awaits_workers_since(state: State) -> float:
    """Since when the machine waits for workers to come: all may have gone before their round was abandoned."""
    return state.since if state.empty_since is None else min(state.since, state.empty_since)


def invite(rules: Rules, round_: int, present: tuple[int, ...]) -> tuple[int, ...]:
    """The workers that a round invites, a function of the seed, the round and who is here: indices, ascending.

    They are those of the smallest keys; worker i's key is word i of the round's invitation stream.
    """
    count = rules.invited(len(present))
    if count == len(present):
        return present
    address = Address(seed=rules.seed, round=round_, sender=SERVER, domain=Domain.INVITATION)
    keyed = sorted(zip(words_at(address, present).tolist(), present, strict=True))
    return tuple(sorted(index for _, index in keyed[:count]))


def _open(rules: Rules, state: State, invited: tuple[int, ...], now: float) -> tuple[State, tuple[Action, ...]]:
    roles = assign_roles(invited, rules.source_fraction)
    evaluator = _evaluator(rules, state, invited)
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


def _evaluator(rules: Rules, state: State, invited: tuple[int, ...]) -> int | None:
    """The server, or the lowest of the invited; where nobody is invited, the lowest that is here."""
    due = state.round % rules.evaluation_interval == 0 or state.round >= rules.rounds
    if not due:
        return None
    if rules.server_evaluates:
        return SERVER_EVALUATES
    return next(iter(invited or state.present), None)


def _try_close(rules: Rules, state: State, now: float) -> tuple[State, tuple[Action, ...]]:
    plan, pending = _plan_of(state), _pending(state)
    late = now >= plan.deadline_at
    enough = has_quorum(rules, plan, state.delivered)
    evaluating = not state.evaluated and _can_evaluate(state, plan)
    if enough and (late or not (evaluating or _any_present(state, pending))):
        absent = {index: state.members[index].why_absent or Reason.DEADLINE for index in pending}
        members = tuple(index for index in plan.roles if index in state.delivered)
        return replace(state, phase=Phase.CLOSING, since=now), (CloseRound(plan, members, absent),)
    deserted_since = None if enough else state.empty_since
    if state.suspend_at is not None and (now >= state.suspend_at or deserted_since is not None):
        return _suspend(state, now)
    if late:
        return _abandon(rules, state, Reason.QUORUM, now)
    deserted = deserted_since is not None and now - deserted_since >= rules.join_timeout_seconds
    if deserted and not rules.waits_for_workers:
        return _finish(state, Reason.JOIN_TIMEOUT, now)
    return state, ()


def _plan_of(state: State) -> Plan:
    assert state.plan is not None
    return state.plan


def _pending(state: State) -> list[int]:
    """The invited that have not delivered."""
    return [index for index in _plan_of(state).roles if index not in state.delivered]


def _any_present(state: State, indices: Collection[int]) -> bool:
    return any(state.members[index].present for index in indices)


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
        return _try_open(rules, state, now) if state.suspend_at is None else _suspend(state, now)
    if state.returning and state.suspend_at is None and now - state.since < _return_seconds(rules):
        return state, ()
    if state.round == rules.rounds and _evaluator(rules, state, ()) is not None:
        # One past the last round nobody is invited: it is there to evaluate the final model.
        return _open(rules, state, (), now)
    return _finish(state, Reason.FINISHED, now)


def _return_seconds(rules: Rules) -> float:
    """For how long workers may come back to hear that the run is over."""
    return min(rules.join_timeout_seconds, RETURN_SECONDS)


def _finish(state: State, reason: Reason, now: float) -> tuple[State, tuple[Action, ...]]:
    return replace(state, phase=Phase.FINISHED, since=now), (FinishRun(reason),)


def _suspend(state: State, now: float) -> tuple[State, tuple[Action, ...]]:
    return replace(state, phase=Phase.SUSPENDED, since=now), (FinishRun(Reason.SUSPENDED),)
