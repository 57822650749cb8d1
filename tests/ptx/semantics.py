"""What instructions compute, element by element, on numpy arrays: no memory, no threads.

``meaning(instruction)`` gives the types of its operands, the type of its result and the function between them, by the PTX
ISA's definitions; an instruction or a form of one that is not here is an error. Integers wrap. float32 is IEEE with one
rounding, and every NaN that arithmetic makes is 0x7fffffff, as on hardware. The results of ``.approx`` are computed in float64
and rounded, or moved by the error that the PTX ISA allows (``approximate``).
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from .parser import PTXError

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64
UNSIGNED = {1: np.bool_, 8: u8, 16: u16, 32: u32, 64: u64}
_DTYPES = {"pred": np.bool_, "s": (i8, i16, i32, i64), "u": (u8, u16, u32, u64), "b": (u8, u16, u32, u64),
           "f": (None, f16, f32, f64), "bf": (None, u16)}  # fmt: skip
NAN = {f16: u16(0x7FFF), f32: u32(0x7FFFFFFF), f64: u64(0x7FF8000000000000)}
ORDINARY = ("f16", "bf16", "f32", "f64")


@cache
def width(kind):
    """Bits of a PTX type."""
    return 1 if kind == "pred" else int("".join(c for c in kind if c.isdigit()))


@cache
def dtype(kind):
    """The numpy type of a PTX type; of bfloat16, its bits."""
    try:
        return (
            np.bool_ if kind == "pred" else _DTYPES[kind.rstrip("0123456789")][{8: 0, 16: 1, 32: 2, 64: 3}[width(kind)]]
        )
    except (KeyError, IndexError, ValueError):
        raise PTXError(f"unknown type: {kind}") from None


# ---- floating point ---------------------------------------------------------------------------------------------------


def canonical(x):
    """The bits of floats that arithmetic made."""
    bad, bits = x != x, x.view(UNSIGNED[8 * x.itemsize])
    return np.where(bad, NAN[x.dtype.type], bits) if bad.any() else bits


def flushed(x):
    """Subnormal float32 as zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(f32).tiny, np.copysign(f32(0), x), x)


def to_odd(p, c):
    """p + c in float64, and rounded to odd where it is not exact: a second rounding, to fewer bits, is then the only one."""
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)  # Knuth's: exactly what s lacks
    return _make_odd(s, error, i64)


def _make_odd(x, error, bits):
    """Towards the error from x, by one unit in the last place where x is even."""
    fix = (error != 0) & np.isfinite(x) & (x.view(bits) & 1 == 0)
    if not fix.any():
        return x
    toward = np.where(error > 0, x.dtype.type(np.inf), x.dtype.type(-np.inf))
    return np.where(fix, np.nextafter(x, toward), x)


def fma(a, b, c):
    """float32 a b + c with one rounding."""
    product = a.astype(f64) * b.astype(f64)  # exact
    return to_odd(*np.broadcast_arrays(product, c.astype(f64))).astype(f32)


def fma_bf16(a, b, c):
    """The same of bfloat16, as bits."""
    a, b, c = (bf16(x).astype(f64) for x in (a, b, c))
    s = to_odd(*np.broadcast_arrays(a * b, c))
    near = s.astype(f32)
    return to_bf16(_make_odd(near, s - near, i32))


def bf16(bits):
    """bfloat16 as float32."""
    return (bits.astype(u32) << u32(16)).view(f32)


def to_bf16(x):
    """float32 to the bits of bfloat16, to nearest, ties to even."""
    b = x.view(u32)
    nearest = ((b + u32(0x7FFF) + ((b >> u32(16)) & u32(1))) >> u32(16)).astype(u16)
    return np.where(x != x, NAN[f16], nearest)


def minmax(largest, nan):
    """min or max of float32: +0 is over -0, and NaN comes from NaN only, from one (``nan``) or from both."""

    def function(a, b):
        a, b = np.broadcast_arrays(a, b)
        out = (np.fmax if largest else np.fmin)(a, b)
        x, y = a.view(u32), b.view(u32)
        out = np.where((a == 0) & (b == 0), (x & y if largest else x | y).view(f32), out)
        return np.where((a != a) | (b != b), f32(np.nan), out) if nan else out

    return function


# Errors that the PTX ISA allows: relative, absolute
_APPROXIMATE = {
    "lg2": (np.log2, 2.0**-22, 2.0**-22), "sqrt": (np.sqrt, 2.0**-23, 0), "sin": (np.sin, 0, 2.0**-20.5),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2.0**-22.9, 0), "cos": (np.cos, 0, 2.0**-20.5), "ex2": (np.exp2, 2.0**-22, 0),
    "rcp": (lambda x: 1 / x, 2.0**-23, 0), "div": (lambda a, b: a / b, 2.0**-22, 0),
}  # fmt: skip


