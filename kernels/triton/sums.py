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

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl

from .launch import assembly, kernel, launch
from .noise import RADEMACHER, in_order, words_of


@kernel(warps=1)
def digits_kernel(coeffs, digits, words, reals, n_tensors, n_streams, n_steps):
    """The right side for a tensor: int8 digits (steps, 16, 32), their totals, words of int32 (16,), and a value, the unit of its sums.

    Column n of the 16 has digit (n & 1) + 2 (n >> 3) of the elements 8j + i with j = (n >> 1) & 3.
    """
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
    tl.store(reals + column, unit)
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
    tl.store(words + column * 16 + n, total)


def digits_of(coeffs: Tensor) -> dict[str, Any]:
    """The digits of coefficients (K, T) of at least one stream, as kernels that sum signs take them."""
    k, count = coeffs.shape
    steps = -(-k // 8)
    made = {
        "digits": torch.empty(count * steps * 512, dtype=torch.int8, device=coeffs.device),
        "words": torch.empty(count * 16, dtype=torch.int32, device=coeffs.device),
        "reals": torch.empty(count, dtype=torch.float32, device=coeffs.device),
        "n_steps": steps,
    }
    launch(digits_kernel, count, coeffs=coeffs, **made, n_tensors=count, n_streams=k)
    return made


@triton.jit
def _bits(words, I: tl.constexpr):
    """Bit I of each byte, in its place: int8 from words that are there four times side by side, once for each byte."""
    if not assembly():
        byte = (8 * (tl.arange(0, 32) & 3))[None, :].to(tl.uint32)
        return ((words >> byte) & (1 << I)).to(tl.int32).to(tl.int8)
    # One AND makes four bytes. The word is there four times by join: of a broadcast Triton would take the AND out.
    MASK: tl.constexpr = 0x01010101 << I
    return tl.inline_asm_elementwise(
        f"and.b32 $0, $1, {MASK};", "=r,r,r,r,r", [words.to(tl.int32, bitcast=True)], tl.int8, is_pure=True, pack=4
    )


@triton.jit
def _value(sums, unit, ROWS: tl.constexpr):
    """float32 (ROWS, 4) from the digits' sums (ROWS, 16)."""
    low, high = tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, 4, 2)), (0, 2, 3, 1)))  # (ROWS, 4, 2): digits 0, 1; 2, 3
    d0, d1 = tl.split(low)
    d2, d3 = tl.split(high)
    return tl.fma((d3 * 128 + d2).to(tl.float32), unit * 16384.0, (d1 * 128 + d0).to(tl.float32) * unit)


@triton.jit
def _four_streams(k, key, call, lanes):
    """Words (BLOCKS, 4, 2, 2) of streams k to k + 3: four at a time is what gives each lane the stream it needs."""
    k += tl.arange(0, 4)
    stream = tl.load(call.streams + k, mask=k < call.n_streams, other=0).to(tl.uint32)[None, :]
    w0, w1, w2, w3 = words_of(key, stream, lanes, RADEMACHER, 7)
    return in_order(w0, w1, w2, w3)


@triton.jit
def _step(step, sums, key, call, lanes, right, ROWS: tl.constexpr):
    """Adds eight streams to the sums of the eight bit places."""
    low = _four_streams(step * 8, key, call, lanes)
    high = _four_streams(step * 8 + 4, key, call, lanes)
    words = tl.permute(tl.join(low, high), (2, 3, 0, 4, 1))  # (word, word, block, low or high, stream)
    twice = tl.join(tl.reshape(words, (ROWS, 8)), tl.reshape(words, (ROWS, 8)))
    words = tl.reshape(tl.join(twice, twice), (ROWS, 32))
    b = tl.trans(tl.load(right + step * 512))
    a0, a1, a2, a3, a4, a5, a6, a7 = sums
    a0 = tl.dot(_bits(words, 0), b, a0, out_dtype=tl.int32)
    a1 = tl.dot(_bits(words, 1), b, a1, out_dtype=tl.int32)
    a2 = tl.dot(_bits(words, 2), b, a2, out_dtype=tl.int32)
    a3 = tl.dot(_bits(words, 3), b, a3, out_dtype=tl.int32)
    a4 = tl.dot(_bits(words, 4), b, a4, out_dtype=tl.int32)
    a5 = tl.dot(_bits(words, 5), b, a5, out_dtype=tl.int32)
    a6 = tl.dot(_bits(words, 6), b, a6, out_dtype=tl.int32)
    a7 = tl.dot(_bits(words, 7), b, a7, out_dtype=tl.int32)
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def weighted_signs(key, column, call, BLOCKS: tl.constexpr):
    """sum_k c[k] s(k, i), float32 (4, BLOCKS, 32), of a Rademacher tile."""
    ROWS: tl.constexpr = 4 * BLOCKS
    made = call.made
    n = tl.arange(0, 16)
    total = tl.broadcast_to(tl.load(made.words + column * 16 + n)[None, :], (ROWS, 16))
    # What bits count less twice what signs do: a set bit is 2^i in its byte, and bit 7 of a byte is -128.
    sums = (-total, -2 * total, -4 * total, -8 * total, -16 * total, -32 * total, -64 * total, 128 * total)
    lanes = tl.arange(0, BLOCKS).to(tl.uint32)[:, None]
    right = tl.multiple_of(made.digits + column * made.n_steps * 512, 16)
    right = right + tl.arange(0, 16)[:, None] * 32 + tl.arange(0, 32)[None, :]
    # The first step apart: a loop that may run no time costs a copy of all 128 sums.
    sums = _step(0, sums, key, call, lanes, right, ROWS)
    for step in range(1, made.n_steps):
        sums = _step(step, sums, key, call, lanes, right, ROWS)
    a0, a1, a2, a3, a4, a5, a6, a7 = sums
    unit = tl.load(made.reals + column)
    y0, y1 = _value(a0, unit, ROWS), _value(a1, unit * 0.5, ROWS)
    y2, y3 = _value(a2, unit * 0.25, ROWS), _value(a3, unit * 0.125, ROWS)
    y4, y5 = _value(a4, unit * 0.0625, ROWS), _value(a5, unit * 0.03125, ROWS)
    y6, y7 = _value(a6, unit * 0.015625, ROWS), _value(a7, unit * -0.0078125, ROWS)
    # Elements 8j + i of a row: bit 2 of i is the first of the new axes, bit 1 the second, bit 0 the last.
    even, odd = in_order(y0, y2, y4, y6), in_order(y1, y3, y5, y7)
    return tl.reshape(tl.join(even, odd), (4, BLOCKS, 32))
