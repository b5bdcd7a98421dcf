"""Members: an index is the position of a name, a session ends the one before, and the fence keeps others out."""

from __future__ import annotations

import itertools

import pytest

from ditherps.errors import Reason, RefusedError
from ditherps.v1 import types_pb2
from ditherps_server.members import Members

TABLE = ("zoe", "adam", "pool/1")
NOBODY: frozenset[int] = frozenset()


def members() -> Members:
    return Members(TABLE, "job", 3)


def refusal(members: Members, fence: types_pb2.Fence) -> Reason:
    with pytest.raises(RefusedError) as refused:
        members.check(fence)
    return refused.value.reason


@pytest.mark.parametrize("order", list(itertools.permutations(TABLE)))
def test_the_index_follows_from_the_name_whatever_the_order(order: tuple[str, ...]) -> None:
    made = members()
    for name in order:
        assert made.join(name, b"", occupied=NOBODY).index == TABLE.index(name)


def test_a_name_that_is_not_in_the_table() -> None:
    reasons = {
        "eve": Reason.UNKNOWN_MEMBER, "pool/2": Reason.UNKNOWN_MEMBER, "0": Reason.UNKNOWN_MEMBER,
        "Zoe": Reason.NAME_INVALID, "../x": Reason.NAME_INVALID, "x" * 64: Reason.NAME_INVALID,
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(RefusedError) as refused:
            members().join(name, b"", occupied=NOBODY)
        assert refused.value.reason is reason
        assert repr(name) in str(refused.value)
        assert reason is Reason.NAME_INVALID or "zoe, adam, pool/1" in str(refused.value)


class TestLeases:
    def test_the_lowest_free_slot(self) -> None:
        made = members()
        assert made.join("", b"k0", occupied=NOBODY).index == 0
        assert made.join("", b"k1", occupied=frozenset({0, 2})).index == 1

    def test_the_same_key_gets_its_slot_back_even_while_it_is_occupied(self) -> None:
        made = members()
        made.join("", b"k0", occupied=NOBODY)
        second = made.join("", b"k1", occupied=frozenset({0}))
        again = made.join("", b"k1", occupied=frozenset({0, 1, 2}))
        assert again.index == second.index == 1
        assert again.number > second.number

    def test_a_replacement_takes_the_freed_slot_and_its_former_holder_another(self) -> None:
        made = members()
        old = made.join("", b"old", occupied=NOBODY)
        new = made.join("", b"new", occupied=NOBODY)  # the old one has gone silent
        assert (old.index, new.index) == (0, 0)
        assert made.join("", b"old", occupied=frozenset({0})).index == 1

    def test_full(self) -> None:
        with pytest.raises(RefusedError) as refused:
            members().join("", b"k", occupied=frozenset({0, 1, 2}))
        assert refused.value.reason is Reason.MEMBERS_FULL
        assert "3" in str(refused.value)

    def test_no_key_is_nobodys_key(self) -> None:
        made = members()
        assert made.join("", b"", occupied=NOBODY).index == 0
        assert made.join("", b"", occupied=frozenset({0})).index == 1


class TestFence:
    def test_the_newest_session_passes_and_older_ones_are_superseded(self) -> None:
        made = members()
        sessions = [made.join("adam", b"", occupied=NOBODY) for _ in range(3)]
        assert made.check(made.fence(sessions[2])) is sessions[2]
        for old in sessions[:2]:
            assert refusal(made, made.fence(old)) is Reason.SUPERSEDED
        assert [session.number for session in sessions] == sorted({session.number for session in sessions})

    def test_another_members_join_supersedes_nothing(self) -> None:
        made = members()
        adam = made.join("adam", b"", occupied=NOBODY)
        made.join("zoe", b"", occupied=NOBODY)
        assert made.check(made.fence(adam)) is adam

    @pytest.mark.parametrize(
        ("fence", "reason"),
        [
            (types_pb2.Fence(), Reason.WRONG_JOB),
            (types_pb2.Fence(job_id="other", server_epoch=3, session=1), Reason.WRONG_JOB),
            (types_pb2.Fence(job_id="job", server_epoch=2, session=1), Reason.WRONG_EPOCH),
            (types_pb2.Fence(job_id="job", server_epoch=4, session=1), Reason.WRONG_EPOCH),
            (types_pb2.Fence(job_id="job", server_epoch=3, session=2), Reason.NOT_JOINED),
            (types_pb2.Fence(job_id="job", server_epoch=3), Reason.NOT_JOINED),
        ],
    )
    def test_others_are_kept_out(self, fence: types_pb2.Fence, reason: Reason) -> None:
        made = members()
        made.join("zoe", b"", occupied=NOBODY)
        assert refusal(made, fence) is reason

    def test_it_says_what_to_send(self) -> None:
        made = members()
        session = made.join("zoe", b"", occupied=NOBODY)
        assert made.fence(session) == types_pb2.Fence(job_id="job", server_epoch=3, session=session.number)
