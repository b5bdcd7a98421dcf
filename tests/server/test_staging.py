"""Staging: one contribution a worker, the first whole one stands, and memory within its limit."""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import replace

import numpy as np
import pytest

from ditherps.codecs import Role
from ditherps.errors import PayloadError, Reason, RefusedError
from ditherps.wire import digest_of
from ditherps_server.staging import Announcement, Contribution, Staging

A, B = b"a" * 100, b"b" * 100


def announce(content: bytes, index: int = 0, buffer_bytes: int = 0, **changes: int) -> Announcement:
    made = Announcement(
        round=0, attempt=0, index=index, role=Role.SOURCE, update_bytes=len(content) - buffer_bytes,
        buffer_bytes=buffer_bytes, digest=digest_of(content), samples=8,
    )  # fmt: skip
    return replace(made, **changes) if changes else made  # type: ignore[arg-type]


def send(contribution: Contribution, data: bytes) -> None:
    contribution.take(contribution.stream, memoryview(data))


def whole(staging: Staging, content: bytes, index: int = 0, buffer_bytes: int = 0) -> Contribution:
    contribution = staging.admit(announce(content, index, buffer_bytes))
    send(contribution, content)
    contribution.receiver.check()
    assert staging.commit(contribution)
    return contribution


def refusal(staging: Staging, announcement: Announcement) -> Reason:
    with pytest.raises(RefusedError) as refused:
        staging.admit(announcement)
    return refused.value.reason


def test_update_and_buffers_are_views_of_one_content() -> None:
    contribution = whole(Staging(1000), A + B, buffer_bytes=100)
    assert (bytes(contribution.update), bytes(contribution.buffers)) == (A, B)
    assert contribution.announcement.content_bytes == 200


def test_the_same_content_goes_on_where_it_broke() -> None:
    staging = Staging(1000)
    first = staging.admit(announce(A))
    send(first, A[:30])
    again = staging.admit(announce(A))
    assert again is first
    assert again.receiver.received_bytes == 30
    send(again, A[30:])
    again.receiver.check()
    assert (staging.commit(again), staging.commit(again)) == (True, False)
    assert staging.admit(announce(A)).whole


def test_an_older_stream_writes_no_longer() -> None:
    staging = Staging(1000)
    contribution = staging.admit(announce(A))
    older = contribution.stream
    contribution.take(older, memoryview(A[:10]))
    staging.admit(announce(A))
    with pytest.raises(RefusedError) as refused:
        contribution.take(older, memoryview(A[10:]))
    assert refused.value.reason is Reason.SUPERSEDED
    assert contribution.receiver.received_bytes == 10


def test_another_content_replaces_one_that_is_not_whole() -> None:
    staging = Staging(150)
    first = staging.admit(announce(A))
    older = first.stream
    send(first, A[:99])
    second = whole(staging, B)
    with pytest.raises(RefusedError) as refused:
        first.take(older, memoryview(A[99:]))
    assert refused.value.reason is Reason.SUPERSEDED
    assert staging.members((0,)) == [second]
    with pytest.raises(RefusedError) as refused:
        staging.commit(first)
    assert refused.value.reason is Reason.SUPERSEDED
    assert bytes(second.update) == B


def test_the_first_whole_content_stands() -> None:
    staging = Staging(1000)
    first = whole(staging, A)
    assert refusal(staging, announce(B)) is Reason.CONFLICTING_CONTRIBUTION
    assert staging.members((0,)) == [first]
    assert bytes(first.update) == A
    # Another worker's is its own.
    assert not staging.admit(announce(B, index=1)).whole


def test_what_turned_out_unusable_makes_room_for_another_try() -> None:
    staging = Staging(100)
    bad = staging.admit(announce(A))
    send(bad, B)
    with pytest.raises(PayloadError):
        bad.receiver.check()
    staging.drop(bad)
    assert staging.held_bytes == 0
    whole(staging, A)
    staging.drop(bad)  # long forgotten: the new one stays
    assert bytes(staging.members((0,))[0].update) == A


