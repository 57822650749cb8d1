"""Noise version 1 and the rounding of 16-bit results as Triton device functions.

Tensors of noise have the shape of a tile (``passes.py``): (rows, ..., 32), where neighbours along the last axis are
neighbours in memory. Words of Philox are made once a block and laid out by ``join`` and ``reshape`` so that the
elements of a block lie in consecutive registers of one thread: no data moves.
"""

import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)  # no inline assembly there, and float32 -> bfloat16 truncates

GAUSSIAN = tl.constexpr(0)  # domains
RADEMACHER = tl.constexpr(1)
ROUNDING = tl.constexpr(2)

RADIUS = tl.constexpr(1.1774100225154747)  # sqrt(2 ln 2): callers scale by it, once a stream and not once a normal

_M0 = tl.constexpr(0xD2511F53)
_M1 = tl.constexpr(0xCD9E8D57)
_W0 = tl.constexpr(0x9E3779B9)
_W1 = tl.constexpr(0xBB67AE85)


@triton.jit
def _product(x, M: tl.constexpr):
    """The 64-bit product of uint32: one IMAD.WIDE, where Triton's own comes with an addition of 0 to its upper word."""
    if not INTERPRET and x.type.is_block():
        return tl.inline_asm_elementwise(f"mul.wide.u32 $0, $1, {M};", "=l,r", [x], tl.uint64, is_pure=True, pack=1)
    else:
        return x.to(tl.uint64) * M


@triton.jit
def philox(c0, c1, c2, c3, k0, k1, ROUNDS: tl.constexpr = 7):
    """The four Philox4x32 words of a counter; all uint32, scalars or tensors.

    Words that are scalars stay so as long as they can: with a scalar c1, c2, c3 a block costs 25 instructions and not
    28. The ANDs are free in SASS, but Triton counts them: without, it makes the signs of float32 twice.
    """
    for _ in tl.static_range(ROUNDS):
        p0 = _product(c0, _M0)
        p1 = _product(c2, _M1)
        c0 = (p1 >> 32).to(tl.uint32) ^ (c1 ^ k0)
        c2 = (p0 >> 32).to(tl.uint32) ^ (c3 ^ k1)
        c1 = (p1 & 0xFFFFFFFF).to(tl.uint32)
        c3 = (p0 & 0xFFFFFFFF).to(tl.uint32)
        k0 = (k0.to(tl.uint64) + _W0).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + _W1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def words_of(first, DOMAIN: tl.constexpr, lanes, tensor_id, stream, k0, k1):
    """Words of blocks ``first + lanes``; the sum of ``lanes`` (uint32) and the scalar int64 ``first`` does not carry."""
    high = (first >> 32).to(tl.uint32) | (DOMAIN << 24)
    return philox(first.to(tl.uint32) + lanes, high, tensor_id, stream, k0, k1)


# ---- intrinsics: the approximate ones of the hardware, 1 or 2 instructions each; numpy's in the interpreter ---------


@triton.jit
def _log2(x):
    if INTERPRET:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _sqrt(x):
    if INTERPRET:
        return tl.sqrt(x)
    return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def rsqrt(x):
    """1 / sqrt(x), to 2 ulp."""
    if INTERPRET:
        return 1.0 / tl.sqrt(x)
    return tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _cos(x):
    if INTERPRET:
        return tl.cos(x)
    return tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _sin(x):
    if INTERPRET:
        return tl.sin(x)
    return tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)


# ---- distributions ------------------------------------------------------------------------------------------------


@triton.jit
def _box_muller(even, odd):
    """A pair of normals over RADIUS."""
    u = tl.fma(even.to(tl.float32), 2.0**-32, 2.0**-33)
    # |.| for the sign; next to u = 1 it also holds an approximate logarithm on the wrong side of 0. Free in SASS.
    r = _sqrt(tl.abs(_log2(u)))
    phi = odd.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32; |phi| <= pi
    return r * _cos(phi), r * _sin(phi)


@triton.jit
def _block_of_normals(first, lanes, tensor_id, stream, k0, k1):
    """Normals of block ``lanes``, along two new axes of 2."""
    w0, w1, w2, w3 = words_of(first >> 2, GAUSSIAN, lanes, tensor_id, stream, k0, k1)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return tl.join(tl.join(z0, z2), tl.join(z1, z3))


@triton.jit
def gaussian(first, tensor_id, stream, k0, k1, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Standard normals over RADIUS of a tile (1, ROWS, 32) whose first element, a multiple of 32, has index ``first``.

    WIDTH: elements a thread has of a row, 4 or 8. It decides only which thread makes which normal.
    """
    lanes = tl.reshape(tl.arange(0, ROWS * (32 // WIDTH)) * (WIDTH // 4), (1, ROWS, 32 // WIDTH)).to(tl.uint32)
    z = _block_of_normals(first, lanes, tensor_id, stream, k0, k1)
    if WIDTH == 8:
        other = _block_of_normals(first, lanes + 1, tensor_id, stream, k0, k1)
        z = tl.permute(tl.join(z, other), (0, 1, 2, 5, 3, 4))
    return tl.reshape(z, (1, ROWS, 32))


@triton.jit
def signs(first, tensor_id, stream, k0, k1, BLOCKS: tl.constexpr):
    """Words of signs of a Rademacher tile (4, BLOCKS, 32), as uint32 (4, BLOCKS, 1): bit j is element j of the row.

    A thread's four rows are the four words of one block: one Philox gives a thread its 32 signs.
    """
    lanes = tl.arange(0, BLOCKS).to(tl.uint32)
    w0, w1, w2, w3 = words_of(first >> 7, RADEMACHER, lanes, tensor_id, stream, k0, k1)
    words = tl.permute(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (1, 2, 0))
    return tl.reshape(words, (4, BLOCKS, 1))


@triton.jit
def signed(words, c, SHAPE: tl.constexpr):
    """C times the signs: the sign bit of c flipped where an element's bit is 0."""
    shift = (31 - tl.arange(0, 32)).to(tl.uint32)[None, None, :]
    minus = tl.broadcast_to(~words, SHAPE) << shift
    bits = (minus & 0x80000000) ^ c.to(tl.uint32, bitcast=True)
    return bits.to(tl.float32, bitcast=True)


# ---- rounding -----------------------------------------------------------------------------------------------------


@triton.jit
def rounding_bits(
    first, tensor_id, update, k0, k1, A: tl.constexpr, B: tl.constexpr, STRIDE_A: tl.constexpr, STRIDE_B: tl.constexpr,
):  # fmt: skip
    """16 random bits an element of a tile (A, B, 32), as uint32."""
    a = tl.arange(0, A) * (STRIDE_A // 8)
    b = tl.arange(0, B) * (STRIDE_B // 8)
    lanes = a[:, None, None] + b[None, :, None] + tl.arange(0, 4)[None, None, :]
    w0, w1, w2, w3 = words_of(first >> 3, ROUNDING, lanes.to(tl.uint32), tensor_id, update, k0, k1)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    if not INTERPRET:  # or some halves are taken from their products and put together again
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
