"""How often workers may join and what they may have open, with a clock of the test's own."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditherps.config import LimitsConfig
from ditherps.errors import Reason, RefusedError
from ditherps_server.admission import Admission, Patience, Slots, TokenBucket
from ditherps_server.repeated import Repeated

TABLE = ("worker-0", "worker-1", "gpu/0", "gpu/1", "gpu/2")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class TestTokenBucket:
    def test_a_burst_and_then_the_rate(self) -> None:
        bucket = TokenBucket(2.0, 3, now=0.0)
        assert [bucket.take(0.0) for _ in range(4)] == [0, 0, 0, 0.5]
        assert bucket.take(0.4) == pytest.approx(0.1)
        assert bucket.take(0.5) == 0
        assert bucket.take(0.5) > 0
        assert [bucket.take(1000.0) for _ in range(4)] == [0, 0, 0, 0.5]  # no more than a burst is saved up

    @given(per_second=st.floats(0.01, 1000), burst=st.integers(1, 50), gaps=st.lists(st.floats(0, 10), max_size=60))
    def test_never_more_than_burst_and_rate(self, per_second: float, burst: int, gaps: list[float]) -> None:
        bucket, now, passed = TokenBucket(per_second, burst, now=0.0), 0.0, 0
        for gap in gaps:
            now += gap
            wait = bucket.take(now)
            passed += wait == 0
            assert passed <= burst + per_second * now + 1e-6
            assert 0 <= wait <= 1 / per_second

    def test_a_clock_that_goes_back_gives_nothing(self) -> None:
        bucket = TokenBucket(1.0, 1, now=10.0)
        assert bucket.take(10.0) == 0
        assert bucket.take(5.0) == 1
        assert bucket.take(5.5) == 0.5


def refusals(admission: Admission, identity: str, count: int) -> int:
    refused = 0
    for _ in range(count):
        try:
            admission.join(identity)
        except RefusedError as error:
            refused += error.reason is Reason.JOIN_RATE
    return refused


class TestAdmission:
    def make(self, **limits: float) -> tuple[Admission, Clock]:
        clock = Clock()
        config = {"worker_join_burst": 4, "worker_joins_per_second": 1, "join_burst": 30, "joins_per_second": 2}
        return Admission(LimitsConfig.model_validate({**config, **limits}), TABLE, clock), clock

    def test_one_worker_in_a_loop_is_held_off_and_no_other(self) -> None:
        admission, clock = self.make()
        assert refusals(admission, "worker-0", 1000) == 996
        with pytest.raises(RefusedError, match=r"worker-0 joins too often: wait 1\.0 s; does a second worker run"):
            admission.join("worker-0")
        assert refusals(admission, "worker-1", 4) == 0  # the total was not charged for those that were refused
        clock.now += 2.5
        assert refusals(admission, "worker-0", 4) == 2

    def test_a_pool_may_as_often_as_its_members_together(self) -> None:
        admission, _ = self.make()
        assert admission.members_of("gpu/*") == 3
        assert refusals(admission, "gpu/*", 14) == 2
        assert refusals(admission, "gpu/0", 4) == 0

    def test_all_together(self) -> None:
        admission, clock = self.make(join_burst=6)
        assert [refusals(admission, name, 3) for name in TABLE] == [0, 0, 3, 3, 3]
        clock.now += 1
        assert refusals(admission, "gpu/1", 3) == 1

    def test_made_up_names_share_one_allowance_and_take_no_memory(self) -> None:
        admission, _ = self.make()
        refused = sum(refusals(admission, f"nobody-{number}", 1) for number in range(1000))
        assert refused == 1000 - 4 * len(TABLE)
        assert admission.members_of("nobody-7") == len(TABLE)
        assert len(admission._buckets) == len(admission._covered) == 1
        assert refusals(admission, "worker-0", 4) == 0

    def test_five_hundred_at_once_get_in_with_the_defaults(self) -> None:
        table = tuple(f"worker-{index}" for index in range(500))
        clock = Clock()
        admission = Admission(LimitsConfig(), table, clock)
        assert sum(refusals(admission, name, 1) for name in table) == 0
        nameless = Admission(LimitsConfig(), table, clock)
        assert refusals(nameless, "", 500) == 0


class TestSlots:
    def test_each_caller_has_its_own(self) -> None:
        slots = Slots("pulls", 2)
        with slots.hold("a"), slots.hold("b"):
            with slots.hold("a"):
                with pytest.raises(RefusedError, match="2 pulls of this worker are open") as refused, slots.hold("a"):
                    pass
                assert refused.value.reason is Reason.TOO_MANY_STREAMS
            with slots.hold("a"), pytest.raises(RefusedError), slots.hold("a"):
                pass
            with slots.hold("b"), slots.hold("b", times=2), slots.hold("b", times=2):
                pass
        assert not slots._held

    def test_an_error_gives_a_slot_back(self) -> None:
        slots = Slots("pulls", 1)
        for _ in range(3):
            with pytest.raises(ValueError, match="once"), slots.hold("a"):
                raise ValueError("once")


class TestPatience:
    def test_whoever_has_kept_it_waiting_longest_is_given_up(self) -> None:
        async def outcomes() -> list[object]:
            patience, never = Patience("a message", 2, 0.1), asyncio.Event()
            waits = [patience.wait(never.wait()) for _ in range(4)]
            return await asyncio.gather(*waits, patience.wait(asyncio.sleep(0, "here")), return_exceptions=True)

        *refused, honest = asyncio.run(outcomes())
        assert honest == "here"
        reasons = [error.reason for error in refused if isinstance(error, RefusedError)]
        assert reasons == [Reason.TOO_MANY_STREAMS] * 3 + [Reason.IDLE_TIMEOUT]

    def test_an_error_is_handed_on(self) -> None:
        async def fails() -> None:
            raise ValueError("its own")

        patience = Patience("a message", 1, 1.0)
        for _ in range(3):
            with pytest.raises(ValueError, match="its own"):
                asyncio.run(patience.wait(fails()))


def test_lines_that_repeat_are_counted() -> None:
    clock = Clock()
    repeated = Repeated(1.0, clock)
    assert repeated.due("a") == ""
    assert [repeated.due("a") for _ in range(5)] == [None] * 5
    assert repeated.due("b") == ""
    clock.now += 1
    assert repeated.due("a") == " (5 more like this)"
    assert repeated.due("a") is None
    clock.now += 10
    assert repeated.due("b") == ""
