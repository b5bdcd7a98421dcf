"""Asking for memory before it is needed: the one thing that numba has no word for.

Reading a vector for the first time costs a core about as much as computing its dither, and the two overlap only where
the reads are asked for early. `prefetch` is LLVM's generic `llvm.prefetch`, a hint on every processor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

LINE = 16  # float32 values in a cache line


def _prefetch(typing_context: Any, array: Any, index: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = context.make_array(signature.args[0])(context, builder, arguments[0])
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        address = builder.bitcast(builder.gep(memory.data, [arguments[1]]), byte)
        hint = builder.module.globals.get("llvm.prefetch.p0") or ir.Function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, word, word, word]), "llvm.prefetch.p0"
        )
        read, keep, data = (ir.Constant(word, value) for value in (0, 2, 1))
        builder.call(hint, [address, read, keep, data])
        return context.get_dummy_value()

    return types.void(array, index), generate


prefetch = cast(Callable[[NDArray[np.float32], int], None], intrinsic(_prefetch))
"""Ask for the cache line that holds `array[index]`; the index is not checked."""
