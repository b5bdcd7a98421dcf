"""Sixteen 32-bit integers as one value in a kernel, for loops that LLVM cannot vectorise by itself.

A vector comes from `load`, `gather` or `same`; `+ - * & | ^ << >> == < >=` work lane by lane, unsigned, with a vector
or an integer at the right, and a comparison yields a mask. Each function is an instruction or two of AVX-512 without a
branch, on a type of LLVM's own: it stays in a register like any other local variable.

They compile where `WIDE` says so and nowhere else, so each kernel that uses them has another way, to the same bits.
Neither loads nor stores look at an array's length.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model
from numpy.typing import NDArray

from ditherps.kernels.jit import Int, compiles_for

WIDE = compiles_for("avx512f", "avx512bw", "avx512dq", "avx512vl")
"""Whether numba compiles for a processor with vectors of 512 bits."""

WIDTH = 16

Vector: TypeAlias = Any
"""Sixteen unsigned 32-bit integers."""

Mask: TypeAlias = Any
"""Sixteen truth values."""

_WORD, _BYTE = ir.IntType(32), ir.IntType(8)
_WORDS, _FLOATS, _BITS = (ir.VectorType(of, WIDTH) for of in (_WORD, ir.FloatType(), ir.IntType(1)))


class _Lanes(types.Type):
    """Numba's type of what has sixteen lanes; `form` is LLVM's."""

    def __init__(self, name: str, form: Any) -> None:
        super().__init__(name=name)
        self.form = form


_VECTOR, _MASK = _Lanes("Vector", _WORDS), _Lanes("Mask", _BITS)


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: _Lanes) -> None:
        super().__init__(manager, type_, type_.form)  # type: ignore[no-untyped-call]


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call one of LLVM's own functions."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, arguments)


def _splat(builder: Any, value: Any) -> Any:
    """A 32-bit scalar in every lane."""
    undefined = ir.Constant(_WORDS, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_WORDS, [0] * WIDTH))


def _function(result: Any, *operands: _Lanes) -> Callable[[Callable[..., Any]], Any]:
    """A function for kernels out of one that emits its instructions: `emit(builder, *operands)`."""

    def made(emit: Callable[..., Any]) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return emit(builder, *arguments)

        def typed(*given: Any) -> Any:
            return (result(*given), generate) if given == operands else None

        # Numba wants to see how many arguments there are.
        forms: dict[int, Any] = {
            1: lambda typing_context, a: typed(a),
            2: lambda typing_context, a, b: typed(a, b),
            3: lambda typing_context, a, b, c: typed(a, b, c),
        }
        chosen = forms[len(operands)]
        chosen.__name__, chosen.__doc__ = emit.__name__, emit.__doc__
        return intrinsic(chosen)

    return made


# --- vectors from and to arrays ---------------------------------------------------------------------------------------


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


@intrinsic
def _load(typing_context: Any, array: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        item = ir.IntType(array.dtype.bitwidth)
        form = ir.VectorType(item, WIDTH)
        address = _address(context, builder, signature.args[0], *arguments)
        value = builder.load(builder.bitcast(address, form.as_pointer()), align=item.width // 8)
        if item.width == _WORD.width:
            return value
        return builder.zext(value, _WORDS) if item.width < _WORD.width else builder.trunc(value, _WORDS)

    return _VECTOR(array, index), generate


@intrinsic
def _store(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        item = ir.IntType(array.dtype.bitwidth)
        form = ir.VectorType(item, WIDTH)
        address = _address(context, builder, signature.args[0], *arguments[:2])
        kept = arguments[2]
        if item.width != _WORD.width:
            kept = builder.trunc(kept, form) if item.width < _WORD.width else builder.zext(kept, form)
        builder.store(kept, builder.bitcast(address, form.as_pointer()), align=item.width // 8)
        return context.get_dummy_value()

    return types.void(array, index, value), generate


@intrinsic
def _gather(typing_context: Any, array: Any, places: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        none, every = ir.Constant(_WORDS, [0] * WIDTH), ir.Constant(_BITS, [1] * WIDTH)
        base = builder.bitcast(first, _BYTE.as_pointer())
        name = "llvm.x86.avx512.mask.gather.dpi.512"
        return _call(builder, name, _WORDS, none, base, arguments[1], every, ir.Constant(_WORD, 4))

    return (_VECTOR(array, places), generate) if array.dtype.bitwidth == _WORD.width else None


@intrinsic
def _same(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _splat(builder, context.cast(builder, arguments[0], value, types.uint32))

    return (_VECTOR(value), generate) if isinstance(value, types.Integer) else None


load = cast(Callable[[NDArray[Any], Int], Vector], _load)
"""`array[index : index + 16]`, integers of any width: their lower 32 bits."""

store = cast(Callable[[NDArray[Any], Int, Vector], None], _store)
"""Write the lanes, cut or widened to the array's integers, to `array[index : index + 16]`."""

