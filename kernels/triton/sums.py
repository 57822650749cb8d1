"""Sums over many Rademacher streams on the tensor cores: sum_k c[k] s(k, i) for all elements i of a tile.

Signs times coefficients is a matrix product whose left side is bits. IMMA takes int8, so a coefficient becomes four
signed digits of base 128 (26 bits and a sign, of the largest of its tensor; integer sums are exact, so the result is
within 2^-27 K max|c|, under what float32 additions lose) and a word of 32 signs becomes, by eight ANDs with 01010101 << i,
eight registers of four signs each: those of elements 8j + i, j = 0..3, with values 0 and 2^i.
The inner index runs over (stream, j); a block-diagonal right side, columns (digit, j), keeps the four j apart.

Every index falls into place without moving data. Lane 4b + q of a warp makes block b of streams q and q + 4; its four
words are rows b, b + 8, b + 16, b + 24 of the left side, which is what the lane must hold of it. Of the result it gets
columns (d, q) of the same rows: all digits of elements 32w + 8q + 0..7 of its words w, eight neighbours in memory.

Per 8 streams and weight: 1.4 instructions of Philox, 2 ANDs, 1 IMMA; element by element it is 34 (docs/triton.md).
"""

import triton
import triton.language as tl

from .noise import INTERPRET, RADEMACHER, words_of

STEP = tl.constexpr(8)  # streams a step
COLUMNS = tl.constexpr(16)  # n = (digit & 1) + 2 j + 8 (digit >> 1)
STEP_BYTES = tl.constexpr(512)  # of digits: 16 columns of 32


@triton.jit(do_not_specialize=["n_tensors", "n_streams", "n_steps"], do_not_specialize_on_alignment=["coeffs"])
def digits_kernel(coeffs, digits, totals, scales, n_tensors, n_streams, n_steps):
    """The right side for a tensor: int8 digits (steps, 16, 32), their totals int32 (16,) and the scale of its sums."""
    column = tl.program_id(0)
    largest = 0.0
    for first in range(0, n_streams, 32):
        stream = first + tl.arange(0, 32)
        some = tl.load(coeffs + stream * n_tensors + column, mask=stream < n_streams, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(some)))
    # 2^e <= largest < 2^(e+1); below 2^-100 there is nothing that float32 weights could show
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 27)
    unit = ((exponent - 25) << 23).to(tl.float32, bitcast=True)  # 2^(e - 25)
    inverse = ((279 - exponent) << 23).to(tl.float32, bitcast=True)  # exact; a float32 division may be off by 2 ulp
    tl.store(scales + column, unit)
    n = tl.arange(0, 16)
    digit, j = (n & 1) + 2 * (n >> 3), (n >> 1) & 3
    inner = tl.arange(0, 32)
    total = tl.zeros((16,), tl.int32)
    for step in range(n_steps):
        k = step * 8 + (inner >> 2)
        c = tl.load(coeffs + k * n_tensors + column, mask=k < n_streams, other=0.0) * inverse
        whole = tl.where(tl.abs(c) < 8388608.0, tl.floor(c + 0.5), c).to(tl.int32)
        value = tl.zeros((16, 32), tl.int32)
        for d in tl.static_range(4):
            low = ((whole + 64) & 127) - 64
            whole = (whole - low) >> 7
            value += tl.where((digit == d)[:, None] & (j[:, None] == (inner & 3)[None, :]), low[None, :], 0)
        total += tl.sum(value, axis=1)
        at = (column.to(tl.int64) * n_steps + step) * 512 + n[:, None] * 32 + inner[None, :]
        tl.store(digits + at, (value * 2).to(tl.int8))
    tl.store(totals + column * 16 + n, total)


@triton.jit
def _bits(words, I: tl.constexpr, ROWS: tl.constexpr):
    """Bit I of each byte, in its place: int8 (ROWS, 32) from each word four times, (ROWS, 32)."""
    if INTERPRET:
        byte = (8 * (tl.arange(0, 32) & 3))[None, :].to(tl.uint32)
        return ((words >> byte) & (1 << I)).to(tl.int32).to(tl.int8)
    # One AND makes four bytes. The word is there four times by join: of a broadcast Triton would take the AND out.
    MASK: tl.constexpr = 0x01010101 << I
    return tl.inline_asm_elementwise(
        f"and.b32 $0, $1, {MASK};", "=r,r,r,r,r", [words.to(tl.int32, bitcast=True)], tl.int8, is_pure=True, pack=4
    )


@triton.jit
def _value(sums, scale, ROWS: tl.constexpr):
    """float32 (ROWS, 4) from the digits' sums (ROWS, 16)."""
    low, high = tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, 4, 2)), (0, 2, 3, 1)))  # (ROWS, 4, 2): digits 0, 1; 2, 3
    d0, d1 = tl.split(low)
    d2, d3 = tl.split(high)
    return tl.fma((d3 * 128 + d2).to(tl.float32), scale * 16384.0, (d1 * 128 + d0).to(tl.float32) * scale)