def test_what_is_not_whole_enters_no_round() -> None:
    staging = Staging(1000)
    whole(staging, A, index=1)
    staging.admit(announce(A, index=0))
    with pytest.raises(PayloadError):
        staging.members((0, 1))


def test_members_stand_in_the_order_asked_for() -> None:
    staging = Staging(1000)
    for index in (2, 0, 1):
        whole(staging, bytes([index]) * 10, index)
    assert [bytes(member.update)[0] for member in staging.members((0, 1, 2))] == [0, 1, 2]


def test_after_the_round_nothing_is_written_and_nothing_counts() -> None:
    staging = Staging(1000)
    finished, unfinished = whole(staging, A, index=0), staging.admit(announce(B, index=1))
    stream = unfinished.stream
    staging.clear()
    assert staging.held_bytes == 0
    for contribution in (finished, unfinished):
        with pytest.raises(RefusedError) as refused:
            contribution.take(stream, memoryview(B))
        assert refused.value.reason is Reason.LATE
        with pytest.raises(RefusedError) as refused:
            staging.commit(contribution)
        assert refused.value.reason is Reason.LATE


class TestLimit:
    def test_it_is_exact(self) -> None:
        staging = Staging(200)
        staging.admit(announce(A, index=0))
        assert refusal(staging, announce(A + b"x", index=1)) is Reason.STAGING_FULL
        staging.admit(announce(A, index=1))
        assert staging.held_bytes == 200
        assert refusal(staging, announce(b"x", index=2)) is Reason.STAGING_FULL

    def test_a_refusal_leaves_what_is_held(self) -> None:
        staging = Staging(150)
        kept = whole(staging, A)
        refusal(staging, announce(B, index=1))
        assert staging.members((0,)) == [kept]

    def test_memory_is_used_again(self) -> None:
        staging = Staging(200)
        first = whole(staging, A).content.obj
        staging.clear()
        assert whole(staging, B).content.obj is first

    def test_memory_that_is_used_again_counts_as_what_it_is(self) -> None:
        """Contributions that shrink from round to round must not hide the memory that the first one took."""
        staging = Staging(250)
        content = bytes(200)
        while len(content) > 30:
            contribution = whole(staging, content)
            assert isinstance(contribution.content.obj, np.ndarray)
            assert staging.held_bytes == contribution.content.obj.nbytes >= len(content)
            staging.clear()
            content = content[: len(content) * 6 // 10]
        assert len(content) < 30

    def test_a_replaced_content_frees_its_memory_while_its_stream_still_waits(self) -> None:
        staging = Staging(100)
        waiting, memory = [], []
        for number in range(5):
            contribution = staging.admit(announce(bytes([number]) * 100))
            send(contribution, bytes([number]) * 99)
            waiting.append(contribution)
            memory.append(weakref.ref(contribution.content.obj))
        del contribution
        gc.collect()
        assert [reference() is not None for reference in memory] == [False] * 4 + [True]
        staging.clear()
        assert memory[-1]() is None
        assert len(waiting) == 5

    def test_any_sequence_stays_within_it(self) -> None:
        """Real memory, spare and held together, at every step of a random run."""
        draw, limit = random.Random(8), 1000
        staging = Staging(limit)
        taken: dict[int, int] = {}
        refused = 0
        for step in range(3000):
            if draw.random() < 0.2:
                staging.clear()
                continue
            content = bytes([step % 256]) * draw.randint(1, 300)
            index = draw.randrange(6)
            try:
                contribution = staging.admit(announce(content, index))
            except RefusedError as error:
                refused += error.reason is Reason.STAGING_FULL
                continue
            array = contribution.content.obj
            assert isinstance(array, np.ndarray)
            if id(array) not in taken:
                taken[id(array)] = array.nbytes
                weakref.finalize(array, taken.pop, id(array))
            if draw.random() < 0.8:
                send(contribution, content[contribution.receiver.received_bytes :])
                staging.commit(contribution)
                assert bytes(contribution.update) == content
            del array, contribution
            assert staging.held_bytes <= limit
            assert sum(taken.values()) <= limit
        assert refused > 50
