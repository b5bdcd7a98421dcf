"""Messages of a push that come twice, or in another order: each has its typed answer, and nothing counts twice."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from ditherps import wire
from ditherps.errors import Reason
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps.v1 import types_pb2
from tests.service.inprocess import Peer, Refused, serving

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def pushed(
    peer: Peer, plan: types_pb2.RoundPlan, update: bytes, order: Sequence[int] = (0, 1, 2)
) -> pb.PushResponse:
    """A push whose content comes in three chunks, in this order; the last answer."""
    push = peer.pushing()
    await push.send(peer.header(plan, update))
    answer = await push.answer()
    if answer.HasField("need"):
        assert answer.need.offset == 0
        chunks = list(wire.chunk_messages(pb.PushRequest, [update], -(-len(update) // 3)))
        await push.send(*(chunks[place] for place in order))
        answer = await push.answer()
    return answer


async def test_chunks_in_another_order(tmp_path: Path) -> None:
    """The content is not the announced one; it may be sent again from its start, and then counts."""
    async with serving(tmp_path, metrics=True) as served, Peer(served.address) as a, Peer(served.address) as b:
        await a.join("worker-0")
        await b.join("worker-1")
        plan = await a.plan()
        update = a.update(plan)
        orders = [order for order in itertools.permutations(range(3)) if order != (0, 1, 2)]
        for order in orders:
            assert (await pushed(a, plan, update, order)).refused.reason == Reason.DIGEST_MISMATCH, order
            assert (await a.states())[0] == "computing"
        name = f'ditherps_rejected_updates_total{{reason="{Reason.DIGEST_MISMATCH}"}}'
        assert await served.metric(name) == len(orders)
        assert await served.metric("ditherps_contributions_total") == 0
        assert (await pushed(a, plan, update)).accepted == pb.PushAccepted()
        assert await served.metric("ditherps_contributions_total") == 1


async def test_a_chunk_that_comes_twice(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, Peer(served.address) as a, Peer(served.address) as b:
        await a.join("worker-0")
        await b.join("worker-1")
        plan = await a.plan()
        update = a.update(plan)
        for order in ((0, 0, 1, 2), (0, 1, 1, 2)):
            refused = (await pushed(a, plan, update, order)).refused
            assert refused.reason in (Reason.SIZE, Reason.DIGEST_MISMATCH), order
        assert (await pushed(a, plan, update, (0, 1, 2))).accepted == pb.PushAccepted()


async def test_an_old_push_after_a_newer(tmp_path: Path) -> None:
    """What was delayed on its way to a round that has closed does not touch the open one."""
    async with serving(tmp_path, metrics=True) as served, Peer(served.address) as a, Peer(served.address) as b:
        await a.join("worker-0")
        await b.join("worker-1")
        plans, updates = [], []
        for round_ in range(2):
            plans.append(await a.plan())
            updates.append([peer.update(plans[-1], seed=round_) for peer in (a, b)])
            assert (await pushed(a, plans[-1], updates[-1][0])).accepted == pb.PushAccepted()
            if round_ == 0:
                assert (await pushed(b, plans[0], updates[0][1])).accepted == pb.PushAccepted()
                await served.reached(1)
        # The old one twice, and the old content as if it were the new one's.
        for _ in range(2):
            assert (await pushed(a, plans[0], updates[0][0])).refused.reason == Reason.LATE
        assert (await pushed(a, plans[1], updates[0][0])).refused.reason == Reason.CONFLICTING_CONTRIBUTION
        again = await asyncio.gather(*(pushed(a, plans[1], updates[1][0]) for _ in range(3)))
        assert all(answer.accepted.duplicate for answer in again)
        assert (await pushed(b, plans[1], updates[1][1])).accepted == pb.PushAccepted()
        await served.reached(2)
        assert [(record["workers"], record["samples"]) for record in served.records()] == [([0, 1], 16)] * 2
        assert await served.metric("ditherps_contributions_total") == 4


async def test_joins_that_cross_each_other(tmp_path: Path) -> None:
    """A Join that is sent twice leaves one session that counts, whichever arrived last."""
    async with serving(tmp_path) as served, Peer(served.address) as first, Peer(served.address) as second:
        joined = await asyncio.gather(*(peer.join("worker-0", lease_key=b"k") for peer in (first, second)))
        older, newer = sorted((first, second), key=lambda peer: peer.fence.session)
        assert {answer.index for answer in joined} == {0}
        assert older.fence.session < newer.fence.session
        async with Peer(served.address) as other:
            await other.join("worker-1")
            plan = await newer.plan()
            with pytest.raises(Refused) as refused:
                await pushed(older, plan, older.update(plan))
            assert refused.value.reason is Reason.SUPERSEDED
            assert (await pushed(newer, plan, newer.update(plan))).accepted == pb.PushAccepted()
            assert await other.states() == ["delivered", "computing"]
