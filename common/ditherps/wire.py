"""The wire: gRPC methods by name, counted message by message; chunks, digests, channel options, status codes.

Wire bytes are the length-prefixed messages of both directions (5 bytes and the protobuf each) plus `RPC_BYTES` for the
HTTP/2 headers of each RPC. They are counted in the serializers, so no message escapes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import xxhash
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from ditherps.errors import PayloadError, Reason, RefusedError
from ditherps.text import one_line
from ditherps.v1 import parameter_server_pb2 as pb

PROTOCOL_VERSION = 3
CHUNK_BYTES = 1 << 18
"""Of a streamed content: a server with many workers holds about one of each, however late it reads them."""
MESSAGE_PREFIX_BYTES = 5
# HTTP/2 request headers, response headers and trailers with their frames, once HPACK's table is warm, and window
# updates: what a counting proxy sees beyond the messages (tests/service/test_wire_bytes.py measures it).
RPC_UPLINK_BYTES = 90
RPC_DOWNLINK_BYTES = 90

SERVICE = pb.DESCRIPTOR.services_by_name["ParameterServerService"]
REASON_KEY = "ditherps-reason"
TOKEN_KEY = "ditherps-token"
TOKEN_PREFIX_BYTES = 3  # gRPC never indexes such a header: HPACK's literal, with both lengths

# A client's ping and the server's permission belong together: a server that allows fewer pings than its clients send
# closes their connections. gRPC ignores option names that it does not know; tests/service proves that these work.
KEEPALIVE_SECONDS = 60
LARGEST_MESSAGE_BYTES = 4 << 20
LARGEST_CONTROL_BYTES = 64 << 10
"""Of what a worker says beside the chunks of its contribution."""
LARGEST_REQUEST_BYTES = CHUNK_BYTES + LARGEST_CONTROL_BYTES
"""What a server takes at once of anybody: a chunk, with room for its fields."""
CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", LARGEST_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", LARGEST_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_reconnect_backoff_ms", 5_000),  # gRPC's own two minutes would outlast a worker's patience
]
STREAMS_PER_CONNECTION = 100
SERVER_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", LARGEST_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", LARGEST_REQUEST_BYTES),
    ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 1000 // 2),
    ("grpc.so_reuseport", 0),
    # A window that grows with the link would let every worker fill megabytes before a busy server reads them: what is
    # taken ahead is a chunk and 64 KiB a stream. A worker's uplink carries about that much a round trip.
    ("grpc.http2.bdp_probe", 0),
]


def window_options(window_bytes: int) -> list[tuple[str, int]]:
    """A server's options for taking so much of a stream ahead; 0: as little as it can."""
    return [("grpc.http2.lookahead_bytes", window_bytes)] if window_bytes else []


_STATUS: dict[grpc.StatusCode, tuple[Reason, ...]] = {
    grpc.StatusCode.UNAUTHENTICATED: (Reason.UNAUTHENTICATED, Reason.TOKEN_INVALID),
    grpc.StatusCode.PERMISSION_DENIED: (Reason.IDENTITY_MISMATCH, Reason.DATA_NOT_ALLOWED),
    grpc.StatusCode.INVALID_ARGUMENT: (
        Reason.SIZE,
        Reason.MALFORMED,
        Reason.NON_FINITE,
        Reason.NORM,
        Reason.DISAGREEMENT,
        Reason.WEIGHT,
        Reason.NAME_INVALID,
    ),
    grpc.StatusCode.ABORTED: (Reason.SUPERSEDED, Reason.LATE, Reason.CONFLICTING_CONTRIBUTION),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (
        Reason.STAGING_FULL,
        Reason.DISK_FULL,
        Reason.MEMBERS_FULL,
        Reason.JOIN_RATE,
        Reason.TOO_MANY_STREAMS,
    ),
    grpc.StatusCode.DATA_LOSS: (Reason.DIGEST_MISMATCH,),
    grpc.StatusCode.INTERNAL: (Reason.INTERNAL,),
}
_STATUS_OF_REASON = {reason: status for status, reasons in _STATUS.items() for reason in reasons}


def status_of(reason: Reason) -> grpc.StatusCode:
    """gRPC status of a reason, by the status's meaning; FAILED_PRECONDITION (do not retry) where none fits better."""
    return _STATUS_OF_REASON.get(reason, grpc.StatusCode.FAILED_PRECONDITION)


def refusal_of(error: grpc.RpcError) -> RefusedError | None:
    """The typed refusal that a failed RPC carries, or None if it failed for another cause."""
    if not isinstance(error, (grpc.aio.AioRpcError, grpc.Call)):
        return None
    for key, value in tuple(error.trailing_metadata() or ()):
        if key == REASON_KEY:
            return RefusedError(reason_of(str(value)), one_line(error.details() or ""))
    return None