def approximate(name, ftz, error):
    """An approximate instruction; ``error`` from -1 to 1: that share of what is allowed is added."""
    exact, relative, absolute = _APPROXIMATE[name]

    def function(*x):
        y = exact(*((flushed(v) if ftz else v).astype(f64) for v in x))
        if error:
            allowed = relative * np.abs(y) + absolute
            if name == "lg2":  # absolute in (0.5, 2), relative elsewhere
                allowed = np.where((x[0] > 0.5) & (x[0] < 2), absolute, relative * np.abs(y))
            y = np.where(np.isfinite(y), y + error * allowed, y)
        return flushed(y.astype(f32)) if ftz else y.astype(f32)

    return function


# ---- integers -----------------------------------------------------------------------------------------------------------


def shl(a, n):
    bits = a.dtype.type(8 * a.itemsize)
    return np.where(n >= bits, a.dtype.type(0), a << np.minimum(n, bits - 1).astype(a.dtype))


def shr(a, n):
    """Arithmetic where a is signed."""
    last = 8 * a.itemsize - 1
    shifted = a >> np.minimum(n, u32(last)).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(n > last, a.dtype.type(0), shifted)


def funnel(left, wrap):
    """The upper (left) or lower 32 bits of hi:lo, shifted."""

    def function(lo, hi, n):
        n = (n & u32(31) if wrap else np.minimum(n, u32(32))).astype(u64)
        both = lo.astype(u64) | (hi.astype(u64) << u64(32))
        return ((both << n) >> u64(32) if left else both >> n).astype(u32)

    return function


def bit_field(signed):
    """bfe of 32 bits: bits there are none of take the sign's place, or 0."""

    def function(a, start, length):
        start, length = start & u32(255), length & u32(255)
        there = np.minimum(length, u32(32) - np.minimum(start, u32(32)))
        mask = shl(np.ones_like(a), there) - u32(1)
        field = shr(a, start) & mask
        sign = (length != 0) & (shr(a, np.minimum(start + length - u32(1), u32(31))) & u32(1) == 1)
        return np.where(sign, field | ~mask, field) if signed else field

    return function


def insert_bits(a, b, start, length):
    one = np.ones(np.broadcast_shapes(a.shape, b.shape), u32)
    mask = shl(shl(one, length) - u32(1), start)
    return (b & ~mask) | (shl(a, start) & mask)


def permute(a, b, order):
    """prmt in its default mode: bytes of b:a by four selectors, whose bit 3 asks for copies of the sign."""
    both, out = a.astype(u64) | (b.astype(u64) << u64(32)), u32(0)
    for i in range(4):
        selector = (order >> u32(4 * i)) & u32(15)
        byte = (both >> ((selector & u32(7)) * u32(8)).astype(u64)).astype(u32) & u32(255)
        byte = np.where(selector & u32(8), (byte >> u32(7)) * u32(255), byte)
        out = out | (byte << u32(8 * i))
    return out


