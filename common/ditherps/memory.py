"""How a process that moves models keeps its memory."""

from __future__ import annotations

import ctypes
import gc
import sys

# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_KEPT_BYTES = 256 << 20
_MOST_HEAPS = 2


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 256 MiB instead of giving each back to the kernel at once.

    A round frees and takes the same chunks and vectors again; fresh pages cost more than what is copied into them
    (`ditherps bench rounds` without this: an eighth more processor time). Threads share two heaps: what one has freed
    in a heap of its own is no room for another, and a server with many workers grows (`ditherps bench fleet`). Does
    nothing where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_KEPT_BYTES)
        mallopt(_M_ARENA_MAX, _MOST_HEAPS)


def keep_what_is_here() -> None:
    """What lives now, as long as the process does, is no longer looked at by the collector of cyclic garbage.

    Call it at the end of a start: torch and numba are half a million objects. CPython collects only once a quarter as
    many are new, and then looks at all of them; until then each refused RPC stays with its frames and messages, since
    gRPC's exception holds itself, and the look at all of them stops a server for a quarter of a second.
    """
    gc.collect()
    gc.freeze()
