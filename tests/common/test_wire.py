"""The wire: chunks, digests, malformed messages, status codes, counting, and stubs that fit the contract."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from ditherps import wire
from ditherps.errors import PayloadError, Reason
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps_server.service import ParameterServerService

ROOT = Path(__file__).resolve().parents[2]
CHUNKED: list[type[Message]] = [pb.PushRequest, pb.PullResponse]
parts = st.lists(st.binary(max_size=400), max_size=4)


def nothing(_: int) -> None:
    """Counts nothing."""


def parse(kind: type[Message], data: bytes) -> Any:
    return wire._Deserializer(kind, nothing)(data)


class TestChunks:
    @given(kind=st.sampled_from(CHUNKED), parts=parts, chunk_bytes=st.integers(1, 600), data=st.data())
    def test_messages_carry_the_parts_from_the_offset(
        self, kind: type[Message], parts: list[bytes], chunk_bytes: int, data: st.DataObject
    ) -> None:
        content = b"".join(parts)
        offset = data.draw(st.integers(0, len(content)))
        carried, parsed = b"", b""
        for message in wire.chunk_messages(kind, [memoryview(part) for part in parts], chunk_bytes, offset):
            chunk = parse(kind, message)
            assert isinstance(chunk, wire.Chunk)
            generated: Any = kind.FromString(message)
            assert generated.WhichOneof("part") == "chunk"
            assert 1 <= len(generated.chunk) <= chunk_bytes
            # What protobuf itself would have written, byte for byte.
            assert kind(chunk=generated.chunk).SerializeToString() == message
            carried, parsed = carried + bytes(chunk.data), parsed + generated.chunk
        assert carried == parsed == content[offset:]

    def test_sizes_about_the_varints_borders(self) -> None:
        for size in (1, 127, 128, 129, 16_383, 16_384, (1 << 20), (1 << 21) - 1, 1 << 21):
            data = bytes(size)
            (message,) = wire.chunk_messages(pb.PushRequest, [data], 1 << 22)
            assert message == pb.PushRequest(chunk=data).SerializeToString()
            assert wire.Chunk.parse(message).data == data

    def test_a_chunk_copies_nothing(self) -> None:
        message = pb.PushRequest(chunk=b"abc").SerializeToString()
        assert wire.Chunk.parse(message).data.obj is message

    def test_nothing_and_the_end_give_no_message(self) -> None:
        assert list(wire.chunk_messages(pb.PushRequest, [], 10)) == []
        assert list(wire.chunk_messages(pb.PushRequest, [b"", b"abc"], 10, offset=3)) == []

    @given(st.binary(max_size=40))
    def test_any_bytes_behind_a_chunks_tag_become_a_chunk_or_an_error(self, tail: bytes) -> None:
        message = bytes([2 << 3 | 2]) + tail
        found = parse(pb.PushRequest, message)
        if isinstance(found, wire.Chunk):
            assert pb.PushRequest.FromString(message).chunk == found.data
        else:
            assert isinstance(found, PayloadError)
            assert found.reason in (Reason.MALFORMED, Reason.SIZE)  # an empty chunk is one of a wrong size


class TestMalformed:
    @given(st.sampled_from(sorted(wire.SERVICE.methods_by_name)), st.binary(max_size=60))
    def test_every_message_is_parsed_or_becomes_an_error(self, method: str, data: bytes) -> None:
        for kind in wire._message_types(wire.SERVICE.methods_by_name[method]):
            found = parse(kind, data)
            assert isinstance(found, (kind, wire.Chunk, PayloadError))

    def test_an_error_in_place_of_a_message_is_raised(self) -> None:
        broken = parse(pb.JoinRequest, b"\xff\xff")
        assert isinstance(broken, PayloadError)
        assert wire.status_of(broken.reason) is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(PayloadError, match="not a message of this RPC"):
            wire.checked(broken)
        good = pb.JoinRequest(worker="a")
        assert wire.checked(good) is good


class TestReceiver:
    def receive(self, content: bytes, chunks: Iterable[bytes], size: int | None = None) -> bytes:
        into = bytearray(len(content) if size is None else size)
        receiver = wire.Receiver(memoryview(into), wire.digest_of(content))
        for chunk in chunks:
            receiver.take(memoryview(chunk))
        receiver.check()
        return bytes(into)

    @given(st.lists(st.binary(max_size=50), max_size=6))
    def test_whole(self, chunks: list[bytes]) -> None:
        assert self.receive(b"".join(chunks), chunks) == b"".join(chunks)

    def test_more_than_announced(self) -> None:
        with pytest.raises(PayloadError, match="more than the announced 4 bytes") as refused:
            self.receive(b"abcd", [b"abc", b"de"])
        assert refused.value.reason is Reason.SIZE

    def test_what_was_refused_is_not_written(self) -> None:
        into = bytearray(4)
        receiver = wire.Receiver(memoryview(into), wire.digest_of(b"abcd"))
        receiver.take(memoryview(b"abc"))
        with pytest.raises(PayloadError):
            receiver.take(memoryview(b"xy"))
        assert (bytes(into), receiver.received_bytes, receiver.complete) == (b"abc\0", 3, False)
        receiver.take(memoryview(b"d"))
        receiver.check()

    def test_less_than_announced(self) -> None:
        with pytest.raises(PayloadError, match="3 of 4 announced bytes") as refused:
            self.receive(b"abcd", [b"abc"])
        assert refused.value.reason is Reason.SIZE

    @given(st.binary(min_size=1, max_size=64), st.data())
    def test_any_bit(self, content: bytes, data: st.DataObject) -> None:
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PayloadError) as refused:
            self.receive(content, [bytes(changed)])
        assert refused.value.reason is Reason.DIGEST_MISMATCH

    @given(parts)
    def test_a_digest_is_of_the_content_however_it_is_cut(self, parts: list[bytes]) -> None:
        assert wire.digest_of(*parts) == wire.digest_of(b"".join(parts))
        assert len(wire.digest_of(*parts)) == 16


class TestStatus:
    def test_every_reason_has_a_status_that_is_no_success(self) -> None:
        for reason in Reason:
            status = wire.status_of(reason)
            assert status is not grpc.StatusCode.OK
            # Only what may help when tried again as it is may be UNAVAILABLE; INTERNAL is ours alone.
            assert (status is grpc.StatusCode.INTERNAL) == (reason is Reason.INTERNAL)
            assert status is not grpc.StatusCode.UNAVAILABLE

    @pytest.mark.parametrize(
        ("reason", "status"),
        [
            (Reason.SUPERSEDED, grpc.StatusCode.ABORTED),
            (Reason.WRONG_JOB, grpc.StatusCode.FAILED_PRECONDITION),
            (Reason.WRONG_EPOCH, grpc.StatusCode.FAILED_PRECONDITION),
            (Reason.STAGING_FULL, grpc.StatusCode.RESOURCE_EXHAUSTED),
            (Reason.DIGEST_MISMATCH, grpc.StatusCode.DATA_LOSS),
            (Reason.MALFORMED, grpc.StatusCode.INVALID_ARGUMENT),
        ],
    )
    def test_by_its_meaning(self, reason: Reason, status: grpc.StatusCode) -> None:
        assert wire.status_of(reason) is status

    def test_no_reason_has_two(self) -> None:
        listed = [reason for reasons in wire._STATUS.values() for reason in reasons]
        assert len(listed) == len(set(listed))

    def test_reasons_travel_as_text(self) -> None:
        for reason in Reason:
            assert wire.reason_of(reason.value) is reason
        assert wire.reason_of("of a later version") is Reason.INTERNAL

    def test_a_refusal_is_read_from_the_trailers(self) -> None:
        def error(*trailers: tuple[str, str]) -> grpc.aio.AioRpcError:
            metadata = grpc.aio.Metadata(*trailers)
            return grpc.aio.AioRpcError(grpc.StatusCode.ABORTED, grpc.aio.Metadata(), metadata, details="gone")

        refusal = wire.refusal_of(error(("other", "x"), (wire.REASON_KEY, "late")))
        assert refusal is not None
        assert (refusal.reason, str(refusal)) == (Reason.LATE, "gone")
        assert wire.refusal_of(error(("other", "x"))) is None
        assert wire.refusal_of(grpc.RpcError()) is None


class TestMeter:
    def test_arithmetic(self) -> None:
        meter = wire.WireMeter()
        meter.count_rpc()
        meter.count_uplink(100)
        before = meter.traffic
        assert before == wire.Traffic(wire.RPC_UPLINK_BYTES + 105, wire.RPC_DOWNLINK_BYTES, 1)
        meter.count_downlink(0)
        meter.count_rpc()
        assert meter.traffic - before == wire.Traffic(wire.RPC_UPLINK_BYTES, wire.RPC_DOWNLINK_BYTES + 5, 1)
        assert before - before == wire.Traffic()

    @given(st.lists(st.binary(max_size=300), max_size=5))
    def test_what_is_written_and_what_is_read_count_alike(self, chunks: list[bytes]) -> None:
        sent, received = wire.WireMeter(), wire.WireMeter()
        write, read = wire._Serializer(sent.count_uplink), wire._Deserializer(pb.PushRequest, received.count_uplink)
        for chunk in chunks:
            message = pb.PushRequest(chunk=chunk)
            assert write(message) == write(message.SerializeToString())  # serialized before, for many receivers
            read(message.SerializeToString())
            read(message.SerializeToString())
        assert sent.traffic == received.traffic
        expected = 2 * sum(5 + pb.PushRequest(chunk=chunk).ByteSize() for chunk in chunks)
        assert sent.traffic.uplink_bytes == expected


class TestContract:
    def test_every_rpc_has_a_method_of_the_servicer_and_a_call_of_the_stub(self) -> None:
        async def check() -> None:
            async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
                stub = wire.Stub(channel, wire.WireMeter())
                for method in wire.SERVICE.methods:
                    assert callable(getattr(ParameterServerService, method.name)), method.name
                    assert callable(getattr(stub, method.name)), method.name

        asyncio.run(check())
        assert {method.name for method in wire.SERVICE.methods} == set(wire.Stub.__annotations__)

    def test_a_servicer_that_lacks_a_method_is_not_served(self) -> None:
        with pytest.raises(AttributeError):
            wire.service_handler(object(), wire.WireMeter())

    def test_a_message_of_the_largest_size_stays_below_grpcs_limit(self) -> None:
        assert wire.CHUNK_BYTES + 16 < 4 << 20

    def test_bytes_only_for_bulk(self) -> None:
        """`repeated float` is twenty times slower to write; no message may have one."""
        for message in pb.DESCRIPTOR.message_types_by_name.values():
            for field in message.fields:
                if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
                    assert not field.is_repeated, field.full_name

    @pytest.mark.skipif(importlib.util.find_spec("grpc_tools") is None, reason="grpcio-tools is not installed")
    def test_the_generated_stubs_are_up_to_date(self) -> None:
        done = subprocess.run(
            [sys.executable, ROOT / "proto" / "generate.py", "--check"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