def reason_of(text: str) -> Reason:
    """The reason that a message names; `internal` for one that this version does not know."""
    return Reason(text) if text in Reason.__members__.values() else Reason.INTERNAL


@dataclass(frozen=True, slots=True)
class Traffic:
    """Wire bytes and RPCs since a meter began. Uplink is from worker to server."""

    uplink_bytes: int = 0
    downlink_bytes: int = 0
    rpcs: int = 0

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.uplink_bytes - other.uplink_bytes,
            self.downlink_bytes - other.downlink_bytes,
            self.rpcs - other.rpcs,
        )


class WireMeter:
    """Counts wire bytes of both directions, on either end; safe to call from gRPC's threads."""

    def __init__(self, before: Traffic | None = None) -> None:
        """`before`: what to go on from."""
        self._lock = threading.Lock()
        self.restore(before or Traffic())

    def restore(self, traffic: Traffic) -> None:
        """Go on from this traffic."""
        with self._lock:
            self._uplink_bytes, self._downlink_bytes = traffic.uplink_bytes, traffic.downlink_bytes
            self._rpcs = traffic.rpcs

    def count_rpc(self, token: str = "") -> None:
        """One more RPC, with the stated constant for its headers, and the token where one goes with it."""
        header = len(TOKEN_KEY) + len(token) + TOKEN_PREFIX_BYTES if token else 0
        with self._lock:
            self._rpcs += 1
            self._uplink_bytes += RPC_UPLINK_BYTES + header
            self._downlink_bytes += RPC_DOWNLINK_BYTES

    def count_uplink(self, message_bytes: int) -> None:
        """One message from worker to server, of `message_bytes` without its prefix."""
        with self._lock:
            self._uplink_bytes += message_bytes + MESSAGE_PREFIX_BYTES

    def count_downlink(self, message_bytes: int) -> None:
        """One message from server to worker, of `message_bytes` without its prefix."""
        with self._lock:
            self._downlink_bytes += message_bytes + MESSAGE_PREFIX_BYTES

    @property
    def traffic(self) -> Traffic:
        """What has been counted up to now."""
        with self._lock:
            return Traffic(self._uplink_bytes, self._downlink_bytes, self._rpcs)


class _Serializer:
    """Turns messages into bytes; bytes, serialized once for many receivers, pass as they are."""

    def __init__(self, count: Callable[[int], None]) -> None:
        self._count = count

    def __call__(self, message: Message | bytes) -> bytes:
        data = message if isinstance(message, bytes) else message.SerializeToString()
        self._count(len(data))
        return data


class _Deserializer:
    """Parses messages; a lone chunk is handed on as a `Chunk` that copies nothing.

    What cannot be parsed becomes a `PayloadError` in place of the message (`checked` raises it): gRPC would answer an
    exception from here with INTERNAL, as if it were the receiver's fault.
    """

    def __init__(self, kind: type[Message], count: Callable[[int], None], limit: int = LARGEST_MESSAGE_BYTES) -> None:
        """`limit`: most bytes of a message that is no chunk; a larger one is not even parsed."""
        self._parse = kind.FromString
        self._count, self._limit = count, limit
        field = kind.DESCRIPTOR.fields_by_name.get("chunk")
        self._chunk_tag = bytes([field.number << 3 | 2]) if field is not None else None

    def __call__(self, data: bytes) -> Any:
        self._count(len(data))
        try:
            if self._chunk_tag is not None and data[:1] == self._chunk_tag:
                return Chunk.parse(data)
            if len(data) > self._limit:
                return PayloadError(f"a message of {len(data)} bytes; at most {self._limit}", Reason.SIZE)
            return self._parse(data)
        except PayloadError as error:
            return error
        except DecodeError as error:
            return PayloadError(f"not a message of this RPC: {error}")


def parser(kind: type[Message]) -> Callable[[bytes], Any]:
    """Parses small messages that are not counted; what is none becomes a `PayloadError`, which `checked` raises."""
    return _Deserializer(kind, lambda _: None, LARGEST_CONTROL_BYTES)


def checked(message: Any) -> Any:
    """A received message as it is; raises the `PayloadError` that stands in place of one that could not be parsed."""
    if isinstance(message, PayloadError):
        raise PayloadError(str(message), message.reason)  # anew: an exception that its own frames hold is a cycle
    return message


