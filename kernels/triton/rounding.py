"""From float32 results to what is stored: rounding to 16 bits, saturation, residuals, as Triton device functions.

A whole tile whose results are all numbers in the range is rounded and stored at once (``within`` says whether it is).
``store_by_definition`` takes any tile, element by element as docs/noise.md defines the results.
"""

import triton
import triton.language as tl

from .launch import INTERPRET, assembly
from .noise import ROUNDING, in_order, words_of
from .residuals import split_residual

_LIMITS = {tl.float32: 3.4028234663852886e38, tl.bfloat16: 3.3895313892515355e38, tl.float16: 65504.0}


@triton.constexpr_function
def limit_of(dtype):
    """The largest number of a dtype."""
    return _LIMITS[dtype]


@triton.jit
def rounding_bits(key, update, A: tl.constexpr, B: tl.constexpr):
    """16 random bits of stream ``update`` for each element of a tile (A, B, 32), as uint32."""
    a = tl.arange(0, A) * 4
    b = tl.arange(0, B) * (4 * A)
    lanes = a[:, None, None] + b[None, :, None] + tl.arange(0, 4)[None, None, :]
    w0, w1, w2, w3 = words_of(key, update, lanes.to(tl.uint32), ROUNDING, 3)
    words = in_order(w0, w1, w2, w3)
    if assembly():  # otherwise ptxas takes some halves from the products and puts them together again
        words = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [words], tl.uint32, is_pure=True, pack=1)
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (A, B, 32))


@triton.jit
def round_to(x, random, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Round float32 ``x`` to DTYPE: nearest, ties to even, or up with the probability of what truncation drops.

    ``random``: 16 bits an element. Infinities and NaN pass where rounding is to nearest; stochastic rounding is
    right for finite x only, whose caller keeps the others.
    """
    b = x.to(tl.uint32, bitcast=True)
    if tl.float32 == DTYPE:
        return x
    elif tl.bfloat16 == DTYPE:
        if STOCHASTIC:
            b = (b + random) >> 16
        elif INTERPRET:
            nearest = (b + 0x7FFF + ((b >> 16) & 1)) >> 16
            b = tl.where(x == x, nearest, (b >> 16) | 0x40)
        else:
            return x.to(tl.bfloat16)
        return b.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        if not STOCHASTIC:
            return x.to(tl.float16)
        magnitude = b & 0x7FFFFFFF
        normal = ((magnitude + (random >> 3)) >> 13) - (112 << 10)
        # below 2^-14, in units of 2^-40: the top 16 of the bits that a subnormal result drops
        small = tl.minimum(tl.abs(x), 2.0**-14)
        units = (small * 1099511627776.0).to(tl.int32).to(tl.uint32, bitcast=True)
        b = tl.where(magnitude < 0x38800000, (units + random) >> 16, normal) | ((b >> 16) & 0x8000)
        return b.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def within(x, LIMIT: tl.constexpr, ROWS: tl.constexpr):
    """Whether |x| <= LIMIT everywhere; false for NaN.

    Where all are below 2, as most weights are, bit 30 of none is set: one OR for two elements, then one REDUX a warp, say so.
    """
    if INTERPRET:
        return tl.min((tl.abs(x) <= LIMIT).to(tl.int32)) != 0
    ordinary = (tl.reduce(tl.reshape(x.to(tl.int32, bitcast=True), (ROWS * 32,)), 0, _or) & 0x40000000) == 0
    if not ordinary:
        # As integers, patterns of floats that are not negative have the same order, and NaN is above all numbers.
        limit = tl.full((), LIMIT, tl.float32)
        ordinary = tl.max(tl.abs(x).to(tl.int32, bitcast=True)) <= limit.to(tl.int32, bitcast=True)
    return ordinary


@triton.jit
def rounded_with_residual(x, random, left, FORM: tl.constexpr):
    """Weights of finite ``x`` in the destination's dtype, and their residuals where the pass keeps any (else ``left``)."""
    if FORM.keeps:
        weight, rest = split_residual(x, random, FORM.dst, FORM.residual, FORM.stochastic)
        return weight.to(FORM.dst, bitcast=True), rest
    else:
        return round_to(x, random, FORM.dst, FORM.stochastic), left


@triton.jit
def store_by_definition(dst, residual, mask, loaded, left, weight, out, random, FORM: tl.constexpr):
    """Store a tile at the pointers ``dst`` and ``residual``; returns how many elements were beyond the range.

    A weight that is not finite stays as it is, with a residual of 0. A result beyond the range becomes the largest
    number of its sign, one that is not a number leaves weight and residual as they were (``loaded``, ``left``).
    """
    LIMIT: tl.constexpr = limit_of(FORM.dst)
    finite = tl.abs(weight) < float("inf")
    beyond = mask & finite & ~(tl.abs(out) <= LIMIT)
    clamped = tl.where(out != out, weight, tl.where(out < 0, -LIMIT, LIMIT))
    rounded, rest = rounded_with_residual(tl.where(beyond, clamped, out), random, left, FORM)
    if FORM.keeps:
        same = beyond & (out != out)
        bits = tl.where(finite & ~same, rounded.to(tl.int16, bitcast=True), loaded.to(tl.int16, bitcast=True))
        tl.store(residual, tl.where(finite, tl.where(same, left, rest), 0), mask=mask)
        rounded = bits.to(FORM.dst, bitcast=True)
    else:
        rounded = tl.where(finite, rounded, round_to(weight, random, FORM.dst, False))
    tl.store(dst, rounded, mask=mask)
    return tl.sum(beyond.to(tl.int32))