gather = cast(Callable[[NDArray[np.uint32], Vector], Vector], _gather)
"""`array[place]` for the sixteen places."""

same = cast(Callable[[Int], Vector], _same)
"""An integer in every lane."""


# --- lane by lane -----------------------------------------------------------------------------------------------------


def _operate(symbol: Callable[..., Any], result: _Lanes, emit: Callable[..., Any]) -> None:
    lanes = _function(result, _VECTOR, _VECTOR)(emit)

    @overload(symbol, strict=False)
    def operate(left: Any, right: Any) -> Any:
        if left == _VECTOR and right == _VECTOR:
            return lambda left, right: lanes(left, right)
        if left == _VECTOR and isinstance(right, types.Integer):
            return lambda left, right: lanes(left, same(right))
        return None


_operate(operator.add, _VECTOR, lambda builder, left, right: builder.add(left, right))
_operate(operator.sub, _VECTOR, lambda builder, left, right: builder.sub(left, right))
_operate(operator.mul, _VECTOR, lambda builder, left, right: builder.mul(left, right))
_operate(operator.and_, _VECTOR, lambda builder, left, right: builder.and_(left, right))
_operate(operator.or_, _VECTOR, lambda builder, left, right: builder.or_(left, right))
_operate(operator.xor, _VECTOR, lambda builder, left, right: builder.xor(left, right))
_operate(operator.lshift, _VECTOR, lambda builder, left, right: builder.shl(left, right))
_operate(operator.rshift, _VECTOR, lambda builder, left, right: builder.lshr(left, right))
_operate(operator.eq, _MASK, lambda builder, left, right: builder.icmp_unsigned("==", left, right))
_operate(operator.lt, _MASK, lambda builder, left, right: builder.icmp_unsigned("<", left, right))
_operate(operator.ge, _MASK, lambda builder, left, right: builder.icmp_unsigned(">=", left, right))


@_function(_VECTOR, _VECTOR, _VECTOR)
def least(builder: Any, left: Any, right: Any) -> Any:
    """The smaller of two in each lane."""
    return _call(builder, "llvm.umin.v16i32", _WORDS, left, right)


@_function(_VECTOR, _MASK, _VECTOR, _VECTOR)
def select(builder: Any, mask: Any, then: Any, otherwise: Any) -> Any:
    """`then` where the mask is set."""
    return builder.select(mask, then, otherwise)


@_function(_VECTOR, _VECTOR, _VECTOR)
def quotient(builder: Any, value: Any, divisor: Any) -> Any:
    """floor(value / divisor) or 1 less, for values below 2^31, divisors from 1 to 2^24 and quotients below 2^19.

    Three roundings of float32 each err by 2^-24 of the value at most; the factor 1 - 2^-22 makes sure that none leads
    above, and takes less than a quarter.
    """
    lowered = ir.Constant(_FLOATS, [1 - 2.0**-22] * WIDTH)
    inverse = builder.fdiv(lowered, builder.sitofp(divisor, _FLOATS))
    return builder.fptosi(builder.fmul(builder.sitofp(value, _FLOATS), inverse), _WORDS)


# --- across lanes -----------------------------------------------------------------------------------------------------


@_function(_VECTOR, _VECTOR, _VECTOR)
def pick(builder: Any, table: Any, places: Any) -> Any:
    """`table[place % 16]` for the sixteen places."""
    return _call(builder, "llvm.x86.avx512.permvar.si.512", _WORDS, table, places)


@_function(_VECTOR, _VECTOR, _VECTOR, _VECTOR)
def pick_of_two(builder: Any, low: Any, high: Any, places: Any) -> Any:
    """`pick` from a table of 32 lanes, `places % 32`."""
    return _call(builder, "llvm.x86.avx512.vpermi2var.d.512", _WORDS, low, places, high)


@_function(_VECTOR, _VECTOR, _MASK)
def expand(builder: Any, packed: Any, mask: Any) -> Any:
    """The first lanes of `packed`, in order, where the mask is set, zeros elsewhere."""
    none = ir.Constant(_WORDS, [0] * WIDTH)
    return _call(builder, "llvm.x86.avx512.mask.expand.v16i32", _WORDS, packed, none, mask)


@_function(_VECTOR, _VECTOR, _MASK)
def compress(builder: Any, value: Any, mask: Any) -> Any:
    """The lanes where the mask is set, in order, then zeros."""
    none = ir.Constant(_WORDS, [0] * WIDTH)
    return _call(builder, "llvm.x86.avx512.mask.compress.v16i32", _WORDS, value, none, mask)


@_function(types.int64, _MASK)
def count_set(builder: Any, mask: Any) -> Any:
    """How many lanes are set."""
    half = ir.IntType(WIDTH)
    bits = _call(builder, "llvm.ctpop.i16", half, builder.bitcast(mask, half))
    return builder.zext(bits, ir.IntType(64))