class Chunk:
    """A streamed message whose only field is `chunk`: `data` is a view into the received bytes."""

    __slots__ = ("data",)

    def __init__(self, data: memoryview) -> None:
        self.data = data

    @classmethod
    def parse(cls, message: bytes) -> Chunk:
        """The chunk of a message that begins with its tag (one byte); raises `PayloadError` on a wrong length."""
        size = shift = 0
        for at in range(1, min(len(message), 6)):
            size |= (message[at] & 0x7F) << shift
            shift += 7
            if message[at] < 0x80:
                if not size:
                    raise PayloadError("an empty chunk", Reason.SIZE)  # or a stream of them would count as progress
                if len(message) - at - 1 != size:
                    break
                return cls(memoryview(message)[at + 1 :])
        raise PayloadError(f"a chunk message of {len(message)} bytes does not hold what it announces")


def chunk_messages(kind: type[Message], parts: Sequence[bytes | bytearray | memoryview], chunk_bytes: int,
                   offset: int = 0) -> Iterator[bytes]:  # fmt: skip
    """Serialized messages of `kind` whose `chunk` fields carry `parts`, one after another, from byte `offset`."""
    tag = kind.DESCRIPTOR.fields_by_name["chunk"].number << 3 | 2
    skip = offset
    for part in parts:
        view = memoryview(part).cast("B")
        start, skip = min(skip, len(view)), max(0, skip - len(view))
        for at in range(start, len(view), chunk_bytes):
            piece = view[at : at + chunk_bytes]
            yield b"".join((bytes((tag, *_varint(len(piece)))), piece))


def _varint(value: int) -> list[int]:
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return [*groups, value]


def digest_of(*parts: bytes | bytearray | memoryview) -> bytes:
    """XXH3-128 of the parts, one after another: names a content, and finds what a broken transfer changed."""
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part)
    return state.digest()


class Receiver:
    """Takes the chunks of an announced content into memory that was allocated once, and checks its digest."""

    def __init__(self, into: memoryview, digest: bytes) -> None:
        self._into = into
        self._digest = digest
        self.received_bytes = 0

    @property
    def complete(self) -> bool:
        """Whether every announced byte is here."""
        return self.received_bytes == len(self._into)

    def take(self, chunk: memoryview) -> None:
        """Append a chunk; raises `PayloadError` if it goes beyond the announced size."""
        end = self.received_bytes + len(chunk)
        if end > len(self._into):
            raise PayloadError(f"more than the announced {len(self._into)} bytes", Reason.SIZE)
        self._into[self.received_bytes : end] = chunk
        self.received_bytes = end

    def check(self) -> None:
        """Raises `PayloadError` unless all is here and has the announced digest."""
        if not self.complete:
            raise PayloadError(f"{self.received_bytes} of {len(self._into)} announced bytes", Reason.SIZE)
        if digest_of(self._into) != self._digest:
            raise PayloadError("the content does not have the announced digest", Reason.DIGEST_MISMATCH)


def _message_types(method: MethodDescriptor) -> tuple[type[Message], type[Message]]:
    return GetMessageClass(method.input_type), GetMessageClass(method.output_type)


def service_handler(servicer: object, meter: WireMeter) -> grpc.GenericRpcHandler:
    """gRPC handler of all methods of the service, each by the servicer's method of its name; counts every byte."""
    handlers = {}
    for method in SERVICE.methods:
        request, _ = _message_types(method)
        make = _HANDLERS[method.client_streaming, method.server_streaming]
        handlers[method.name] = make(
            getattr(servicer, method.name),
            request_deserializer=_Deserializer(request, meter.count_uplink, LARGEST_CONTROL_BYTES),
            response_serializer=_Serializer(meter.count_downlink),
        )
    return grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)


_HANDLERS: Mapping[tuple[bool, bool], Callable[..., Any]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


class _Channel(Protocol):
    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any: ...
    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any: ...
    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any: ...
    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any: ...


class Stub:
    """Calls the service's methods by name over a channel (sync or aio); counts every byte."""

    Join: Any
    Watch: Any
    Pull: Any
    Push: Any
    Report: Any
    Heartbeat: Any
    Leave: Any
    Status: Any

    def __init__(self, channel: _Channel, meter: WireMeter, token: str = "") -> None:
        """`token`, if any, goes with every call."""
        for method in SERVICE.methods:
            _, response = _message_types(method)
            kind = f"{_STREAM[method.client_streaming]}_{_STREAM[method.server_streaming]}"
            call = getattr(channel, kind)(
                f"/{SERVICE.full_name}/{method.name}",
                request_serializer=_Serializer(meter.count_uplink),
                response_deserializer=_Deserializer(response, meter.count_downlink),
            )
            setattr(self, method.name, _counted(call, meter, token))


_STREAM = {False: "unary", True: "stream"}


def _counted(call: Callable[..., Any], meter: WireMeter, token: str) -> Callable[..., Any]:
    metadata = ((TOKEN_KEY, token),) if token else None

    def counted(*args: Any, **kwargs: Any) -> Any:
        meter.count_rpc(token)
        return call(*args, metadata=metadata, **kwargs)

    return counted