def parts_of(x, kind):
    """The bytes ("s8", "u8") or halves ("s16", "u16") of words, least first, as int64."""
    x = np.ascontiguousarray(x).view(dtype(kind)).astype(i64)
    return x.reshape(-1, 4 * 8 // width(kind)).T


def dot(name, a_signed, b_signed, first=0):
    """dp4a: four bytes by four bytes. dp2a: two halves by the bytes from ``first`` on."""
    a_kind = ("s" if a_signed else "u") + ("8" if name == "dp4a" else "16")

    def function(a, b, c):
        a, b, out = parts_of(a, a_kind), parts_of(b, "s8" if b_signed else "u8"), c.astype(i64)
        for i, x in enumerate(a):
            out = out + x * b[first + i]
        return out.astype(u32)

    return function


def high_product(a, b):
    if a.itemsize < 8:
        wide, bits = (i64 if a.dtype.kind == "i" else u64), 8 * a.itemsize
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(a.dtype)
    return np.array([(int(x) * int(y)) >> 64 for x, y in np.broadcast(a, b)], dtype=object).astype(a.dtype)


def divide(remainder):
    """Towards zero, as C; a divisor of zero is the machine's to refuse."""

    def function(a, b):
        if a.dtype.kind == "u":
            return a % b if remainder else a // b
        pairs = [(int(x), int(y)) for x, y in np.broadcast(a, b)]
        quotients = np.array([abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in pairs]).astype(a.dtype)
        return a - quotients * b if remainder else quotients

    return function


def lop3(table):
    """Any function of three bits, by its truth table."""

    def function(a, b, c):
        out = u32(0)
        for i in range(8):
            if table >> i & 1:
                out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        return np.broadcast_to(out, a.shape)

    return function


def packed(function, kind):
    """An operation on each of the ``kind`` that a register holds."""

    def on_words(*words):
        elements = (np.ascontiguousarray(w).view(dtype(kind)) for w in np.broadcast_arrays(*words))
        out = function(*elements)
        out = canonical(out) if out.dtype.kind == "f" else out
        return np.ascontiguousarray(out).view(words[0].dtype)

    return on_words


# ---- conversions --------------------------------------------------------------------------------------------------------

_ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def to_integer(x, rounding, kind):
    """Rounded and clamped; NaN is 0."""
    info, x = np.iinfo(dtype(kind)), _ROUNDINGS[rounding](x.astype(f64))
    inside = np.where((x > float(info.min)) & (x < float(info.max)), x, 0).astype(info.dtype)
    return np.where(x >= float(info.max), info.max, np.where(x <= float(info.min), info.min, inside))


def conversion(i):
    """cvt: from the type at the end to the one before it."""
    to, source, how = i.parts[-2], i.parts[-1], i.parts[1:-2]
    ftz, how = "ftz" in how, [h for h in how if h != "ftz"]
    before = flushed if ftz else lambda x: x
    if to in ("bf16x2", "f16x2") and how == ["rn"]:  # the first operand is the upper half
        half = to_bf16 if to == "bf16x2" else lambda x: canonical(x.astype(f16))
        return Meaning(("f32", "f32"), "b32", lambda a, b: half(a).astype(u32) << u32(16) | half(b).astype(u32))
    if source in ORDINARY and to in ORDINARY:
        if (to, source, how) == ("f32", "bf16", []):
            return Meaning((source,), "b32", lambda x: x.astype(u32) << u32(16))
        if (to, source, how) == ("bf16", "f32", ["rn"]):
            return Meaning((source,), to, to_bf16)
        if (to, source) == ("f32", "f32") and len(how) == 1 and how[0] in _ROUNDINGS:
            return Meaning((source,), to, lambda x: _ROUNDINGS[how[0]](before(x)))
        if "bf16" not in (to, source) and how == ([] if width(to) > width(source) else ["rn"]) and not ftz:
            return Meaning((source,), to, lambda x: x.astype(dtype(to)))
    elif source == "f32" and len(how) == 1 and how[0] in _ROUNDINGS:
        return Meaning((source,), to, lambda x: to_integer(before(x), how[0], to))
    elif source not in ORDINARY and (how == ["rn"] if to in ("f32", "f64") else not how and to not in ORDINARY):
        return Meaning((source,), to, lambda x: x.astype(dtype(to)))
    return None


# ---- instructions -------------------------------------------------------------------------------------------------------


@dataclass
class Meaning:
    """Types of operands, the type of the result, and the function. Registers may be wider than a type: see machine.py."""

    reads: tuple[str, ...]
    writes: str
    function: Callable


_SIGNS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "and": operator.and_, "or": operator.or_,
          "xor": operator.xor}  # fmt: skip
_COMPARISONS = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
                "ge": operator.ge, "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}  # fmt: skip


