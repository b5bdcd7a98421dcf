"""A worker that sends what no worker would: valid messages of every RPC, mutated by a seeded generator.

The attacker is a member of the job, with a certificate and a session of its own, and knows all formats. Each of its
pushes has NaN in its buffers, so that none can be good by chance: whatever else is wrong with one is found first, and
if nothing else is, that is.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import struct
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import torch
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2

import ditherps
from ditherps import wire
from ditherps.codecs import codec_names
from ditherps.codecs.base import HEADER
from ditherps.config import JobConfig
from ditherps.dither import Address, Domain
from ditherps.errors import PayloadError, Reason
from ditherps.security.credentials import Files, channel_credentials
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps.v1 import types_pb2
from tests.sealing import sealed

CALL_SECONDS = 30.0
"""A call that takes longer hangs."""
AT_ONCE = 12
AWAY = 40
"""Messages that the attacker sends while it is not in the job."""

_OWN_ERROR = "Internal error from Core"
"""What grpc.aio says of a call that it could not write to."""
_INTEGERS = {
    FieldDescriptor.CPPTYPE_UINT32: 32, FieldDescriptor.CPPTYPE_UINT64: 64, FieldDescriptor.CPPTYPE_ENUM: 31,
}  # fmt: skip
_FLOATS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e300, -1e300, 5e-324)
_TEXTS = (
    "", "\n", "\x1b[2J", "a\r\nINFO joined worker=worker-0", "../../etc/passwd", "worker-0", "eve", "\U0001f4a5",
    "x" * 300_000, "%s%n", "[/b]", "finished", "{}",
)  # fmt: skip
_EXTREME = (0.0, math.nan, math.inf, -math.inf, -1.0, 3e38, -3e38, 1e-45)


def mutated_bytes(random_: random.Random, data: bytes) -> bytes:
    """Flipped, cut, doubled, filled with noise, or with a piece of itself elsewhere."""
    out = bytearray(data)
    match random_.randrange(6):
        case 0 if out:
            for _ in range(random_.randint(1, 8)):
                out[random_.randrange(len(out))] ^= 1 << random_.randrange(8)
        case 1:
            del out[random_.randrange(len(out) + 1) :]
        case 2:
            at = random_.randrange(len(out) + 1)
            out[at:at] = random_.randbytes(random_.randint(1, 20))
        case 3:
            out += bytes(out)
        case 4 if out:
            begin, at = random_.randrange(len(out)), random_.randrange(len(out))
            piece = out[begin : begin + random_.randint(1, 30)]
            out[at : at + len(piece)] = piece
        case _:
            at = random_.randrange(len(out) + 1)
            out[at : at + random_.randint(1, 12)] = random_.choice((b"\xff" * 12, bytes(12), random_.randbytes(12)))
    return bytes(out)


def wrongly_typed(random_: random.Random, data: bytes) -> bytes:
    """With one more field: of a number that there is or is not, and any wire type, also those that there are not."""
    number, kind = random_.choice((1, 2, 3, 4, 5, 9, 15, 4000, (1 << 29) - 1)), random_.randrange(8)
    noise = random_.randbytes(9)
    bodies: tuple[bytes, ...] = (b"", b"\xff" * 10, b"\x05hello", b"\xff\xff\xff\xff\x0f", noise, b"\x80" * 11)
    return data + varint(number << 3 | kind) + random_.choice(bodies)


def varint(value: int) -> bytes:
    """As protobuf writes it."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def leaves(message: Message, *, deep: bool = True) -> Iterator[tuple[Message, Any]]:
    """Every field of a message and of those in it, set or not."""
    for descriptor in message.DESCRIPTOR.fields:
        yield message, descriptor
        if deep and descriptor.message_type is not None and not descriptor.is_repeated:
            yield from leaves(getattr(message, descriptor.name))


