"""Weights with residuals as Triton device functions: the float32 value of both, and both of a value (docs/noise.md).

The extended pattern of a bfloat16 is that of the float32: a residual is added to the bits of the weight, sign and all.
Assembly does that here for whole tiles, two or four elements at a time, in the fewest instructions; each statement
works on elements by their place in a register alone, so any layout of a tile is right. All else is the definition.
"""

import triton
import triton.language as tl

from .launch import assembly

# x * 0 + x makes NaN of an infinity: no residual then makes it finite. A residual below zero of a weight of zero makes
# NaN as well; whoever finds one in a tile goes by the definition. dp2a takes a residual from its place and adds it.
_WIDEN = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")
_JOIN_16 = tl.constexpr("""{
    .reg .b32 w, z, a, b;
    mov.b32 z, 0;
    fma.rn.bf16x2 w, $2, z, $2;
    shl.b32 a, w, 16;
    and.b32 b, w, 0xffff0000;
    dp2a.lo.s32.s32 $0, $3, 0x001, a;
    dp2a.lo.s32.s32 $1, $3, 0x100, b;
}""")
_JOIN_8 = tl.constexpr("""{
    .reg .b32 v, w, z, a, b, c, d, low, high;
    mov.b32 z, 0;
    mov.b32 low, 0x100;
    mov.b32 high, 0x1000000;
    fma.rn.bf16x2 v, $4, z, $4;
    fma.rn.bf16x2 w, $5, z, $5;
    shl.b32 a, v, 16;
    and.b32 b, v, 0xffff0000;
    shl.b32 c, w, 16;
    and.b32 d, w, 0xffff0000;
    dp2a.lo.s32.s32 $0, low, $6, a;
    dp2a.lo.s32.s32 $1, high, $6, b;
    dp2a.hi.s32.s32 $2, low, $6, c;
    dp2a.hi.s32.s32 $3, high, $6, d;
}""")
_SPLIT_16 = tl.constexpr("""{
    .reg .b32 a, b;
    add.u32 a, $2, 0x8000;
    add.u32 b, $3, 0x8000;
    prmt.b32 $1, $2, $3, 0x5410;
    prmt.b32 $0, a, b, 0x7632;
}""")
# a to d: sums whose upper 24 bits are weight and residual. Half a weight is bit 15 of the sum, which is the sign of the
# residual: added to the weights of a register at once.
_PACK_8 = """
    prmt.b32 low, a, b, 0x5410;
    prmt.b32 high, c, d, 0x5410;
    prmt.b32 $2, low, high, 0x7531;
    and.b32 low, low, 0x80008000;
    and.b32 high, high, 0x80008000;
    shr.u32 low, low, 15;
    shr.u32 high, high, 15;
    prmt.b32 a, a, b, 0x7632;
    prmt.b32 c, c, d, 0x7632;
    add.u32 $0, a, low;
    add.u32 $1, c, high;
}"""
_SPLIT_8 = tl.constexpr(
    """{
    .reg .b32 a, b, c, d, low, high;
    add.u32 a, $3, 0x80;
    add.u32 b, $4, 0x80;
    add.u32 c, $5, 0x80;
    add.u32 d, $6, 0x80;"""
    + _PACK_8
)
_SPLIT_8_STOCHASTIC = tl.constexpr(
    """{
    .reg .b32 a, b, c, d, low, high;
    dp4a.u32.u32 a, $7, 0x100, $3;
    dp4a.u32.u32 b, $7, 0x1000000, $4;
    dp4a.u32.u32 c, $8, 0x100, $5;
    dp4a.u32.u32 d, $8, 0x1000000, $6;"""
    + _PACK_8
)


@triton.jit
def to_float32(weight):
    """Weights as float32. The interpreter's own conversion is wrong for subnormal bfloat16 that are negative."""
    if tl.bfloat16 != weight.dtype:
        return weight.to(tl.float32)
    elif assembly():  # two instructions for two weights, where Triton's own conversion is three
        return tl.inline_asm_elementwise(_WIDEN, "=&r,=r,r", [weight.to(tl.int16, bitcast=True)], tl.float32, True, 2)
    else:
        return (weight.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def join_residual(weight, residual, EXACT: tl.constexpr):
    """float32 values of 16-bit weights with int8 or int16 residuals; a weight that is not finite stays as it is.

    Not EXACT: NaN for such a weight, and for a zero with a residual below zero.
    """
    BITS: tl.constexpr = residual.dtype.primitive_bitwidth
    if tl.bfloat16 == weight.dtype and not EXACT and assembly():
        bits = weight.to(tl.int16, bitcast=True)
        if BITS == 16:
            return tl.inline_asm_elementwise(_JOIN_16, "=&r,=&r,r,r", [bits, residual], tl.float32, True, 2)
        return tl.inline_asm_elementwise(_JOIN_8, "=&r,=&r,=&r,=&r,r,r,r", [bits, residual], tl.float32, True, 4)
    bits = weight.to(tl.int16, bitcast=True).to(tl.int32)
    u = tl.maximum(((bits & 0x7FFF) << 16) + (residual.to(tl.int32) << (16 - BITS)), 0)
    INFINITY: tl.constexpr = 0x7F80 if tl.bfloat16 == weight.dtype else 0x7C00
    if tl.bfloat16 == weight.dtype:
        value = u.to(tl.float32, bitcast=True)
    else:
        normal = ((u >> 3) + (112 << 23)).to(tl.float32, bitcast=True)
        value = tl.where(u >= 1 << 26, normal, u.to(tl.float32) * 2.0**-40)
    value = value.to(tl.int32, bitcast=True) | ((bits >> 15) << 31)
    return tl.where((bits & 0x7FFF) < INFINITY, value.to(tl.float32, bitcast=True), to_float32(weight))


@triton.jit
def split_residual(x, random, DTYPE: tl.constexpr, BITS: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Weights, as int16 bits of DTYPE, and residuals of BITS of finite float32 ``x``; ``random`` as in ``round_to``."""
    if tl.bfloat16 != DTYPE or not assembly():
        pattern = x.to(tl.int32, bitcast=True)
        u = pattern & 0x7FFFFFFF
        if tl.float16 == DTYPE:
            units = (tl.minimum(tl.abs(x), 2.0**-14) * 1099511627776.0).to(tl.int32)  # of 2^-40
            u = tl.where(u < 0x38800000, units, (u - (112 << 23)) << 3)
        if BITS == 8:
            u += (random >> 8).to(tl.int32) if STOCHASTIC else 0x80
        weight = (((u + 0x8000) >> 16) | ((pattern >> 31) << 15)).to(tl.int16)
        return weight, (u >> (16 - BITS)).to(tl.int8 if BITS == 8 else tl.int16)
    elif BITS == 16:
        return tl.inline_asm_elementwise(_SPLIT_16, "=&r,=&r,r,r", [x], (tl.int16, tl.int16), True, 2)
    elif STOCHASTIC:
        halves = random.to(tl.uint16)
        return tl.inline_asm_elementwise(
            _SPLIT_8_STOCHASTIC, "=&r,=&r,=&r,r,r,r,r,r,r", [x, halves], (tl.int16, tl.int8), True, 4
        )
    else:
        return tl.inline_asm_elementwise(_SPLIT_8, "=&r,=&r,=&r,r,r,r,r", [x], (tl.int16, tl.int8), True, 4)