def meaning(i, error=0.0):
    """The ``Meaning`` of an instruction that only computes; None for one that does more. ``error``: see ``approximate``."""
    name, kind, how = i.name, i.type, list(i.modifiers)
    bits = "b" + kind[1:]
    if name in ("add", "sub", "mul") and kind in ("f32", "f64", "f32x2") and not set(how) - {"rn", "ftz"}:
        if kind == "f32x2":
            return Meaning(("b64", "b64"), "b64", packed(_SIGNS[name], "f32"))
        if "ftz" in how:
            return Meaning((kind, kind), kind, lambda a, b: flushed(_SIGNS[name](flushed(a), flushed(b))))
        return Meaning((kind, kind), kind, _SIGNS[name])
    if name in ("add", "sub", "min", "max") and kind in ("u16x2", "s16x2") and not how:
        function = {"min": np.minimum, "max": np.maximum}.get(name) or _SIGNS[name]
        return Meaning(("b32", "b32"), "b32", packed(function, kind[:3]))
    if name in ("add", "sub") and not how and kind[0] in "us":
        return Meaning((bits, bits), bits, _SIGNS[name])
    if name in ("mul", "mad") and kind[0] in "us" and len(how) == 1:
        return _product(name, kind, how[0])
    if name == "fma" and how == ["rn"]:
        if kind == "f32":
            return Meaning(("f32",) * 3, "f32", fma)
        if kind == "f32x2":
            return Meaning(("b64",) * 3, "b64", packed(fma, "f32"))
        if kind == "bf16x2":
            return Meaning(("b32",) * 3, "b32", packed(fma_bf16, "bf16"))
    if name == "div" and kind == "f32" and how in (["rn"], ["full"], ["approx"]):
        return Meaning((kind, kind), kind, approximate("div", False, 0 if how == ["rn"] else error))
    if name in ("div", "rem") and kind[0] in "us" and not how:
        return Meaning((kind, kind), kind, divide(name == "rem"))
    if name == "neg":
        if kind == "f32":
            return Meaning(("b32",), "b32", lambda x: x ^ u32(1 << 31))
        return Meaning((kind,), kind, operator.neg)
    if name == "abs" and not how:
        if kind == "f32":
            return Meaning(("b32",), "b32", lambda x: x & u32(0x7FFFFFFF))
        if kind in ("f16", "bf16", "f16x2", "bf16x2"):  # of a NaN the ISA leaves the payload open: canonical
            infinity, whole = u16(0x7F80 if kind[0] == "b" else 0x7C00), "b32" if kind[-2:] == "x2" else "b16"

            def absolute(x):
                return np.where(x & NAN[f16] > infinity, NAN[f16], x & NAN[f16])

            return Meaning((whole,), whole, packed(absolute, "b16"))
        return Meaning((kind,), kind, np.abs)
    if name in ("min", "max"):
        if kind == "f32" and not set(how) - {"NaN"}:
            function = minmax(name == "max", "NaN" in how)
            if len(i.operands) == 4:  # from sm_100 on
                return Meaning((kind,) * 3, kind, lambda a, b, c: function(function(a, b), c))
            return Meaning((kind, kind), kind, function)
        if kind[0] in "us" and not how:
            return Meaning((kind, kind), kind, np.maximum if name == "max" else np.minimum)
    if name in ("and", "or", "xor") and not how:
        return Meaning((kind, kind), kind, _SIGNS[name])
    if name == "not":
        return Meaning((kind,), kind, operator.invert)
    if name == "shl":
        return Meaning((bits, "b32"), bits, shl)
    if name == "shr":
        return Meaning((kind, "b32"), kind, shr)
    if name == "shf":
        return Meaning(("b32",) * 3, "b32", funnel(how[0] == "l", how[1] == "wrap"))
    if name == "bfe" and width(kind) == 32:
        return Meaning(("b32",) * 3, "b32", bit_field(kind[0] == "s"))
    if name == "bfi" and kind == "b32":
        return Meaning(("b32",) * 4, "b32", insert_bits)
    if name == "popc":
        return Meaning((kind,), "b32", lambda x: np.bitwise_count(x).astype(u32))
    if name == "prmt" and not how:
        return Meaning(("b32",) * 3, "b32", permute)
    if name == "lop3":
        return Meaning(("b32",) * 3, "b32", lop3(i.operands[4].bits))
    if name == "dp4a":
        return Meaning(("b32",) * 3, "b32", dot(name, how[0] == "s32", kind == "s32"))
    if name == "dp2a":
        return Meaning(("b32",) * 3, "b32", dot(name, how[1] == "s32", kind == "s32", 2 * (how[0] == "hi")))
    if name == "setp":
        return _comparison(kind, *how)
    if name == "selp":
        return Meaning((bits, bits, "pred"), bits, lambda a, b, p: np.where(p, a, b))
    if name == "cvt":
        return conversion(i)
    if name == "cvta":
        return Meaning((bits,), bits, lambda x: x)
    if name == "sqrt" and how == ["rn"]:
        return Meaning((kind,), kind, np.sqrt)
    if name in _APPROXIMATE and kind == "f32" and how[0] == "approx":
        return Meaning((kind,), kind, approximate(name, "ftz" in how, error))
    return None


def _product(name, kind, how):
    """mul and mad of integers: the lower half, the upper half or the whole of the product."""
    bits, wide = f"b{width(kind)}", f"{kind[0]}{2 * width(kind)}"
    if how == "lo":
        product, reads, writes = operator.mul, bits, bits
    elif how == "hi":
        product, reads, writes = high_product, kind, kind
    elif how == "wide":
        product, reads, writes = (lambda a, b: a.astype(dtype(wide)) * b.astype(dtype(wide))), kind, wide
    else:
        return None
    if name == "mul":
        return Meaning((reads, reads), writes, product)
    return Meaning((reads, reads, writes), writes, lambda a, b, c: product(a, b) + c)


def _comparison(kind, how, combine=None):
    """setp; ``equ`` and its like are true for NaN, and of the others none is."""

    def compare(a, b):
        if kind[0] != "f":
            return _COMPARISONS[how](a, b)
        nan = (a != a) | (b != b)
        if how in ("nan", "num"):
            return nan if how == "nan" else ~nan
        if how.endswith("u") and how != "u":
            return _COMPARISONS[how[:2]](a, b) | nan
        return _COMPARISONS[how](a, b) & ~nan

    if combine is None:
        return Meaning((kind, kind), "pred", compare)
    return Meaning((kind, kind, "pred"), "pred", lambda a, b, p: _SIGNS[combine](compare(a, b), p))
