"""Everything that loops over coordinates: numba kernels for the CPU, and the slow readable `reference`."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numba
from llvmlite.binding import get_host_cpu_name

if TYPE_CHECKING:
    from ditherps.codecs import Codec

_FOLDER = Path(__file__).parent
# Numba's (NUMBA_CACHE_DIR, else beside the kernels), so that what is noted there goes when the cache does.
_CACHE = Path(os.environ.get("NUMBA_CACHE_DIR") or _FOLDER / "__pycache__")


def warm(codec: Codec) -> None:
    """Compile or load from the cache what `codec` needs, by encoding and accumulating in each role.

    Of the processes of this machine one compiles at a time; the others wait, and then find its work in the cache.
    """
    newest = max(path.stat().st_mtime_ns for path in _FOLDER.glob("*.py"))
    key = f"{numba.__version__} {get_host_cpu_name()} {newest} {codec!r}\n"
    try:
        _CACHE.mkdir(parents=True, exist_ok=True)
        with (_CACHE / "warm").open("a+") as done:
            done.seek(0)
            if key not in done.readlines():
                fcntl.flock(done, fcntl.LOCK_EX)
                _use(codec)
                done.write(key)
                return
    except OSError:
        pass  # no place for a cache: every process compiles for itself
    _use(codec)


def _use(codec: Codec) -> None:
    import torch

    from ditherps.dither import Address, Domain

    address = Address(seed=0, round=0, sender=0, domain=Domain.UPDATE)
    few = torch.zeros(16384)  # a vector that is worth coding, and one that is not
    few[::7] = 1.0
    for vector in (torch.ones(1), few):
        for role in codec.roles:
            used = codec.for_role(role)
            side = vector if used.needs_side_information else None
            encoded = used.encode(vector, address)
            used.accumulate(encoded, address, vector.clone(), 1.0, side_information=side)
