"""From a checkpoint and the redo log to where the server stood when it was cut off, without the workers' help."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ditherps.errors import EncodingError, PayloadError, RefusedError, UserError
from ditherps_server import redo, rounds
from ditherps_server.accounts import Accounts
from ditherps_server.checkpoint import Entered
from ditherps_server.model import ServerModel
from ditherps_server.records import RoundRecord
from ditherps_server.redo import Abandoned, Closed, Contributed, Leased, Logged, NoLog, Opened, RedoLog, Sharded
from ditherps_server.saving import Origin
from ditherps_server.staging import Contribution
from ditherps_server.updater import Updater

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Restored:
    """Where a job stands, besides its model, its optimizer and its accounts."""

    version: int = 0
    leases: dict[int, bytes] = field(default_factory=dict)
    entered: dict[int, Entered] = field(default_factory=dict)
    opened: Opened | None = None
    """The plan that was open, or was abandoned last."""
    abandoned: bool = False
    """The plan was abandoned, and none has been opened since."""
    staged: list[Contribution] = field(default_factory=list)
    """Contributions to the open plan."""
    records: list[RoundRecord] = field(default_factory=list)
    """Of the rounds that were applied again."""
    incomplete: bool = False
    """Rounds that were closed are to be computed anew."""
    log_bytes: int = 0

    def forget_plan(self) -> None:
        """Let the round that was open begin anew."""
        self.opened = None
        self.staged.clear()

    @property
    def is_open(self) -> bool:
        """A round is open, in which workers may have been acknowledged."""
        return self.opened is not None and not self.abandoned

    def state(self, rules: rounds.Rules, names: tuple[str, ...], now: float) -> rounds.State:
        """The state machine's state at time `now` (seconds).

        The workers of an open round count as present until they are silent for too long: they were a moment ago.
        """
        last = frozenset(index for index, entered in self.entered.items() if entered.version == self.version)
        state = rounds.State(
            since=now, round=self.version, version=self.version,
            returning=last if self.version >= rules.rounds else frozenset(),
        )  # fmt: skip
        if self.opened is None:
            return state
        was = self.opened
        plan = rounds.Plan(
            was.round, was.attempt, was.base_version, was.roles, was.evaluator, now, now + rules.round_deadline_seconds
        )
        if self.abandoned:
            return replace(state, plan=plan, encoded=was.encoded)
        return replace(
            state, phase=rounds.Phase.OPEN, plan=plan,
            members={index: rounds.Member(names[index], present=True, last_seen=now) for index in was.roles},
            encoded=was.encoded, delivered=frozenset(c.announcement.index for c in self.staged),
            # Where the server no longer has test data, nobody will evaluate what it was to evaluate.
            evaluated=was.evaluator is None
            or (was.evaluator == rounds.SERVER_EVALUATES and not rules.server_evaluates),
        )  # fmt: skip


def replay(
    path: Path,
    origin: Origin,
    model: ServerModel,
    updater: Updater,
    accounts: Accounts,
    now: float,
    *,
    must_be_whole: bool,
) -> Restored:
    """Apply the rounds that were closed after the checkpoint from which model, optimizer and accounts come.

    Raises `UserError` when the log does not go on from the checkpoint, or the job cannot go on; with `must_be_whole`
    also when it is missing or cannot be read, which is else where the job goes on from.
    """
    restored = Restored(model.version, dict(origin.leases), dict(origin.entered))
    staged: dict[int, Contribution] = {}
    shards: dict[int, bytes] = {}
    """What workers have said last; the checkpoint's cache is of then, or of later than what comes first here."""
    for logged in _read(path, origin.job_id, must_be_whole):
        restored.log_bytes = logged.end
        match logged.record:
            case Leased(index=index, key=key):
                restored.leases[index] = key
            case Sharded(index=index, stated=stated):
                shards[index] = stated
            case _ if restored.incomplete:
                pass
            case Opened() as opened:
                restored.opened, restored.abandoned = opened, False
                staged.clear()
                accounts.restore(opened.accounts, now)
            case Contributed(announcement=announcement) as contributed:
                contribution = Contribution.restored(announcement, logged.content)
                try:
                    if announcement.round >= model.version:  # else the checkpoint holds it
                        _take_shards(updater, shards)
                        updater.recover(contribution)
                except PayloadError as error:
                    _give_up(restored, error, log_path=path)
                    staged.clear()
                    continue
                staged[announcement.index] = contribution
                accounts.restore(contributed.accounts, now)
            case Abandoned() as abandoned:
                restored.abandoned = True
                staged.clear()
                accounts.restore(abandoned.accounts, now)
            case Closed() as closed:
                _close(path, restored, closed, staged, model, updater, accounts, now)
                staged.clear()
    _take_shards(updater, shards)
    if restored.opened is not None and restored.opened.base_version < model.version:
        restored.forget_plan()  # of before the checkpoint
    if restored.is_open:
        restored.staged = list(staged.values())
    restored.version = model.version
    if restored.log_bytes:
        found = (len(restored.records), model.version, len(restored.staged))
        log.info("replayed rounds=%d version=%d staged=%d", *found)
    return restored


