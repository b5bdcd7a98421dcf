"""Randomized Hadamard transform (Ailon and Chazelle, STOC 2006): an orthonormal rotation by additions alone.

A block of m coordinates is rotated by R = H D / sqrt(m) where m is a power of two: D flips signs by shared randomness,
H is the Hadamard matrix in natural order. Else let p be the largest power of two below m: the first p coordinates are
rotated so, then the last p, with other signs. Nothing is padded, so nothing more than m coordinates travels.

The sign of flat coordinate f (`start` + its place in the vector) is bit f / 4096 % 16 of a 16-bit lane, that of flat
coordinate f / 65536 * 4096 + f % 4096: one tile of lanes serves sixteen tiles of coordinates. The second signs begin
2^34 lanes further on.

Arithmetic is IEEE without contraction and each output's additions have a fixed order: the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from ditherps.kernels.cpu import largest_bits
from ditherps.kernels.jit import Int, kernel
from ditherps.kernels.philox import TILE, Stream, philox_tile

LARGEST_INPUT = 2.0**72  # what may be rotated
LARGEST_ROTATED = 2.0**96  # what may be rotated back: blocks below 2^20 stay within float32
_ROTATED_BITS = int(np.float32(LARGEST_ROTATED).view(np.int32))
SECOND = 1 << 22  # tiles of lanes before the second signs

_ROW = 16
_ROWS = 4


def _transform64(typing_context: Any, array: Any, index: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = context.make_array(signature.args[0])(context, builder, arguments[0])
        vector, word = ir.VectorType(ir.FloatType(), _ROW), ir.IntType(32)
        first = builder.gep(memory.data, [arguments[1]])
        places = [
            builder.bitcast(builder.gep(first, [ir.Constant(word, _ROW * row)]), vector.as_pointer())
            for row in range(_ROWS)
        ]
        rows = [builder.load(place, align=4) for place in places]
        for stride in (1, 2, 4, 8):
            partner = ir.Constant(ir.VectorType(word, _ROW), [i ^ stride for i in range(_ROW)])
            signs = ir.Constant(vector, [-1.0 if i & stride else 1.0 for i in range(_ROW)])
            rows = [builder.fadd(builder.shuffle_vector(r, r, partner), builder.fmul(r, signs)) for r in rows]
        for stride in (1, 2):
            rows = [
                builder.fsub(rows[r ^ stride], rows[r]) if r & stride else builder.fadd(rows[r], rows[r ^ stride])
                for r in range(_ROWS)
            ]
        for row, place in zip(rows, places, strict=True):
            builder.store(row, place, align=4)
        return context.get_dummy_value()

    return types.void(array, index), generate


transform64 = cast(Callable[[NDArray[np.float32], Int], None], intrinsic(_transform64))
"""H of `array[index : index + 64]` in place, in vectors of 16: numba has no word for strides below a vector."""


@kernel
def _transform_small(x: NDArray[np.float32], lo: Int, size: Int) -> None:
    """`transform` for fewer than 64 coordinates."""
    stride = 1
    while stride < size:
        for i in range(size):
            if i & stride == 0:
                a, b = x[lo + i], x[lo + i + stride]
                x[lo + i], x[lo + i + stride] = a + b, a - b
        stride *= 2


@kernel
def _strides(x: NDArray[np.float32], lo: Int, size: Int, stride: Int) -> None:
    """The stages of H from this stride on, two at a time: of x[lo : lo + size] in place."""
    while 4 * stride <= size:
        for base in range(lo, lo + size, 4 * stride):
            w, x_, y, z = (
                x[base : base + stride],
                x[base + stride : base + 2 * stride],
                x[base + 2 * stride : base + 3 * stride],
                x[base + 3 * stride : base + 4 * stride],
            )
            for i in range(stride):
                a, b, c, d = w[i] + x_[i], w[i] - x_[i], y[i] + z[i], y[i] - z[i]
                w[i] = a + c
                x_[i] = b + d
                y[i] = a - c
                z[i] = b - d
        stride *= 4
    if 2 * stride == size:
        w, x_ = x[lo : lo + stride], x[lo + stride : lo + size]
        for i in range(stride):
            a, b = w[i], x_[i]
            w[i] = a + b
            x_[i] = a - b


@kernel
def _transform_tile(x: NDArray[np.float32], lo: Int, size: Int) -> None:
    """`transform` for at most a tile, which the L1 cache holds."""
    if size < _ROW * _ROWS:
        _transform_small(x, lo, size)
        return
    for i in range(lo, lo + size, _ROW * _ROWS):
        transform64(x, i)
    _strides(x, lo, size, np.int64(_ROW * _ROWS))


@kernel
def transform(x: NDArray[np.float32], lo: Int, size: Int) -> None:
    """x[lo : lo + size] = H x[lo : lo + size], not scaled; size a power of two."""
    width = min(size, TILE)
    for tile in range(lo, lo + size, width):
        _transform_tile(x, tile, width)
    _strides(x, lo, size, np.int64(TILE))


@kernel
def power_below(count: Int) -> Int:
    """The largest power of two that is at most `count`; 0 for 0."""
    size = np.int64(count > 0)
    while 2 * size <= count:
        size *= 2
    return size


@kernel
def fill_signs(
    stream: Stream,
    offset: Int,
    count: Int,
    second: Int,
    scale: np.float32,
    current: Int,
    lanes: NDArray[np.uint16],
    signs: NDArray[np.float32],
    sign_bits: NDArray[np.int32],
) -> Int:
    """signs[:count] = scale or -scale by the signs of the coordinates from `offset` on; count at most a tile.

    `sign_bits` is the memory of `signs`. `lanes` holds the lanes of tile `current` (-1: of none), and afterwards those
    of the tile that is returned.
    """
    position = stream[5] + offset
    signs[0] = scale
    bits, top = sign_bits[0], np.int32(-(2**31))
    done: Int = np.int64(0)
    while done < count:
        inside = position % TILE
        n = min(TILE - inside, count - done)
        tile = position // (16 * TILE) + second
        if tile != current:
            philox_tile(stream, tile, lanes, signs, signs.size)
            current = tile
        up = np.int32(31 - position // TILE % 16)
        random, part = lanes[inside : inside + n], sign_bits[done : done + n]
        for i in range(n):
            part[i] = bits ^ ((np.int32(random[i]) << up) & top)
        position += n
        done += n
    return current


@kernel
def _flip(
    x: NDArray[np.float32],
    lo: Int,
    count: Int,
    stream: Stream,
    offset: Int,
    second: Int,
    scale: np.float32,
    lanes: NDArray[np.uint16],
    signs: NDArray[np.float32],
    sign_bits: NDArray[np.int32],
) -> None:
    """x[lo : lo + count] *= the scaled signs from `offset` on."""
    current: Int = np.int64(-1)
    for tile in range(0, count, TILE):
        n = min(TILE, count - tile)
        current = fill_signs(stream, offset + tile, n, second, scale, current, lanes, signs, sign_bits)
        part = x[lo + tile : lo + tile + n]
        for i in range(n):
            part[i] *= signs[i]


@kernel
def _scale(size: Int) -> np.float32:
    """1 / sqrt(size)."""
    return np.float32(1.0 / np.sqrt(np.float64(size)))


@kernel
def rotate(
    x: NDArray[np.float32],
    lo: Int,
    hi: Int,
    stream: Stream,
    offset: Int,
    lanes: NDArray[np.uint16],
    signs: NDArray[np.float32],
    sign_bits: NDArray[np.int32],
    out: NDArray[np.float32],
    at: Int,
) -> None:
    """Rotate the block x[lo:hi] to `out[at:]`, which is other memory.

    Args:
        x: finite values up to `LARGEST_INPUT`.
        lo, hi: of the block.
        stream: of the signs.
        offset: of coordinate x[lo] in the stream.
        lanes, signs: room for a tile each; `sign_bits` is the memory of `signs`.
        out: float32.
        at: where the rotated block begins in it.
    """
    count = hi - lo
    size = power_below(count)
    rest = count - size
    scale = _scale(size)
    width = min(size, TILE)
    current: Int = np.int64(-1)
    for tile in range(0, size, width):
        current = fill_signs(stream, offset + tile, width, np.int64(0), scale, current, lanes, signs, sign_bits)
        given, taken = x[lo + tile : lo + tile + width], out[at + tile : at + tile + width]
        for i in range(width):
            taken[i] = given[i] * signs[i]
        _transform_tile(out, at + tile, width)
    _strides(out, at, size, np.int64(TILE))
    if rest:
        given, taken = x[lo + size : hi], out[at + size : at + count]
        for i in range(rest):
            taken[i] = given[i]
        _flip(out, at + rest, size, stream, offset + rest, np.int64(SECOND), scale, lanes, signs, sign_bits)
        transform(out, at + rest, size)


@kernel
def rotate_vector(
    x: NDArray[np.float32],
    block: Int,
    stream: Stream,
    lanes: NDArray[np.uint16],
    signs: NDArray[np.float32],
    sign_bits: NDArray[np.int32],
    out: NDArray[np.float32],
) -> None:
    """out = the rotation of x, block by block; `out` is other memory."""
    for lo in range(0, x.size, block):
        rotate(x, lo, min(lo + block, x.size), stream, lo, lanes, signs, sign_bits, out, lo)


@kernel
def add_rotated_back(
    x: NDArray[np.float32],
    bits: NDArray[np.int32],
    at: Int,
    count: Int,
    stream: Stream,
    offset: Int,
    lanes: NDArray[np.uint16],
    signs: NDArray[np.float32],
    sign_bits: NDArray[np.int32],
    weight: np.float32,
    into: NDArray[np.float32],
    lo: Int,
) -> None:
    """into[lo : lo + count] += weight times the block of which x[at : at + count] is the rotation; x is overwritten.

    `bits` is the memory of x. Values beyond `LARGEST_ROTATED`, which no encoder sends, are cut off there: everything
    stays finite.
    """
    if largest_bits(bits, at, at + count) > _ROTATED_BITS:
        limit = np.float32(LARGEST_ROTATED)
        for i in range(at, at + count):
            x[i] = min(max(x[i], -limit), limit)
    size = power_below(count)
    rest = count - size
    scale = _scale(size)
    if rest:
        transform(x, at + rest, size)
        _flip(x, at + rest, size, stream, offset + rest, np.int64(SECOND), scale, lanes, signs, sign_bits)
        target, source = into[lo + size : lo + count], x[at + size : at + count]
        for i in range(rest):
            target[i] += weight * source[i]
    transform(x, at, size)
    current: Int = np.int64(-1)
    for tile in range(0, size, TILE):
        n = min(TILE, size - tile)
        current = fill_signs(stream, offset + tile, n, np.int64(0), scale, current, lanes, signs, sign_bits)
        target, source = into[lo + tile : lo + tile + n], x[at + tile : at + tile + n]
        for i in range(n):
            target[i] += weight * (source[i] * signs[i])
