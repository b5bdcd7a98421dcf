"""Work for the threads of a pool, in pieces too small to be handed over one by one."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_threads(pool: Executor | None, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`[work(item) for item in items]`, on the threads of `pool`, at most one a processor; here where there is none.

    Each thread takes its next item by itself. With `Executor.map` it wakes the caller after each one, which then wants
    the interpreter that the threads want: two of them lose a fifth of their gain on pieces of a third of a millisecond.

    Raises the error of the first item that has one, as a loop would; items behind it may have been worked on, too.
    """
    if pool is None or len(items) < 2:
        return [work(item) for item in items]
    left = deque(enumerate(items))  # its methods are atomic
    results: dict[int, Result] = {}
    errors: dict[int, BaseException] = {}

    def take() -> None:
        while left:
            try:
                place, item = left.popleft()
            except IndexError:
                return
            try:
                results[place] = work(item)
            except BaseException as error:
                errors[place] = error
                left.clear()

    first, *others = [pool.submit(take) for _ in range(min(len(items), _processors()))]
    try:
        first.result()
        for other in others:  # one that has not begun finds nothing any more
            if not other.cancel():
                other.result()
    finally:
        left.clear()
    if errors:
        raise errors[min(errors)]
    return [results[place] for place in range(len(items))]


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