def _take_shards(updater: Updater, shards: dict[int, bytes]) -> None:
    for index, stated in shards.items():
        updater.has_samples(index, stated)
    shards.clear()


def _give_up(restored: Restored, error: PayloadError, log_path: Path) -> None:
    """Mode `data`: what was held of samples is not there any more, so the rounds since are computed anew."""
    log.warning("%s goes on from samples that are not there (%s): later rounds are computed anew", log_path, error)
    restored.forget_plan()
    restored.incomplete = True


def _read(path: Path, job_id: str, must_be_whole: bool) -> Iterator[Logged]:
    if must_be_whole and not path.exists():
        raise UserError(f"{path} is missing: put it back, or go on from the checkpoint with --durability none")
    try:
        yield from redo.read(path, job_id)
    except UserError as error:
        if must_be_whole:
            raise
        log.warning("what comes before is all that is used: %s", error)


def _close(
    path: Path,
    restored: Restored,
    closed: Closed,
    staged: dict[int, Contribution],
    model: ServerModel,
    updater: Updater,
    accounts: Accounts,
    now: float,
) -> None:
    was = restored.opened
    if was is None or not staged.keys() >= set(closed.members) or was.base_version > model.version:
        raise UserError(f"{path} does not go on from the checkpoint: put both back, or begin anew without --resume")
    if was.base_version < model.version:
        return  # the checkpoint holds it
    contributions = [staged[index] for index in closed.members]
    try:
        report = updater.apply(contributions)
    except RefusedError:
        restored.abandoned = True  # as it was then
        return
    except EncodingError as error:
        message = f"the model diverged in round {was.round}: {error}; begin anew with a lower optimizer.lr"
        raise UserError(message) from None
    plan = rounds.Plan(
        was.round, was.attempt, was.base_version, was.roles, was.evaluator, now - closed.round_seconds, now
    )
    accounts.restore(closed.accounts, now)
    action = rounds.CloseRound(plan, closed.members, closed.absent)
    record = accounts.applied(action, report.announcements, report, closed.evaluation, model, accounts.spent(), now)
    restored.records.append(record)
    entered = Entered(was.round, was.attempt, model.version, len(closed.members))
    restored.entered.update(dict.fromkeys(closed.members, entered))
    restored.opened = None


def begin_log(log_: RedoLog | NoLog, path: Path, restored: Restored, stated: Mapping[int, bytes]) -> None:
    """Make the log ready for a server that goes on from here, whose checkpoint has been written.

    Raises `UserError` where it cannot be written.
    """
    try:
        if isinstance(log_, NoLog):
            path.unlink(missing_ok=True)
        elif restored.opened is not None:
            log_.go_on(restored.log_bytes)
        else:
            log_.begin(redo.members(restored.leases, stated))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
