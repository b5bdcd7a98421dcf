"""The decorators of all CPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypeVar, cast

import numba
import numpy as np
from numba.core.registry import cpu_target

Int: TypeAlias = int | np.int64
"""An integer of a kernel. One that is passed on starts as `np.int64(0)`: numba compiles callees anew for a literal."""

F = TypeVar("F", bound=Callable[..., object])


def kernel(function: F) -> F:
    """Compile with numba: no GIL, cached on disk, IEEE arithmetic (no fastmath, so never a fused multiply-add).

    Compilation happens at the first call, for the argument types of that call; callers always pass the same types.
    Where numba finds no writable place for its cache (a read-only container) the kernel is compiled in each process.
    """
    try:
        compiled = numba.njit(function, nogil=True, cache=True, error_model="numpy")
    except RuntimeError:
        compiled = numba.njit(function, nogil=True, error_model="numpy")
    return cast(F, compiled)


def inlined(function: F) -> F:
    """A helper that is copied into each kernel that calls it, so that LLVM can vectorise around it."""
    return cast(F, numba.njit(function, inline="always", error_model="numpy"))


def compiles_for(*features: str) -> bool:
    """Whether numba compiles for a processor with these features, by LLVM's names, as it or NUMBA_CPU_FEATURES say."""
    _, _, found = cpu_target.target_context.codegen().magic_tuple()
    return {f"+{feature}" for feature in features} <= set(found.split(","))
