"""Small pieces of work on a pool's threads: results and errors as a loop has them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ditherps.pool import on_threads


@pytest.fixture(params=[None, 1, 2, 5], ids=["here", "one", "two", "five"])
def pool(request: pytest.FixtureRequest) -> Iterator[ThreadPoolExecutor | None]:
    if request.param is None:
        yield None
        return
    with ThreadPoolExecutor(request.param) as made:
        yield made


@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_results_stand_in_the_order_of_the_items(pool: ThreadPoolExecutor | None, count: int) -> None:
    assert on_threads(pool, lambda item: item * item, range(count)) == [item * item for item in range(count)]


def test_the_error_of_the_first_item_is_raised(pool: ThreadPoolExecutor | None) -> None:
    def work(item: int) -> int:
        if item % 10 == 7:
            raise ValueError(item)
        return item

    for _ in range(20):
        with pytest.raises(ValueError, match=r"^7$"):
            on_threads(pool, work, range(50))


def test_items_behind_an_error_are_left_alone() -> None:
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        raise ValueError(item)

    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match=r"^0$"):
        on_threads(pool, work, range(1000))
    assert len(begun) <= 2


def test_a_pool_with_one_free_thread_does_all_of_it() -> None:
    done = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(done.wait, 60)
        try:
            assert on_threads(pool, lambda item: -item, range(10)) == [-item for item in range(10)]
            assert not other.done()
        finally:
            done.set()


@pytest.mark.skipif(os.cpu_count() == 1, reason="needs two processors")
def test_two_threads_work_at_the_same_time() -> None:
    meeting = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        on_threads(pool, lambda _: meeting.wait(60), range(2))
