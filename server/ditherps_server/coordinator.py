"""Drives the round's state machine: feeds it events, does what it asks for, tells the workers.

Everything here runs on the event loop, except what `Updater` and `Evaluator` compute in threads.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from ditherps.codecs import Role
from ditherps.config import JobConfig
from ditherps.errors import (
    ContextMismatchError,
    DitherpsError,
    EncodingError,
    PayloadError,
    Reason,
    RefusedError,
)
from ditherps.metrics import ServerMetrics
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps.v1 import types_pb2
from ditherps_server import rounds
from ditherps_server.accounts import Accounts
from ditherps_server.broadcast import Answer, Broadcast
from ditherps_server.checkpoint import Entered
from ditherps_server.evaluation import Evaluation, Evaluator
from ditherps_server.members import Members, Session
from ditherps_server.model import ServerModel
from ditherps_server.records import Recorder
from ditherps_server.redo import Abandoned, Closed, Contributed, Leased, NoLog, Opened, RedoLog, Sharded, members
from ditherps_server.repeated import Repeated
from ditherps_server.replay import Restored
from ditherps_server.rounds import Phase, Plan, Rules
from ditherps_server.sampled import SampledUpdates
from ditherps_server.saving import Saver
from ditherps_server.staging import Announcement, Contribution, Staging
from ditherps_server.updater import Updater
from ditherps_server.watch import Watchers

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
SEEN_SECONDS = 0.5
"""Signs of life that follow each other faster say nothing new."""
LAST_WRITE_SECONDS = 1.0
"""What the round that is being closed has to be written down when the run is stopped."""
_ROLES = {Role.SOURCE: types_pb2.ROLE_SOURCE, Role.NESTED: types_pb2.ROLE_NESTED}
_PHASES = {
    Phase.WAITING: types_pb2.PHASE_WAITING,
    Phase.OPEN: types_pb2.PHASE_OPEN,
    Phase.CLOSING: types_pb2.PHASE_CLOSING,
    Phase.FINISHED: types_pb2.PHASE_FINISHED,
    Phase.SUSPENDED: types_pb2.PHASE_SUSPENDED,
}


class Coordinator:
    """One job: its members, its rounds, its model."""

    def __init__(
        self,
        job: JobConfig,
        rules: Rules,
        model: ServerModel,
        broadcast: Broadcast,
        updater: Updater,
        evaluator: Evaluator | None,
        members: Members,
        recorder: Recorder,
        saver: Saver,
        redo: RedoLog | NoLog,
        accounts: Accounts,
        metrics: ServerMetrics,
        restored: Restored,
        sampled: SampledUpdates | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sampled`: who has which samples, in mode `data`."""
        self.job, self.model, self.members, self.accounts = job, model, members, accounts
        self.broadcast, self.saver = broadcast, saver
        self.last_evaluation: Evaluation | None = None
        self.model_sha256 = self.failure = ""
        self._rules, self._updater, self._evaluator = rules, updater, evaluator
        self._recorder, self._metrics, self._clock, self._redo = recorder, metrics, clock, redo
        self._sampled = sampled
        self._state = restored.state(rules, members.names, clock())
        self._staging = Staging(job.staging_bytes)
        for contribution in restored.staged:
            self._staging.restore(contribution)
        self._joining: Counter[int] = Counter()
        """Members whose leases are being written."""
        self._preparing: dict[int, float] = {}
        """Mode `data`: when those who have joined, but not said which samples they have, gave a sign of life."""
        self._said: dict[int, int] = {}
        """Of which session a member's samples are."""
        self._watchers = Watchers()
        self._repeated = Repeated()
        self._closings: set[asyncio.Task[None]] = set()
        self._evaluations: set[asyncio.Task[None]] = set()
        self._evaluating = asyncio.Lock()
        self._finished: asyncio.Future[Reason] = asyncio.get_running_loop().create_future()
        self._closed: tuple[types_pb2.RoundResult, frozenset[int]] | None = None
        self._concerned: frozenset[int] = frozenset()
        """The invited of the round that was open when the workers were told last."""
        self._entered = restored.entered
        """By worker, the last round that its contribution entered: it may not have been listening."""
        self._moving = False
        """Whether a thread is changing the model."""
        self._evaluation: Evaluation | None = None

    # What the service asks for.

    async def join(self, name: str, lease_key: bytes, samples: int) -> Session:
        """Let a worker in whose contributions hold `samples` each; raises `RefusedError` if it may not.

        Returns when its lease lasts.
        """
        occupied = frozenset(self._state.present).union(self._joining, self._getting_ready())
        session = self.members.join(name, lease_key, occupied=occupied, samples=samples)
        known = self.members.names[session.index]
        log.info("joined worker=%s index=%d session=%d", known, session.index, session.number)
        self._watchers.end(session.index)
        self._joining[session.index] += 1
        try:
            await self._durable(self._redo.append(Leased(index=session.index, key=lease_key), kept=False))
        finally:
            self._joining -= Counter([session.index])
        if self._sampled is None:
            self._handle(rounds.Joined(session.index, known))
        else:  # it is here once it has said which samples it has
            self._preparing[session.index] = self._clock()
        return session

    def _getting_ready(self) -> set[int]:
        """Members that have joined, and are not here yet."""
        since = self._clock() - self.job.idle_timeout_seconds
        return {index for index, seen in self._preparing.items() if seen > since}

    async def has_samples(self, fence: types_pb2.Fence, stated: bytes) -> None:
        """In mode `data`: a worker says which samples it has, and is ready; raises `PayloadError`, `RefusedError`."""
        if self._sampled is None:
            raise RefusedError(Reason.TASK_MISMATCH, f"a job in mode {self.job.mode} takes no samples")
        session = self.members.check(fence)
        index = session.index
        if not self._sampled.knows(index, stated):
            if self._said.get(index) == session.number:
                raise RefusedError(Reason.JOIN_RATE, "this worker has said that it has other samples: join again")
            shard = await asyncio.to_thread(self._sampled.read, index, stated, self._state.round)
            while self._closings:  # what enters the cache must not change on its way
                await asyncio.wait(self._closings)
            self.members.check(fence)
            if self._finished.done():
                return  # the last checkpoint may be on its way
            self._said[index] = session.number
            self._sampled.admit(index, shard)
            self._staging.unsettle(index)  # replay finds it behind what this worker has said
            self._redo.append(Sharded(index=index, stated=stated))
        self._preparing.pop(index, None)
        self._handle(rounds.Joined(index, self.members.names[index]))

    async def _durable(self, written: asyncio.Future[None]) -> None:
        """Returns when a record is on disk; raises `RefusedError` (`disk_full`) where there is no room."""
        try:
            await asyncio.shield(written)
        except OSError as error:
            self._metrics.redo_failures.inc()
            raise RefusedError(Reason.DISK_FULL, f"the server cannot write its redo log: {error.strerror}") from None

    def seen(self, fence: types_pb2.Fence) -> int:
        """The index of the worker that a message comes from; raises `RefusedError` if it has no session."""
        index = self.members.check(fence).index
        member = self._state.members.get(index)
        if index in self._preparing:
            self._preparing[index] = self._clock()
        if member is None:  # it joined after the end, or is not ready
            return index
        if not member.present and member.why_absent is Reason.SILENT:
            self._handle(rounds.Joined(index, member.name))  # silent, and here again
        elif self._clock() - member.last_seen < SEEN_SECONDS:
            return index
        else:
            self._handle(rounds.Seen(index))
        self.accounts.seen(index)
        return index

    def leave(self, index: int, reason: Reason) -> None:
        """A worker goes."""
        self._preparing.pop(index, None)
        if index in self._state.present:
            log.info("left worker=%s reason=%s", self.members.names[index], reason)
            self._handle(rounds.Left(index, reason))

    def watch(self, index: int) -> Watchers.Stream:
        """The stream of changes for a worker, beginning with the present state."""
        entered = self._entered.get(index)
        told = (_result(entered), frozenset([index])) if entered else None
        stream = self._watchers.begin(index, self._response(index, told))
        self._handle(rounds.Listening(index))
        return stream

    def admit(self, index: int, header: pb.PushHeader) -> Contribution:
        """Check what a Push announces and make room for it.

        Raises `RefusedError` when it does not fit the open round, `PayloadError` when its sizes cannot be right.
        """
        plan = self._state.plan
        if self._state.phase is not Phase.OPEN or plan is None or (header.round, header.attempt) != (
            plan.round, plan.attempt,
        ):  # fmt: skip
            late = header.round < self._state.round or self._state.phase is Phase.CLOSING
            raise RefusedError(
                Reason.LATE if late else Reason.WRONG_ROUND,
                f"round {header.round} attempt {header.attempt} is not open; the server is at {self._state.round}",
            )
        role = plan.roles.get(index)
        if role is None:
            raise RefusedError(Reason.NOT_INVITED, f"{self.members.names[index]} is not invited to round {plan.round}")
        if header.role != _ROLES[role]:
            raise RefusedError(Reason.WRONG_ROLE, f"the plan says {role}")
        if header.base_version != plan.base_version:
            raise RefusedError(Reason.WRONG_ROUND, f"round {plan.round} is computed at version {plan.base_version}")
        if header.context.version or header.context.digest:
            raise RefusedError(Reason.CONTEXT_MISMATCH, "this job has no codec context")
        announcement = Announcement(
            round=plan.round, attempt=plan.attempt, index=index, role=role, update_bytes=header.update_bytes,
            buffer_bytes=header.buffer_bytes, digest=header.digest, samples=header.samples,
            sample_bytes=header.sample_bytes, loss=header.loss if header.HasField("loss") else math.nan,
            nmse=header.nmse if header.HasField("nmse") else math.nan,
            compute_seconds=header.compute_seconds, encode_seconds=header.encode_seconds,
        )  # fmt: skip
        self._updater.check_sizes(announcement)
        declared = self.members.check(header.fence).samples
        if header.samples != declared:
            raise PayloadError(f"{header.samples} samples; this worker declared {declared} at Join", Reason.WEIGHT)
        if len(header.digest) != 16:
            raise PayloadError(f"a digest of {len(header.digest)} bytes, not 16")
        return self._staging.admit(announcement)

    async def deliver(self, contribution: Contribution) -> bool:
        """A contribution has arrived: check it, write it down, and count it in; False if it had been counted before.

        Raises `PayloadError` when the content is not what its header says, or cannot be decoded, `RefusedError` when
        the round has ended, another content has taken its place meanwhile, or there is no room for it on the disk.
        """
        self._check_open(contribution)  # from here on nothing of what its check looks at may be changing
        try:
            await self._checked(contribution)
        except DitherpsError:
            self._staging.check(contribution)
            self._staging.drop(contribution)
            raise
        announcement = contribution.announcement
        self._check_open(contribution)
        await self._write_down(contribution)
        self._check_open(contribution)
        if not self._staging.commit(contribution):
            return False
        opened_at = self._state.plan.opened_at if self._state.plan else self._clock()
        self.accounts.arrived(announcement, self._clock() - opened_at)
        self._handle(rounds.Delivered(announcement.index))
        return True

    async def _write_down(self, contribution: Contribution) -> None:
        # Once: what is being written must not change, and memory is used again when its contribution is whole.
        if contribution.whole:
            return
        announcement = contribution.announcement
        if contribution.written is None:
            self.accounts.received(announcement.content_bytes)
            record = Contributed(announcement=announcement, accounts=self.accounts.saved(self._clock()))
            contribution.written = self._redo.append(record, [contribution.content], kept=False)
        written = contribution.written
        try:
            await self._durable(written)
        except RefusedError:
            if contribution.written is written:  # the first of those that waited for it
                contribution.written = None
                self.accounts.received(-announcement.content_bytes)
            raise

    def _check_open(self, contribution: Contribution) -> None:
        """Raises `RefusedError` unless the contribution can still enter."""
        self._staging.check(contribution)
        if self._state.phase is not Phase.OPEN:
            raise RefusedError(Reason.LATE, f"round {contribution.announcement.round} has ended")

    async def _checked(self, contribution: Contribution) -> None:
        # Once: two streams may have brought the end of the same content.
        if contribution.checked is None:
            self._updater.look_up(contribution)
            contribution.checked = asyncio.ensure_future(asyncio.to_thread(self._check_content, contribution))
            contribution.checked.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(contribution.checked)

    def _check_content(self, contribution: Contribution) -> None:
        contribution.receiver.check()
        try:
            self._updater.validate(contribution)
        except ContextMismatchError as error:
            raise RefusedError(Reason.CONTEXT_MISMATCH, str(error)) from None

    def refused_update(self, reason: Reason, index: int, message: str) -> None:
        """Count and log a contribution that is not taken."""
        if (more := self._repeated.due((index, reason))) is not None:
            log.warning("refused update worker=%s reason=%s: %s%s", self.members.names[index], reason, message, more)
        self._metrics.rejected_updates.labels(reason.value).inc()

    def evaluated(self, index: int, evaluation: Evaluation) -> None:
        """A worker's evaluation; ignored unless it is the one that the open plan asks for."""
        plan = self._state.plan
        if plan is not None and plan.evaluator == index and evaluation.version == plan.base_version:
            self._take_evaluation(evaluation)

    def pull(self, index: int, held: int | None, wanted: int, held_digest: bytes) -> Answer:
        """What brings a worker from version `held` of w (None: nothing) to version `wanted`.

        Raises `RefusedError` for another version than the present one.
        """
        answer = self.broadcast.answer(held, wanted, held_digest, moving=self._moving)
        if answer.mismatch:
            self.accounts.mismatched()
            if (more := self._repeated.due(index)) is not None:
                name = self.members.names[index]
                log.warning("worker=%s does not hold version %s: it gets a snapshot%s", name, held, more)
        return answer

    def pulled(self, answer: Answer) -> None:
        """An answer has been sent whole."""
        self.accounts.pulled(answer)

    def status(self) -> pb.StatusResponse:
        """What the server does and waits for."""
        now, traffic, state = self._clock(), self.accounts.traffic, self._state
        waiting = rounds.waiting(self._rules, state, now)
        return pb.StatusResponse(
            task=self.job.task, codec=self.job.uplink, downlink_codec=self.broadcast.codec_name,
            phase=_PHASES[state.phase], round=state.round, rounds=self.job.rounds, version=self.model.version,
            waiting_for=waiting.sentence, waiting_seconds=now - waiting.since,
            members=[
                pb.MemberStatus(
                    index=index, worker=member.name, state=self._state_of(index),
                    last_seen_seconds=now - member.last_seen,
                )
                for index, member in sorted(state.members.items())
            ],
            uplink_bytes=traffic.uplink_bytes, downlink_bytes=traffic.downlink_bytes,
            contributions=self.accounts.totals.contributions, coordinates=self.model.layout.coordinates,
        )  # fmt: skip

    def _state_of(self, index: int) -> str:
        member = self._state.members[index]
        if not member.present:
            return str(member.why_absent)
        if self._state.phase is Phase.OPEN and self._state.plan and index in self._state.plan.roles:
            return "delivered" if index in self._state.delivered else "computing"
        return "here"

    # The run.

    async def run(self) -> Reason:
        """Until the job is over; returns why (`internal` after an error inside the server, which `failure` holds)."""
        if self._state.phase is Phase.OPEN and self._state.plan is not None:
            self._begin_round(self._state.plan)  # a server before this one had opened it
        while not self._finished.done():
            self._handle(rounds.Tick())
            self._watch_gauges()
            await asyncio.wait([self._finished], timeout=TICK_SECONDS)
        # A round that is being closed is applied whole, and recorded, before the model is called final.
        await asyncio.gather(*self._closings)
        await self._end_evaluations()
        await self._redo.drained()
        self.accounts.totals.finished = self._clock()
        self.model_sha256 = await asyncio.to_thread(lambda: self.model.sha256)
        self._tell()
        return self._finished.result()

    async def _end_evaluations(self) -> None:
        """Wait for the last one of a run that is finished; nobody waits for others."""
        if self._finished.result() is not Reason.FINISHED:
            if self._evaluator is not None:
                self._evaluator.end()
            for evaluation in self._evaluations:
                evaluation.cancel()
        await asyncio.gather(*self._evaluations, return_exceptions=True)

    def save(self) -> bool:
        """Write a checkpoint of the last applied round; only while nothing changes the model.

        The run goes on without one where there is no room: the last one stays. Returns whether it was written.
        """
        try:
            self._recorder.sync()  # replay does not make again what the checkpoint holds
            seconds = self.saver.save(self.members.leases, self._entered, self.accounts.saved(self._clock()))
        except OSError as error:
            log.error("checkpoint version=%d not written: %s", self.model.version, error)
            self._metrics.checkpoint_failures.inc()
            return False
        self._metrics.checkpoint_seconds.set(seconds)
        self._metrics.checkpoint_timestamp_seconds.set_to_current_time()
        return True

    async def _checkpoint(self) -> None:
        """Write a checkpoint between two rounds, and forget what the redo log holds of before."""
        if not await asyncio.to_thread(self.save):
            return
        try:
            await self._redo.cut(members(self.members.leases, self._sampled.stated if self._sampled else {}))
        except OSError as error:
            log.error("redo log not cut: %s", error)

    def stop(self, reason: Reason) -> None:
        """End the run now."""
        self._handle(rounds.Stop(reason))

    def suspend(self, grace_seconds: float) -> None:
        """Leave the run to the next server, as soon as the open round is closed, at the latest after the grace."""
        self._handle(rounds.Suspend(self._clock() + grace_seconds))

    async def drained(self) -> None:
        """Returns when every worker that listens has been told the end."""
        await self._watchers.close()

    def unwatch(self, index: int, stream: Watchers.Stream) -> None:
        """A worker's stream has ended."""
        self._watchers.end(index, stream)

    def _watch_gauges(self) -> None:
        state, now = self._state, self._clock()
        waiting = rounds.waiting(self._rules, state, now)
        for awaited in rounds.Awaited:
            self._metrics.waiting_seconds.labels(awaited).set(now - waiting.since if awaited is waiting.awaited else 0)
        self._metrics.staged_bytes.set(self._staging.held_bytes)
        invited = len(state.plan.roles) if state.phase is Phase.OPEN and state.plan else 0
        self._metrics.round_workers.labels("present").set(len(state.present))
        self._metrics.round_workers.labels("invited").set(invited)
        self._metrics.round_workers.labels("delivered").set(len(state.delivered))
        self._metrics.round_workers.labels("absent").set(len(self.members.names) - len(state.present))
        self.accounts.awaiting({index for index in state.members if self._state_of(index) == "computing"})
        self._metrics.history_bytes.set(self.broadcast.history.nbytes)
        self.accounts.export()

    def _handle(self, event: rounds.Event) -> None:
        self._state, actions = rounds.step(self._rules, self._state, event, self._clock())
        for action in actions:
            match action:
                case rounds.OpenRound(plan):
                    self._open(plan)
                case rounds.CloseRound():
                    self._spawn(self._close(action), self._closings)
                case rounds.AbandonRound(plan, reason):
                    self._redo.append(Abandoned(reason=reason, accounts=self.accounts.saved(self._clock())))
                    log.warning("abandoned round=%d attempt=%d reason=%s", plan.round, plan.attempt, reason)
                    self._metrics.rounds.labels("abandoned").inc()
                    self._end_round(plan, reason=reason)
                case rounds.FinishRun(reason):
                    self._finish(reason)
        if self._closed is not None and self._state.phase is Phase.WAITING:
            self._tell()

    def _spawn(self, work: Awaitable[None], among: set[asyncio.Task[None]]) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception as error:
                log.error("the server failed", exc_info=error)
                self.failure = self.failure or f"{type(error).__name__}: {error}"
                self.stop(Reason.INTERNAL)

        task = asyncio.get_running_loop().create_task(guarded())
        among.add(task)
        task.add_done_callback(among.discard)

    def _open(self, plan: Plan) -> None:
        self.accounts.opened(plan)
        if plan.roles:
            # Before all contributions to it: whoever is acknowledged finds the plan again. Nobody waits for it.
            self._redo.append(
                Opened(
                    round=plan.round, attempt=plan.attempt, base_version=plan.base_version, roles=dict(plan.roles),
                    evaluator=plan.evaluator, encoded=dict(self._state.encoded),
                    accounts=self.accounts.saved(self._clock()),
                )
            )  # fmt: skip
        self._begin_round(plan)

    def _begin_round(self, plan: Plan) -> None:
        last = self.last_evaluation
        self._evaluation = last if last and plan.evaluator is not None and last.version == plan.base_version else None
        self._metrics.round.set(plan.round)
        if self._evaluation is not None:  # by an attempt before this one; its evaluator would not report it again
            self._handle(rounds.Evaluated())
        self._tell()
        if self._evaluation is None and plan.evaluator == rounds.SERVER_EVALUATES and self._evaluator is not None:
            self._spawn(self._evaluate(self._evaluator, plan), self._evaluations)

    async def _evaluate(self, evaluator: Evaluator, plan: Plan) -> None:
        async with self._evaluating:
            if self._state.phase is not Phase.OPEN or self._state.plan is not plan:
                return  # the evaluation before this one took longer than its round: the model may be changing
            evaluator.take(self.model)
            evaluation = await asyncio.to_thread(evaluator.run)
        if self._state.plan is plan:
            self._take_evaluation(evaluation)

    def _take_evaluation(self, evaluation: Evaluation) -> None:
        self._evaluation = self.last_evaluation = evaluation
        self._metrics.test_loss.set(evaluation.loss)
        self._metrics.test_accuracy.set(evaluation.accuracy)
        self._handle(rounds.Evaluated())

    async def _close(self, action: rounds.CloseRound) -> None:
        plan = action.plan
        if not plan.roles:
            self._handle(rounds.Applied(self.model.version))
            return
        contributions = self._staging.members(action.members)
        try:
            unfit = await asyncio.to_thread(self._updater.unfit, contributions)
            action = self._without(action, unfit)
            contributions = self._staging.members(action.members)
            evaluation, spent = self._evaluation, self.accounts.spent()
            await self._write_closed(action, evaluation)
            self._moving = True
            report = await asyncio.to_thread(self._updater.apply, contributions)
        except RefusedError as error:
            self._handle(rounds.Unusable(error.reason))
            return
        except _NoRoomError:
            self._handle(rounds.Unwritten())
            return
        except EncodingError as error:
            self.failure = f"the model diverged in round {plan.round}: {error}; a lower optimizer.lr may help"
            self.stop(Reason.NON_FINITE)
            return
        finally:
            self._moving = False
        announcements = report.announcements
        record = self.accounts.applied(action, announcements, report, evaluation, self.model, spent, self._clock())
        self.accounts.show(record, announcements)
        if report.samples is not None:
            self.accounts.show_samples(report.samples)
        self._recorder.add(record)
        entered = Entered(plan.round, plan.attempt, record.version, len(action.members))
        self._entered.update(dict.fromkeys(action.members, entered))
        if self.saver.due(record.version, self._redo.nbytes):
            await self._checkpoint()
        self._end_round(plan, members=action.members)
        self._handle(rounds.Applied(self.model.version))

    async def _write_closed(self, action: rounds.CloseRound, evaluation: Evaluation | None) -> None:
        """The round is closed when this is on disk; raises `_NoRoomError` when there has been no room for too long.

        That is a round's deadline, or until the run is stopped, or has to be suspended.
        """
        now = self._clock()
        record = Closed(
            members=action.members, absent=dict(action.absent), evaluation=evaluation,
            round_seconds=now - action.plan.opened_at, accounts=self.accounts.saved(now),
        )  # fmt: skip
        written = self._redo.append(record)
        while not written.done():
            await asyncio.wait([written], timeout=TICK_SECONDS)
            latest = now + self.job.round_deadline_seconds
            if self._state.suspend_at is not None:
                latest = min(latest, self._state.suspend_at)
            if self._finished.done():
                latest = min(latest, self._state.since + LAST_WRITE_SECONDS)
            if not written.done() and self._clock() >= latest:
                raise _NoRoomError
        await written

    def _without(self, action: rounds.CloseRound, unfit: Mapping[int, PayloadError]) -> rounds.CloseRound:
        """The same without contributions that are refused at the close; raises `RefusedError` if the quorum is lost."""
        for index, error in unfit.items():
            self.refused_update(error.reason, index, str(error))
            action = rounds.excluding(action, [index], error.reason)
        if unfit and not rounds.has_quorum(self._rules, action.plan, frozenset(action.members)):
            reason = next(iter(unfit.values())).reason
            raise RefusedError(reason, "without the contributions that are refused there is no quorum")
        return action

    def _end_round(self, plan: Plan, *, members: tuple[int, ...] = (), reason: Reason | None = None) -> None:
        self._staging.clear()
        result = types_pb2.RoundResult(
            round=plan.round, attempt=plan.attempt, version=self.model.version, members=len(members),
            abandoned=reason.value if reason else "",
        )  # fmt: skip
        self._closed = (result, frozenset(members))

    def _finish(self, reason: Reason) -> None:
        if not self._finished.done():
            self._finished.set_result(reason)

    # What the workers are told.

    def _tell(self) -> None:
        """Tell the workers what concerns them: the end of a round that they were invited to, their plan, the end."""
        closed, self._closed = self._closed, None
        state, before = self._state, self._concerned
        running = state.phase not in (Phase.FINISHED, Phase.SUSPENDED)
        self._concerned = frozenset(state.plan.roles) if state.phase is Phase.OPEN and state.plan else frozenset()
        for index in self._watchers.streams:
            response = self._response(index, closed if index in before else None)
            if index in before or response.HasField("opened") or not running:
                self._watchers.tell(index, response)

    def _response(self, index: int, closed: tuple[types_pb2.RoundResult, frozenset[int]] | None) -> pb.WatchResponse:
        state = self._state
        response = pb.WatchResponse(phase=_PHASES[state.phase], version=self.model.version)
        if closed is not None:
            response.closed.CopyFrom(closed[0])
            response.closed.included = index in closed[1]
        plan = state.plan
        if state.phase is Phase.OPEN and plan is not None and (index in plan.roles or plan.evaluator == index):
            role = plan.roles.get(index)
            response.opened.CopyFrom(
                types_pb2.RoundPlan(
                    round=plan.round, attempt=plan.attempt, base_version=plan.base_version,
                    role=_ROLES[role] if role else types_pb2.ROLE_UNSPECIFIED,
                    evaluate=plan.evaluator == index and not state.evaluated,
                    deadline_seconds=max(0.0, plan.deadline_at - self._clock()),
                    need=self._sampled.need(index, plan.round) if self._sampled and role else b"",
                )
            )  # fmt: skip
        if self.model_sha256 and state.phase is Phase.FINISHED:
            reason = self._finished.result()
            response.finished.CopyFrom(
                types_pb2.JobResult(reason=reason.value, version=self.model.version, model_sha256=self.model_sha256)
            )
        return response


class _NoRoomError(Exception):
    """The redo log cannot be written, so the round cannot be closed."""


def _result(entered: Entered) -> types_pb2.RoundResult:
    return types_pb2.RoundResult(
        round=entered.round, attempt=entered.attempt, version=entered.version, members=entered.members
    )