@triton.jit
def _four_streams(first, tensor_id, k, streams, n_streams, lanes, k0, k1):
    """Words (BLOCKS, 4, 2, 2) of streams k to k + 3: four at a time is what gives each lane the stream it needs."""
    k += tl.arange(0, 4)
    stream = tl.load(streams + k, mask=k < n_streams, other=0).to(tl.uint32)[None, :]
    w0, w1, w2, w3 = words_of(first >> 7, RADEMACHER, lanes, tensor_id, stream, k0, k1)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def _step(
    step, first, tensor_id, streams, n_streams, lanes, right, k0, k1, a0, a1, a2, a3, a4, a5, a6, a7, ROWS: tl.constexpr
):
    """Adds eight streams to the sums of the eight bit places."""
    low = _four_streams(first, tensor_id, step * 8, streams, n_streams, lanes, k0, k1)
    high = _four_streams(first, tensor_id, step * 8 + 4, streams, n_streams, lanes, k0, k1)
    words = tl.permute(tl.join(low, high), (2, 3, 0, 4, 1))  # (word, word, block, low or high, stream)
    twice = tl.join(tl.reshape(words, (ROWS, 8)), tl.reshape(words, (ROWS, 8)))
    words = tl.reshape(tl.join(twice, twice), (ROWS, 32))
    b = tl.trans(tl.load(right + step * 512))
    a0 = tl.dot(_bits(words, 0, ROWS), b, a0, out_dtype=tl.int32)
    a1 = tl.dot(_bits(words, 1, ROWS), b, a1, out_dtype=tl.int32)
    a2 = tl.dot(_bits(words, 2, ROWS), b, a2, out_dtype=tl.int32)
    a3 = tl.dot(_bits(words, 3, ROWS), b, a3, out_dtype=tl.int32)
    a4 = tl.dot(_bits(words, 4, ROWS), b, a4, out_dtype=tl.int32)
    a5 = tl.dot(_bits(words, 5, ROWS), b, a5, out_dtype=tl.int32)
    a6 = tl.dot(_bits(words, 6, ROWS), b, a6, out_dtype=tl.int32)
    a7 = tl.dot(_bits(words, 7, ROWS), b, a7, out_dtype=tl.int32)
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def weighted_signs(
    first, tensor_id, column, streams, digits, totals, scales, n_streams, n_steps, k0, k1, BLOCKS: tl.constexpr
):
    """sum_k c[k] s(k, i), float32 (4, BLOCKS, 32), of a Rademacher tile whose first element has index ``first``."""
    ROWS: tl.constexpr = 4 * BLOCKS
    n = tl.arange(0, 16)
    total = tl.broadcast_to(tl.load(totals + column * 16 + n)[None, :], (ROWS, 16))
    a0, a1, a2, a3 = -total, -2 * total, -4 * total, -8 * total
    a4, a5, a6, a7 = -16 * total, -32 * total, -64 * total, 128 * total  # a byte with bit 7 is -128
    lanes = tl.arange(0, BLOCKS).to(tl.uint32)[:, None]
    right = digits + column * n_steps * 512 + tl.arange(0, 16)[:, None] * 32 + tl.arange(0, 32)[None, :]
    # The first step apart: a loop that may run no time costs a copy of all 128 sums.
    a0, a1, a2, a3, a4, a5, a6, a7 = _step(
        0, first, tensor_id, streams, n_streams, lanes, right, k0, k1, a0, a1, a2, a3, a4, a5, a6, a7, ROWS
    )
    for step in range(1, n_steps):
        a0, a1, a2, a3, a4, a5, a6, a7 = _step(
            step, first, tensor_id, streams, n_streams, lanes, right, k0, k1, a0, a1, a2, a3, a4, a5, a6, a7, ROWS
        )
    scale = tl.load(scales + column)
    y0, y1 = _value(a0, scale, ROWS), _value(a1, scale * 0.5, ROWS)
    y2, y3 = _value(a2, scale * 0.25, ROWS), _value(a3, scale * 0.125, ROWS)
    y4, y5 = _value(a4, scale * 0.0625, ROWS), _value(a5, scale * 0.03125, ROWS)
    y6, y7 = _value(a6, scale * 0.015625, ROWS), _value(a7, scale * -0.0078125, ROWS)
    even = tl.join(
        tl.join(y0, y4), tl.join(y2, y6)
    )  # (ROWS, 4, 2, 2): the last axis is bit 1 of i, the one before bit 2
    odd = tl.join(tl.join(y1, y5), tl.join(y3, y7))
    return tl.reshape(tl.join(even, odd), (4, BLOCKS, 32))
