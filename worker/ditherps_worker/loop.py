"""A worker's round after round: watch, pull, compute, encode, push."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Callable

import torch

from ditherps import kernels, wire
from ditherps.config import JobConfig, WorkerConfig
from ditherps.dither import Address, Domain
from ditherps.errors import HandshakeError, PayloadError, Reason, RefusedError, RunFailedError, UnreachableError
from ditherps.feedback import ErrorFeedback
from ditherps.metrics import DOWN, UP, WorkerMetrics
from ditherps.text import one_line
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps.v1 import types_pb2
from ditherps_worker.client import Client, PushStats
from ditherps_worker.compute import Computer
from ditherps_worker.held import HeldModel
from ditherps_worker.kept import Encoded, KeptState
from ditherps_worker.limits import ROLES, accepted, check_plan, check_samples_may_leave, codecs_of, stated
from ditherps_worker.sampled import SampleSender

log = logging.getLogger(__name__)

_FIRST_BACKOFF_SECONDS, _LAST_BACKOFF_SECONDS = 0.2, 5.0
_JOIN_AGAIN = (Reason.WRONG_JOB, Reason.WRONG_EPOCH, Reason.NOT_JOINED)
_CUT_OFF = (Reason.IDLE_TIMEOUT, Reason.DIGEST_MISMATCH)
"""What was sent stood still on its way, or was changed on it: as good as a lost connection."""
_NO_ROOM = (
    Reason.MEMBERS_FULL, Reason.STAGING_FULL, Reason.DISK_FULL, Reason.JOIN_RATE, Reason.TOO_MANY_STREAMS,
)  # fmt: skip
"""The server has no room now, and may have it soon."""
_NO_ROOM_FOR_CONTENT = (Reason.STAGING_FULL, Reason.DISK_FULL)
_LARGEST_RESULTS = 64
"""Ends of rounds that are kept for who has not looked yet."""

Identity = tuple[int, int, int, int, bytes]
"""Of what a plan asks for, as `Encoded.plan`."""
MakeComputer = Callable[[JobConfig, int], Computer]


class _Backoff:
    """Pauses that grow, and are jittered."""

    def __init__(self) -> None:
        self._seconds = _FIRST_BACKOFF_SECONDS

    async def pause(self) -> None:
        """The next one."""
        await asyncio.sleep(self._seconds * random.uniform(0.5, 1.5))
        self._seconds = min(2 * self._seconds, _LAST_BACKOFF_SECONDS)


class State:
    """What the server last said: the newest state, and a wait for the next.

    A newer state replaces an older one that nobody has looked at, but for how rounds ended: `results`, oldest first.
    """

    def __init__(self, results: list[types_pb2.RoundResult]) -> None:
        self.latest = pb.WatchResponse()
        self.results = results
        self.lost: Exception | None = None
        self._changed = asyncio.Event()

    def put(self, response: pb.WatchResponse) -> None:
        """The server said something."""
        self.latest = response
        if response.HasField("closed"):
            self.results.append(response.closed)
            del self.results[:-_LARGEST_RESULTS]
        self._changed.set()

    def lose(self, error: Exception) -> None:
        """The stream broke."""
        self.lost = error
        self._changed.set()

    def still_open(self, plan: types_pb2.RoundPlan) -> bool:
        """Whether this attempt of the round is open, as far as this worker knows; raises what broke the stream."""
        if self.lost is not None and not self._is_last_word:
            raise self.lost
        opened = self.latest.opened
        return self.latest.HasField("opened") and (opened.round, opened.attempt) == (plan.round, plan.attempt)

    @property
    def _is_last_word(self) -> bool:
        """The end of the job, or its suspension: that the stream ends after it says nothing."""
        return self.latest.HasField("finished") or self.latest.phase == types_pb2.PHASE_SUSPENDED

    async def changed(self) -> pb.WatchResponse:
        """The newest state, once there is one that has not been seen; raises what broke the stream."""
        await self._changed.wait()
        self._changed.clear()
        if self.lost is not None and not self._is_last_word:
            raise self.lost
        return self.latest


class Loop:
    """One worker's part in one job."""

    def __init__(
        self, config: WorkerConfig, client: Client, make_computer: MakeComputer, metrics: WorkerMetrics
    ) -> None:
        self._config, self._client, self._metrics = config, client, metrics
        self._make_computer = make_computer
        self._kept = KeptState(config.state_dir)
        self._lease_key = self._kept.lease_key()
        self._computer: Computer | None = None
        self._held: HeldModel | None = None
        self._epoch = self._index = 0
        self._evaluated = (0, 0)
        """Epoch of the server and version that was evaluated last."""
        self._sent: Encoded | None = None
        self._feedback: ErrorFeedback | None = None
        self._sampled: SampleSender | None = None
        self._data_seed: int | None = None
        """Of the job that this worker has sent samples to."""
        self._results: list[types_pb2.RoundResult] = []
        self._job_id = ""
        self._progressed = False

    async def run(self) -> types_pb2.JobResult:
        """Until the job is over.

        A lost connection is made anew, with a jittered, growing pause, for at most `connect_timeout_seconds`; so is one
        that brought or took broken content, as long in all without a state that this worker could act on. A server
        without room is asked again as long: who had this worker's place may not have been missed yet.

        Raises `RefusedError`, `UnreachableError`, `PayloadError`, `RunFailedError`.
        """
        limit_seconds, said = self._config.connect_timeout_seconds, ""
        backoff, lost_since, began = _Backoff(), math.inf, time.monotonic()
        while True:
            self._progressed = False
            lost_seconds = max(0.0, time.monotonic() - lost_since)
            try:
                return await self._session(max(_FIRST_BACKOFF_SECONDS, limit_seconds - lost_seconds))
            except (UnreachableError, RefusedError, PayloadError) as error:
                if isinstance(error, RefusedError) and error.reason not in (*_JOIN_AGAIN, *_CUT_OFF, *_NO_ROOM):
                    raise
                if isinstance(error, HandshakeError) and not self._job_id:
                    raise
                now = time.monotonic()
                if self._progressed or lost_since == math.inf:
                    # A first Join has waited for the server already.
                    backoff, lost_since, said = _Backoff(), now if self._job_id else began, ""
                if now - lost_since >= limit_seconds:
                    raise
                if str(error) != said:
                    said = str(error)
                    log.warning("%s; trying again for at most %.0f s", said, limit_seconds - (now - lost_since))
            self._metrics.reconnects.inc()
            await backoff.pause()

    async def _session(self, join_seconds: float) -> types_pb2.JobResult:
        joined = await self._client.join(self._lease_key, join_seconds)
        try:
            job = accepted(joined, stated(self._config))
            if job.mode == "data":
                check_samples_may_leave(self._config, self._data_seed, job.seed)
                self._data_seed = job.seed
        except (RefusedError, PayloadError) as error:
            await self._leave(error.reason)
            raise
        state = State(self._results)
        # Signs of life begin before the data is loaded: that may take longer than silence is borne.
        background = [asyncio.create_task(self._heartbeat(state, joined.heartbeat_seconds))]
        try:
            await self._prepare(job, joined)
            if self._sampled is not None:
                await self._client.has_samples(self._sampled.shard)
            background.append(asyncio.create_task(self._watch(state)))
            while True:
                latest = await state.changed()
                await self._settle()
                if latest.HasField("finished"):
                    return await self._finished(latest.finished)
                if latest.phase == types_pb2.PHASE_SUSPENDED:
                    raise UnreachableError(f"server {self._config.server} has suspended the run and may be back")
                if latest.HasField("opened"):
                    try:
                        await self._take_part(job, joined.index, latest.opened, state)
                    except (UnreachableError, RefusedError):
                        if not state.latest.HasField("finished"):
                            raise
                self._progressed = True
        except (UnreachableError, PayloadError):
            raise  # the connection is made anew
        except asyncio.CancelledError:
            await self._leave(Reason.INTERRUPTED)
            raise
        except (RefusedError, RunFailedError) as error:
            if error.reason not in (*_CUT_OFF, *_NO_ROOM):  # else it stays, and comes back at once
                await self._leave(error.reason)
            raise
        except BaseException:
            await self._leave(Reason.INTERNAL)
            raise
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)

    async def _prepare(self, job: JobConfig, joined: pb.JoinResponse) -> None:
        if (joined.fence.job_id, joined.index) == (self._job_id, self._index):
            if self._held is not None and joined.fence.server_epoch != self._epoch:
                # The server was started again: with durability `none` perhaps from an older version, so that what this
                # worker knows of versions and rounds may be of another course of the job.
                self._held.doubted = True
            self._epoch = joined.fence.server_epoch
            return
        self._sent, self._held, self._feedback, self._sampled = None, None, None, None
        self._results.clear()
        self._codec, down = codecs_of(job)
        await asyncio.to_thread(kernels.warm, self._codec)
        self._computer = await asyncio.to_thread(self._make_computer, job, joined.index)
        layout = self._computer.model.layout
        if layout.digest != joined.layout_digest:
            message = (
                f"this worker's model has {layout.coordinates} parameters and {layout.buffer_bytes} bytes of buffers, "
                f"the server's {joined.parameter_coordinates} and {joined.buffer_bytes}: they build different models"
            )
            raise RefusedError(Reason.LAYOUT_MISMATCH, message)
        if 4 * layout.coordinates > self._config.max_model_bytes:  # whatever the server said of it
            raise RefusedError(Reason.LIMITS, f"the model takes {4 * layout.coordinates} bytes: see max_model_bytes")
        if down is not None:
            await asyncio.to_thread(kernels.warm, down)
            down = down.for_layout(layout)
        self._held = HeldModel(job.downlink, job.seed, down, self._computer.model, joined.initial_digest)
        self._codec = self._codec.for_layout(layout)
        if job.mode == "data":
            refinement = self._codec if job.data.refine else None
            self._sampled = await asyncio.to_thread(SampleSender, job, joined.index, self._computer, refinement)
        if job.error_feedback:
            self._feedback = ErrorFeedback(self._codec, layout.coordinates)
            self._sent = await asyncio.to_thread(self._kept.restore, self._feedback, joined.fence.job_id, joined.index)
        self._job_id, self._index, self._epoch = joined.fence.job_id, joined.index, joined.fence.server_epoch
        self._metrics.joined(job.member_table[joined.index])
        log.info("joined job %s as worker %d of %d", self._job_id, joined.index, job.workers)

    async def _watch(self, state: State) -> None:
        try:
            async for response in self._client.watch():
                state.put(response)
            state.lose(UnreachableError(f"server {self._config.server} ended the watch"))
        except Exception as error:
            state.lose(error)

    async def _heartbeat(self, state: State, interval_seconds: float) -> None:
        try:
            while True:
                await asyncio.sleep(interval_seconds)
                await self._client.heartbeat()
        except Exception as error:
            state.lose(error)

    async def _finished(self, result: types_pb2.JobResult) -> types_pb2.JobResult:
        if result.reason != Reason.FINISHED:
            raise RunFailedError(wire.reason_of(result.reason), f"the server ended the job: {one_line(result.reason)}")
        await self._leave(Reason.FINISHED)
        return result

    async def _leave(self, reason: Reason) -> None:
        """Say goodbye, so that no round waits for this worker; where nobody hears it, nobody waits."""
        with contextlib.suppress(UnreachableError, RefusedError, PayloadError):
            await self._client.leave(reason)

    async def _settle(self) -> None:
        """Tell error feedback what became of its contribution; an abandoned round is opened again, and says nothing."""
        results = self._results[:]
        self._results.clear()
        for result in results:
            pending = self._feedback.pending if self._feedback else None
            if self._feedback and pending and pending.round == result.round and not result.abandoned:
                included = result.included and result.attempt == pending.attempt
                await asyncio.to_thread(self._feedback.commit, included)

    async def _take_part(self, job: JobConfig, index: int, plan: types_pb2.RoundPlan, state: State) -> None:
        assert self._computer is not None
        assert self._held is not None
        check_plan(plan, job, self._codec.roles)
        self._metrics.round.set(plan.round)
        identity = (plan.round, plan.attempt, plan.base_version, plan.role, plan.need)
        encoded = self._sent is not None and self._sent.plan == identity
        computes = self._sampled is None or self._sampled.needs_model
        if (computes and (not encoded or self._held.doubted)) or self._evaluation_due(plan):
            try:
                if await self._hold(self._held, plan.base_version):
                    self._sent, encoded = None, False  # of another w than the server's
            except RefusedError as error:
                if error.reason is not Reason.VERSION_UNAVAILABLE:
                    raise
                return  # the round is over; the next state says how to go on
        if self._evaluation_due(plan):
            await self._evaluate(plan.base_version)
        if plan.role == types_pb2.ROLE_UNSPECIFIED:
            return
        if not encoded:
            try:
                contribute = self._contribution if self._sampled is None else self._samples
                self._sent = await asyncio.to_thread(contribute, job, index, plan, identity)
            except BaseException:
                self._held.forget()  # computing changes the model, and puts it back at its end only
                raise
        assert self._sent is not None
        if not state.still_open(plan):
            return  # too late: the round has gone on without us
        began = time.perf_counter()
        try:
            counted = await self._push(plan, self._sent, state)
        except RefusedError as error:
            if error.reason is not Reason.CONFLICTING_CONTRIBUTION:
                raise
            # What this worker sent before it was started again stands: the same, but for what a GPU or lost feedback
            # makes of it. The error that was in it is lost.
            log.warning("round=%d has another contribution of this worker: %s", plan.round, error)
            if self._feedback is not None:
                self._feedback.commit(included=False)
                self._sent = None
            return
        self._metrics.push_seconds.observe(time.perf_counter() - began)
        size = len(self._sent.update) + len(self._sent.buffers)
        self._metrics.payload_bytes.labels(UP, job.uplink).inc(size)
        self._metrics.values.labels(UP, job.uplink).inc(self._computer.model.layout.coordinates)
        log.debug("pushed round=%d bytes=%d counted=%s", plan.round, size, counted)

    async def _push(self, plan: types_pb2.RoundPlan, sent: Encoded, state: State) -> bool:
        """Send a contribution while its round is open, which is also how long a server without room is asked again.

        Whether it counts.
        """
        backoff, said = _Backoff(), False
        patience_seconds = max(self._config.connect_timeout_seconds, min(plan.deadline_seconds, 7 * 86_400.0))
        last = time.monotonic() + patience_seconds
        while state.still_open(plan):
            try:
                return await self._client.push(plan, sent.update, sent.buffers, sent.stats)
            except RefusedError as error:
                if error.reason not in _NO_ROOM_FOR_CONTENT or time.monotonic() > last:
                    raise
                if not said:
                    log.warning("round=%d: %s; trying again while the round is open", plan.round, error)
                said = True
            await backoff.pause()
        return False

    async def _hold(self, held: HeldModel, version: int) -> bool:
        """Bring version `version` of w into the model; whether this shows that the one held was not the server's."""
        other = False
        if held.version != version or held.doubted:
            began, before, doubted = time.perf_counter(), held.version, held.doubted
            digest = held.digest_due()
            if digest:
                log.debug("holds version=%d digest=%s", before, digest.hex())
            header = await self._client.pull(before, version, digest, held.room)
            pulled = await asyncio.to_thread(held.take, header)
            other = pulled.snapshot and doubted
            if pulled.snapshot and before is not None:
                log.info("got version %d whole: version %d was too far back, or not the server's", version, before)
            self._metrics.pull_seconds.observe(time.perf_counter() - began)
            for codec, size, models in pulled.parts:
                self._metrics.payload_bytes.labels(DOWN, codec).inc(size)
                self._metrics.values.labels(DOWN, codec).inc(models * held.coordinates)
        held.restore_buffers()
        return other

    def _evaluation_due(self, plan: types_pb2.RoundPlan) -> bool:
        """Each server needs to be told once: one that was started again has forgotten."""
        return plan.evaluate and self._evaluated != (self._epoch, plan.base_version)

    async def _evaluate(self, version: int) -> None:
        assert self._computer is not None
        began = time.perf_counter()
        result, samples = await asyncio.to_thread(self._computer.evaluate)
        await self._client.report(
            pb.Evaluation(
                version=version, loss=result.loss, accuracy=result.accuracy, samples=samples,
                seconds=time.perf_counter() - began,
            )
        )  # fmt: skip
        self._evaluated = self._epoch, version

    def _keep(self, feedback: ErrorFeedback, sent: Encoded) -> None:
        try:
            self._kept.save(feedback, sent, self._job_id, self._index)
        except OSError as error:
            log.warning("error feedback is not kept, and would be lost with this process: %s", error)

    def _samples(self, job: JobConfig, index: int, plan: types_pb2.RoundPlan, identity: Identity) -> Encoded:
        assert self._sampled is not None
        update = self._sampled.update(plan.round, plan.attempt, plan.need)
        self._metrics.compute_seconds.observe(update.compute_seconds)
        self._metrics.encode_seconds.observe(update.encode_seconds)
        self._metrics.train_loss.set(update.loss)
        stats = PushStats(
            job.batch_samples, update.loss, update.nmse, update.compute_seconds, update.encode_seconds,
            update.sample_bytes,
        )  # fmt: skip
        return Encoded(identity, update.update, b"", stats)

    def _contribution(self, job: JobConfig, index: int, plan: types_pb2.RoundPlan, identity: Identity) -> Encoded:
        assert self._computer is not None
        update = self._computer.update(plan.round)
        address = Address(seed=job.seed, round=plan.round, sender=index, domain=Domain.UPDATE, attempt=plan.attempt)
        codec, vector = self._codec.for_role(ROLES[plan.role]), update.vector
        name_at = self._computer.model.layout.name_at
        began = time.perf_counter()
        if self._feedback is None:
            encoded = codec.encode(vector, address, name=name_at)
        else:
            if self._feedback.pending not in (None, address):
                # It did not enter: the server says so of a round that has ended, and always tells the last that did.
                self._feedback.commit(included=False)
            encoded, vector = self._feedback.encode(vector, address, name=name_at), self._feedback.corrected
        encode_seconds = time.perf_counter() - began
        energy = float(torch.dot(vector, vector))
        error = codec.expected_squared_error(encoded)
        nmse = error / energy if energy > 0 else math.nan
        self._metrics.update_norm.set(math.sqrt(energy))
        self._metrics.update_nmse.set(nmse)
        self._metrics.update_step.set(math.sqrt(12 * error / vector.numel()))  # a uniform error's variance: step^2 / 12
        self._metrics.compute_seconds.observe(update.seconds)
        self._metrics.encode_seconds.observe(encode_seconds)
        self._metrics.train_loss.set(update.loss)
        stats = PushStats(update.samples, update.loss, nmse, update.seconds, encode_seconds)
        sent = Encoded(identity, encoded.data.data, update.buffers, stats)
        if self._feedback is not None:
            self._keep(self._feedback, sent)
        return sent