def mutate_field(random_: random.Random, message: Message) -> None:
    """Set one field to what it should never be."""
    owner, descriptor = random_.choice(list(leaves(message)))
    name = descriptor.name
    if random_.random() < 0.1:
        owner.ClearField(name)
    elif descriptor.is_repeated:
        values = getattr(owner, name)
        if descriptor.message_type is not None or random_.random() < 0.2:
            owner.ClearField(name)
        else:
            values.extend([random_.choice(_TEXTS[:10])] * random_.choice((1, 1000)))
    elif descriptor.message_type is not None:
        getattr(owner, name).SetInParent()
    elif descriptor.cpp_type in _INTEGERS:
        top = (1 << _INTEGERS[descriptor.cpp_type]) - 1
        chosen = (0, 1, 2, 3, 7, 255, top, top - 1, top // 2, random_.randint(0, top), random_.randrange(200))
        setattr(owner, name, random_.choice(chosen) & top)
    elif descriptor.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        setattr(owner, name, random_.choice(_FLOATS))
    elif descriptor.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        setattr(owner, name, not getattr(owner, name))
    elif descriptor.type == FieldDescriptor.TYPE_BYTES:
        setattr(owner, name, random_.choice((b"", b"x", bytes(16), random_.randbytes(17), bytes(70_000))))
    else:
        setattr(owner, name, random_.choice(_TEXTS))


@dataclass(slots=True)
class Outcomes:
    """How the server answered: by method, status and reason; and what should not be."""

    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    messages: int = 0
    unseen: int = 0
    """Answers that gRPC lost at this end, since they came while it wrote."""
    left: int = 0
    """Streams that the attacker broke off before it was answered."""

    def add(self, method: str, status: grpc.StatusCode, reason: str, details: str) -> None:
        """Count an answer, and note it where it is none that a server may give."""
        if details == _OWN_ERROR:
            self.unseen += 1
            return
        self.counts[method, status.name, reason] += 1
        if problem := misbehaviour(method, status, reason, details):
            self.wrong.append(f"{method}: {status.name} {reason!r} {details[:200]!r}: {problem}")

    def by_status(self) -> Counter[tuple[str, str]]:
        """Without the methods."""
        found: Counter[tuple[str, str]] = Counter()
        for (_, status, reason), count in self.counts.items():
            found[status, reason] += count
        return found


def misbehaviour(method: str, status: grpc.StatusCode, reason: str, details: str) -> str:
    """What is wrong with an answer; empty: nothing.

    Allowed: OK; a reason of the closed list but `internal`, with its own status; and what gRPC says by itself:
    UNIMPLEMENTED to an RPC that there is not, RESOURCE_EXHAUSTED to a message that is too large, NOT_FOUND of a service
    whose health is not known, CANCELLED to who went away.
    """
    if reason:
        known = wire.reason_of(reason)
        if known is Reason.INTERNAL:
            return "no reason that may be"
        if status is not wire.status_of(known) and not (method == "Push" and status is grpc.StatusCode.OK):
            return "the reason has another status"
        return "" if details.isprintable() and len(details) <= 510 else "not one line"
    if status is grpc.StatusCode.OK:
        return ""
    if status is grpc.StatusCode.UNIMPLEMENTED and method.startswith("unknown"):
        return ""
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return ""
    if status is grpc.StatusCode.NOT_FOUND and method == "Check":
        return ""
    return "no reason"


class Attack:
    """Sends mutated messages, about `AT_ONCE` at a time, as the member `name` of a job."""

    def __init__(self, address: str, folder: Path, name: str, job: JobConfig, seed: int) -> None:
        task, codec = job.task, ditherps.codec(job.codec, **job.codec_options)
        self._last_round = job.rounds - 20
        self._random = random.Random(seed)
        self._name, self._task, self._codec = name, task, codec
        self._channel = grpc.aio.secure_channel(
            address, channel_credentials(Files(folder)),
            options=[*wire.CHANNEL_OPTIONS, ("grpc.max_send_message_length", 64 << 20)],
        )  # fmt: skip
        self._calls = {method.name: self._call(method) for method in wire.SERVICE.methods}
        unary, none = self._channel.unary_unary, _as_it_is
        self._check: Any = unary("/grpc.health.v1.Health/Check", request_serializer=none)
        self._unknown: list[Any] = [
            unary(path, request_serializer=none)
            for path in (f"/{wire.SERVICE.full_name}/Train", "/x/y", "/grpc.health.v1.Health/Watch", "/" + "a" * 3000)
        ]
        self.joined = pb.JoinResponse()
        self.plan: types_pb2.RoundPlan | None = None
        self.here = False
        self._watching: asyncio.Task[None] | None = None
        self._invited = asyncio.Event()
        self._pushing = asyncio.Lock()
        self.outcomes = Outcomes()

    def _call(self, method: Any) -> Any:
        kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
        return getattr(self._channel, kind)(f"/{wire.SERVICE.full_name}/{method.name}", request_serializer=_as_it_is)

    async def close(self) -> None:
        """End the connection."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._channel.close()

    def join_request(self) -> pb.JoinRequest:
        """A valid one."""
        return pb.JoinRequest(
            protocol_version=wire.PROTOCOL_VERSION, package_version="x", worker=self._name, lease_key=b"key",
            task=self._task,
            limits=pb.WorkerLimits(modes=("gradient", "local"), codecs=codec_names(), model_bytes=1 << 30),
        )  # fmt: skip

    async def join(self) -> None:
        """Come in, and follow the job."""
        data = await self._calls["Join"](self.join_request().SerializeToString(), timeout=CALL_SECONDS)
        self._came(data)

    def _came(self, data: bytes) -> None:
        self.joined, self.here, self.plan = pb.JoinResponse.FromString(data), True, None
        if self._watching is not None:
            self._watching.cancel()
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        request = pb.WatchRequest(fence=self.joined.fence).SerializeToString()
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for data in self._calls["Watch"](request):
                state = pb.WatchResponse.FromString(data)
                self.plan = state.opened if state.HasField("opened") and state.opened.role else None
                if self.plan:
                    self._invited.set()

    async def invited(self) -> None:
        """Returns when a round has opened that this member is invited to."""
        async with asyncio.timeout(200):
            while not self._invited.is_set():
                alive = pb.HeartbeatRequest(fence=self.joined.fence).SerializeToString()
                await self._calls["Heartbeat"](alive, timeout=CALL_SECONDS)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._invited.wait(), 1.0)

    @property
    def _holds(self) -> bool:
        """Whether the job would end if this member went."""
        return self.plan is not None and self.plan.round > self._last_round

    async def leave(self) -> None:
        """Go, so that rounds go on."""
        request = pb.LeaveRequest(fence=self.joined.fence, reason="left")
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self._calls["Leave"](request.SerializeToString(), timeout=CALL_SECONDS)
        self.here, self.plan = False, None

    async def run(self, count: int, on_progress: Callable[[int], None], episode: int = 400) -> Outcomes:
        """Send `count` mutated messages.

        For `episode` of them the attacker stays in the job, and holds up the round that it was invited to; then it goes
        for a while, still sending, so that others train meanwhile.
        """
        pending: set[asyncio.Task[None]] = set()
        away_until, here_until = 0, episode
        await self.invited()
        while self.outcomes.messages < count:
            sent = self.outcomes.messages
            if self.here and sent >= here_until and not self._holds:
                await self.leave()
            if not self.here:
                away_until = away_until or sent + AWAY
                if sent >= away_until:
                    away_until, here_until = 0, sent + episode
                    await self.join()
            on_progress(sent)
            pending.add(asyncio.create_task(self._next()))
            while len(pending) >= AT_ONCE:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        await asyncio.gather(*pending)
        on_progress(self.outcomes.messages)
        return self.outcomes

    # What is sent.

    def _next(self) -> Coroutine[Any, Any, None]:
        random_ = self._random
        method = random_.choices(
            ["Push", "Join", "Watch", "Pull", "Report", "Heartbeat", "Status", "Check", "unknown", "Leave"],
            [30, 5, 8, 12, 8, 8, 4, 4, 3, 0.0 if self._holds else 0.4],
        )[0]
        if method == "Push":
            return self._send_push(random.Random(random_.getrandbits(64)))
        self.outcomes.messages += 1
        return self._send(method, self._mutated(self._random, self._valid(method)))

    def _valid(self, method: str) -> Message:
        fence = self.joined.fence
        match method:
            case "Join":
                return self.join_request()
            case "Watch":
                return pb.WatchRequest(fence=fence)
            case "Pull":
                version = self.plan.base_version if self.plan else 0
                held = self._random.choice((None, version, max(0, version - 1)))
                return pb.PullRequest(fence=fence, from_version=held, to_version=version, held_digest=bytes(16))
            case "Report":
                evaluation = pb.Evaluation(version=self.plan.base_version if self.plan else 0, loss=1.0, samples=50)
                return pb.ReportRequest(fence=fence, evaluation=evaluation)
            case "Heartbeat":
                return pb.HeartbeatRequest(fence=fence)
            case "Leave":
                return pb.LeaveRequest(fence=fence, reason="left")
            case "Check":
                return health_pb2.HealthCheckRequest(service=wire.SERVICE.full_name)
            case _:
                return pb.StatusRequest()

    def _mutated(self, random_: random.Random, message: Message, *, whole: float = 0.0) -> bytes:
        """One message as bytes; `whole`: the share that stays as it is."""
        if random_.random() < whole:
            return message.SerializeToString()
        kind = random_.randrange(20)
        if kind < 9 and message.DESCRIPTOR.fields:
            for _ in range(random_.choice((1, 1, 1, 2, 4))):
                mutate_field(random_, message)
            with contextlib.suppress(DecodeError, ValueError):
                return message.SerializeToString()
        data = message.SerializeToString()
        if kind < 16:
            return mutated_bytes(random_, data)
        if kind < 18:
            return wrongly_typed(random_, data)
        if kind == 18:
            return self._valid(random_.choice(("Join", "Watch", "Pull", "Report", "Status"))).SerializeToString()
        # Far beyond what a message may be, or full of what takes more memory than its bytes: rarely.
        return data + (bytes(3 << 20) if random_.random() < 0.02 else b"\x32\x02\x0a\x00" * random_.choice((1, 2000)))

    def _push(self, random_: random.Random) -> list[bytes]:
        plan = self.plan or types_pb2.RoundPlan(role=types_pb2.ROLE_SOURCE)
        update, buffers = self._content(random_, plan)
        header = pb.PushHeader(
            fence=self.joined.fence, round=plan.round, attempt=plan.attempt, base_version=plan.base_version,
            role=plan.role, update_bytes=len(update), buffer_bytes=len(buffers),
            digest=wire.digest_of(update, buffers), samples=8, loss=random_.choice((1.0, *_FLOATS)),
            nmse=random_.choice((0.1, *_FLOATS)), compute_seconds=random_.choice(_FLOATS),
        )  # fmt: skip
        size = random_.choice((1 << 20, 100, 37, 1000))
        chunks = list(wire.chunk_messages(pb.PushRequest, [update, buffers], size))
        first = pb.PushRequest(header=header)
        messages = [self._mutated(random_, first, whole=0.7), *chunks]
        match random_.randrange(16):
            case 0:
                messages[1:] = [mutated_bytes(random_, chunk) for chunk in chunks]
            case 1:
                random_.shuffle(messages)
            case 2:
                messages.insert(1, messages[0])
            case 3:
                copy = self._mutated(random_, pb.PushRequest(header=header))
                messages.insert(random_.randrange(len(messages) + 1), copy)
            case 4:
                messages.append(random_.choice(chunks))
            case 5:
                del messages[random_.randrange(1, len(messages))]
            case 6:
                messages[1:1] = [b"\x12\x00"] * 5
            case 7:
                messages = messages[:1]
            case 8:
                messages.insert(1, b"")
            case 9:
                messages = messages[1:]
            case 10:
                messages = []
            case _:
                pass
        return messages

    def _content(self, random_: random.Random, plan: types_pb2.RoundPlan) -> tuple[bytes, bytes]:
        """An update with something wrong in it, or nothing, and its buffers, which are not finite."""
        size = max(1, self.joined.parameter_coordinates)
        vector = torch.randn(size, generator=torch.Generator().manual_seed(random_.randrange(1 << 30)))
        address = Address(1, plan.round % (1 << 32), self.joined.index, Domain.UPDATE, plan.attempt % (1 << 24))
        update = self._codec.encode(vector * 10.0 ** random_.uniform(-20, 20), address).to_bytes()
        match random_.randrange(8):
            case 0:
                update = mutated_bytes(random_, update)
            case 1 | 2:
                update = self._sealed(mutated_bytes(random_, update))
            case 3:  # the header's fields
                at, length = random_.choice(((0, 1), (1, 1), (2, 2), (4, 4), (8, 4), (12, 8), (20, 8)))
                value = random_.choice((0, 1, 1 << 31, (1 << 64) - 1, random_.getrandbits(64)))
                patch = (value & (1 << 8 * length) - 1).to_bytes(length, "little")
                update = self._sealed(update[:at] + patch + update[at + length :])
            case 4:  # a float, where one may be
                at = HEADER.size + 4 * random_.randrange(max(1, (len(update) - HEADER.size) // 4))
                update = self._sealed(update[:at] + struct.pack("<f", random_.choice(_EXTREME)) + update[at + 4 :])
            case 5:  # the body at random
                update = self._sealed(update[: HEADER.size] + random_.randbytes(len(update) - HEADER.size))
            case 6:
                other = random_.choice(("none", "bf16", "signsgd", "topk", "natural", "eden"))
                update = ditherps.codec(other).encode(vector, address).to_bytes()
            case _:
                pass
        buffers = bytearray(self.joined.buffer_bytes)
        buffers[:4] = struct.pack("<f", random_.choice((math.nan, math.inf, -math.inf)))
        return update or b"x", bytes(buffers)

    def _sealed(self, payload: bytes) -> bytes:
        with contextlib.suppress(PayloadError, ValueError, struct.error, IndexError):
            return sealed(self._codec, payload)
        return payload

    # How it is answered.

    async def _send_push(self, random_: random.Random) -> None:
        # Most go one after another: a newer push ends the one before.
        async with self._pushing if random_.random() < 0.9 else contextlib.nullcontext():
            messages = self._push(random_)
            self.outcomes.messages += max(1, len(messages))
            try:
                await self._sent_push(random_, messages)
            except grpc.aio.AioRpcError as error:
                self._refused("Push", error)

    async def _send(self, method: str, message: bytes) -> None:
        try:
            if method in ("Watch", "Pull"):
                await self._sent_stream(method, message)
            elif method == "unknown":
                await self._random.choice(self._unknown)(message[:4096], timeout=CALL_SECONDS)
                self.outcomes.add("unknown", grpc.StatusCode.OK, "", "")
            else:
                call = self._check if method == "Check" else self._calls[method]
                data = await call(message, timeout=CALL_SECONDS)
                self.outcomes.add(method, grpc.StatusCode.OK, "", "")
                if method == "Join":
                    self._came(data)
                elif method == "Leave":
                    self.here, self.plan = False, None
        except grpc.aio.AioRpcError as error:
            self._refused(method, error)

    def _refused(self, method: str, error: grpc.aio.AioRpcError) -> None:
        refusal = wire.refusal_of(error)
        self.outcomes.add(method, error.code(), refusal.reason if refusal else "", error.details() or "")

    async def _sent_stream(self, method: str, message: bytes) -> None:
        """Read some of a stream's answers, and go."""
        call = self._calls[method](message, timeout=CALL_SECONDS)
        try:
            left = 1 if method == "Watch" else 1000
            async for _ in call:
                left -= 1
                if not left:
                    break
            self.outcomes.add(method, grpc.StatusCode.OK, "", "")
        finally:
            call.cancel()

    async def _sent_push(self, random_: random.Random, messages: Sequence[bytes]) -> None:
        """Send the first, and the rest after an answer, or all at once; some are broken off without a word."""
        call = self._calls["Push"](timeout=CALL_SECONDS)
        # Read meanwhile: the server may answer before the end, and then writing fails.
        first = asyncio.Event()
        answering = asyncio.ensure_future(self._last_answer(call, first))
        at_once = random_.random() < 0.1
        try:
            with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                for number, message in enumerate(messages):
                    if number == 1 and not at_once:
                        await first.wait()
                    if answering.done():
                        break
                    await call.write(message)
                if random_.random() < 0.1:
                    self.outcomes.left += 1
                    return
                await call.done_writing()
            answer = await answering
            if answer is None or not answer.HasField("refused"):
                self.outcomes.wrong.append(f"a push was answered with {answer}")
            else:
                self.outcomes.add("Push", grpc.StatusCode.OK, answer.refused.reason, answer.refused.message)
        finally:
            answering.cancel()
            call.cancel()

    async def _last_answer(self, call: Any, first: asyncio.Event) -> pb.PushResponse | None:
        last = None
        try:
            async for data in call:
                last = pb.PushResponse.FromString(data)
                first.set()
            return last
        finally:
            first.set()


def _as_it_is(data: bytes) -> bytes:
    return data
