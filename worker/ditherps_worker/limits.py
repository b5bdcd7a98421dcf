"""What a worker takes from a server: the limits that it stated at Join, and bounds on all that it will act on."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

from ditherps import wire
from ditherps.codecs import Codec, Role, codec_names
from ditherps.config import JobConfig, WorkerConfig, validated
from ditherps.downlink import downlink_codec
from ditherps.errors import PayloadError, Reason, RefusedError, UserError
from ditherps.network import is_loopback
from ditherps.samples.mode import update_codec
from ditherps.text import one_line
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps.v1 import types_pb2

ROLES = {types_pb2.ROLE_SOURCE: Role.SOURCE, types_pb2.ROLE_NESTED: Role.NESTED}
MODES = ("gradient", "local")
DATA_ASKED_FOR = (
    "the job's mode is data: its server would see this worker's samples and labels, quantized; say --allow-data here "
    "to let it"
)
PLAN_BYTES = 4 << 20
"""Of a job with 100,000 named members."""
LARGEST_ATTEMPT = (1 << 24) - 1
"""That a dither's address holds."""
LEAST_SECONDS, MOST_SECONDS = 0.01, 7 * 86_400.0


def stated(config: WorkerConfig) -> pb.WorkerLimits:
    """What a worker says at Join that it takes."""
    return pb.WorkerLimits(
        modes=(*MODES, "data") if config.allow_data else MODES, codecs=codec_names(), plan_bytes=PLAN_BYTES,
        model_bytes=config.max_model_bytes, data_level=config.max_data_level,
    )  # fmt: skip


def accepted(joined: pb.JoinResponse, limits: pb.WorkerLimits) -> JobConfig:
    """The job that a server offers.

    Raises:
        RefusedError: it is beyond the limits that were stated (`limits`).
        PayloadError: it is no job, or the answer holds what no server would say.
    """
    if len(joined.job) > limits.plan_bytes:
        raise RefusedError(Reason.LIMITS, f"a job of {len(joined.job)} bytes; this worker takes {limits.plan_bytes}")
    job = _job(joined.job)
    if job.mode == "data" and "data" not in limits.modes:
        raise RefusedError(Reason.DATA_NOT_ALLOWED, DATA_ASKED_FOR)
    if job.mode == "data" and job.data.level > limits.data_level:
        message = f"samples at level {job.data.level} are asked for; this worker allows {limits.data_level}"
        raise RefusedError(Reason.DATA_NOT_ALLOWED, message)
    if job.mode not in limits.modes:
        raise RefusedError(Reason.LIMITS, f"the job's mode is {job.mode!r}, which this worker does not take")
    up = job.data.refine.partition(":")[0] if job.mode == "data" else job.codec
    for codec in (up, job.downlink.codec.partition(":")[0]):
        if codec and codec not in limits.codecs:
            raise RefusedError(Reason.LIMITS, f"the job's codec is {codec[:80]!r}, which this worker does not know")
    model_bytes = 4 * joined.parameter_coordinates + joined.buffer_bytes
    if 4 * joined.parameter_coordinates > limits.model_bytes or joined.buffer_bytes > limits.model_bytes:
        raise RefusedError(
            Reason.LIMITS, f"the job's model takes {model_bytes} bytes; this worker allows {limits.model_bytes}"
        )
    if joined.index >= job.workers:
        raise PayloadError(f"worker {joined.index} of a job of {job.workers}")
    if not 1 <= joined.chunk_bytes <= wire.CHUNK_BYTES:
        raise PayloadError(f"chunks of {joined.chunk_bytes} bytes, not of 1 to {wire.CHUNK_BYTES}")
    for name in ("heartbeat_seconds", "idle_timeout_seconds"):
        value = getattr(joined, name)
        if not LEAST_SECONDS <= value <= MOST_SECONDS:  # NaN is not either
            raise PayloadError(f"{name} = {value:g} is not from {LEAST_SECONDS:g} to {MOST_SECONDS:g}")
    return job


def check_samples_may_leave(config: WorkerConfig, sent_with: int | None, seed: int) -> None:
    """Raises `RefusedError` where samples may not leave, whatever else is allowed.

    In plaintext to another machine; and with another seed than they have been sent with: the dithers of many jobs would
    tell more of them than any level does.
    """
    if sent_with not in (None, seed):
        raise RefusedError(
            Reason.DATA_NOT_ALLOWED,
            f"the server has begun a job with another seed, {seed}, in which it would see the same samples again: "
            "start this worker anew to let it",
        )
    if config.certs is None and not is_loopback(config.server.rpartition(":")[0].strip("[]")):
        raise RefusedError(
            Reason.DATA_NOT_ALLOWED,
            f"the job asks for samples, which would travel to {config.server} in plaintext: say --certs",
        )


def _job(data: bytes) -> JobConfig:
    try:
        values = json.loads(data)
        if not isinstance(values, Mapping):
            raise ValueError("it is not an object")
        return validated(JobConfig, values)
    except (ValueError, RecursionError, UserError) as error:
        raise PayloadError(f"the server's job cannot be read: {one_line(str(error))}") from None


def codecs_of(job: JobConfig) -> tuple[Codec, Codec | None]:
    """The job's codec, and that of the model's steps; raises `PayloadError` where its options make none."""
    try:
        codec = update_codec(job)
        return codec, downlink_codec(job.downlink, codec)
    except (TypeError, ValueError, RecursionError, UserError) as error:
        raise PayloadError(f"the server's job has a codec that cannot be: {one_line(str(error))}") from None


def check_plan(plan: types_pb2.RoundPlan, job: JobConfig, roles: Collection[Role]) -> None:
    """Raises `PayloadError` for a plan that no server would make of this job, whose codec has `roles`."""
    # One past the last round there is one more, which only evaluates.
    if plan.round > job.rounds or plan.base_version > job.rounds or plan.attempt > LARGEST_ATTEMPT:
        raise PayloadError(
            f"a plan of round {plan.round}, attempt {plan.attempt}, version {plan.base_version}; the job has "
            f"{job.rounds} rounds"
        )
    if plan.role != types_pb2.ROLE_UNSPECIFIED and ROLES.get(plan.role) not in roles:
        raise PayloadError(f"a plan with role {plan.role}, which {job.uplink} does not have", Reason.WRONG_ROLE)
    if plan.context.version or plan.context.digest:
        raise PayloadError("a plan with a codec context, which this job does not have", Reason.CONTEXT_MISMATCH)
    if plan.codec:
        raise PayloadError("a plan with a codec of its own, which this job does not have")
