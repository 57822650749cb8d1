"""The emulator against definitions: PTX by hand against the ISA's, arithmetic against exact fractions, and Triton's own kernels.

What Triton makes of ``tl.dot``, ``tl.sum`` and ``tl.trans`` is known to be right on hardware. So a right answer here says that
fragments of matrices, shuffles, barriers and shared memory are as the hardware has them.
"""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels are interpreted in this process, and never compiled", allow_module_level=True)

import triton.language as tl

from ptx import PTXError, driver, machine
from ptx.memory import GlobalMemory
from ptx.semantics import f32, f64, i16, i32, u8, u16, u32, u64

RNG = np.random.default_rng(0)
SPECIAL = np.array([0, 0x80000000, 1, 0x80000001, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345, 0x7F7FFFFF, 0x00800000,
                    0x007FFFFF, 0x3F800000, 0xBF800000, 0x3F800001], u32)  # fmt: skip


def run(body, *inputs, outputs=1, shared=0, programs=1, undefined=None):
    """What threads compute that each find their words of ``inputs`` in %a0, %a1, ... and leave %d0, %d1, ...

    ``body`` may use %x (32 bits), %y (64), %h (16) and %g (predicates), %t, the number of the thread among all, and the
    pointers %p0, ... and %q0, ... to the words of input and output of the first thread.
    """
    inputs = [np.ascontiguousarray(x).view(u32) for x in inputs]
    n = len(inputs[0])
    results = [np.zeros(n, u32) for _ in range(outputs)]
    pointers = [f"p{k}" for k in range(len(inputs))] + [f"q{k}" for k in range(outputs)]
    begin = "".join(f"ld.param.b64 %{p}, [{p}];" for p in pointers)
    begin += "".join(f"add.s64 %y15, %p{k}, %o; ld.global.b32 %a{k}, [%y15];" for k in range(len(inputs)))
    end = "".join(f"add.s64 %y15, %q{k}, %o; st.global.b32 [%y15], %d{k};" for k in range(outputs))
    text = f""".extern .shared .align 16 .b8 global_smem[];
        .visible .entry kernel({", ".join(f".param .u64 {p}" for p in pointers)}) .reqntid {n // programs}
        {{ .reg .b32 %t, %c, %w, %a<8>, %d<8>, %x<16>; .reg .b64 %o, %p<8>, %q<8>, %y<16>; .reg .pred %g<8>; .reg .b16 %h<8>;
        mov.u32 %t, %tid.x; mov.u32 %c, %ctaid.x; mov.u32 %w, %ntid.x; mad.lo.s32 %t, %c, %w, %t; mul.wide.u32 %o, %t, 4;
        {begin} {body} {end} ret; }}"""
    memory = GlobalMemory()
    for k, x in enumerate(inputs):
        memory.register(x.ctypes.data, x.nbytes, f"input {k}", writable=False)
    for k, x in enumerate(results):
        memory.register(x.ctypes.data, x.nbytes, f"output {k}")
    arguments = [x.ctypes.data for x in (*inputs, *results)]
    machine.launch(machine.load(text), memory, arguments, (programs, 1, 1), shared, undefined)
    return results[0] if outputs == 1 else results


def words(n=32, first=()):
    x = RNG.integers(0, 1 << 32, n, dtype=u64).astype(u32)
    x[: len(first)] = first
    return x


def signed(x, bits):
    return x - ((x >> (bits - 1) & 1) << bits)


# ---- integers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0x5410, 0x7632, 0x7531, 0x0123, 0x7771, 0x9A4F, 0xFFFF, 0x3210])
def test_bytes_are_permuted(order):
    a, b = words(), words()
    got = run(f"prmt.b32 %d0, %a0, %a1, {order:#x};", a, b)
    for x, y, out in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
        data, expected = (y << 32 | x).to_bytes(8, "little"), []
        for i in range(4):
            n = order >> 4 * i & 15
            expected.append((255 if data[n & 7] & 128 else 0) if n & 8 else data[n & 7])
        assert out == int.from_bytes(bytes(expected), "little")


@pytest.mark.parametrize("ta", ["u32", "s32"])
@pytest.mark.parametrize("tb", ["u32", "s32"])
def test_dot_products_of_bytes_and_halves(ta, tb):
    a, b, c = words(), words(), words()
    got = {m: run(f"dp{m}.{ta}.{tb} %d0, %a0, %a1, %a2;", a, b, c) for m in ("4a", "2a.lo", "2a.hi")}
    for k, (x, y, z) in enumerate(zip(a.tolist(), b.tolist(), c.tolist(), strict=True)):
        sa, sb = (signed if t == "s32" else lambda v, _: v for t in (ta, tb))
        right = [sb(y >> 8 * i & 255, 8) for i in range(4)]
        four = z + sum(sa(x >> 8 * i & 255, 8) * right[i] for i in range(4))
        low, high = (z + sum(sa(x >> 16 * i & 0xFFFF, 16) * right[first + i] for i in range(2)) for first in (0, 2))
        assert [int(got[m][k]) for m in ("4a", "2a.lo", "2a.hi")] == [v & 0xFFFFFFFF for v in (four, low, high)]


def test_shifts():
    a, b, c = words(), words(first=(0, 1, 31, 32, 33, 255)), words()
    b[6:] %= 40
    got = {op: run(f"{op} %d0, %a0, %a1;", a, b).tolist() for op in ("shl.b32", "shr.u32", "shr.s32")}
    funnel = {
        op: run(f"shf.{op}.b32 %d0, %a0, %a2, %a1;", a, b, c).tolist()
        for op in ("l.wrap", "r.wrap", "l.clamp", "r.clamp")
    }
    for k, (x, n, y) in enumerate(zip(a.tolist(), b.tolist(), c.tolist(), strict=True)):
        assert got["shl.b32"][k] == (x << n & 0xFFFFFFFF if n < 32 else 0) and got["shr.u32"][k] == x >> n
        assert got["shr.s32"][k] == (signed(x, 32) >> min(n, 31)) & 0xFFFFFFFF
        for op, out in funnel.items():
            m, both = (n & 31 if "wrap" in op else min(n, 32)), y << 32 | x
            assert out[k] == ((both << m >> 32) if op[0] == "l" else both >> m) & 0xFFFFFFFF


@pytest.mark.parametrize(("at", "length"), [(0, 32), (3, 5), (28, 8), (31, 1), (5, 0), (32, 3), (0, 255)])
def test_bit_fields(at, length):
    a, b = words(), words()
    got = [run(f"bfe.{t} %d0, %a0, {at}, {length};", a) for t in ("u32", "s32")]
    inserted = run(f"bfi.b32 %d0, %a0, %a1, {at}, {length};", a, b)
    for k, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        sign = 0 if length == 0 else x >> min(at + length - 1, 31) & 1
        for out, beyond in zip(got, (0, sign), strict=True):
            bits = (x >> at + i & 1 if i < length and at + i <= 31 else beyond for i in range(32))
            assert out[k] == sum(bit << i for i, bit in enumerate(bits))
        field = sum(1 << i for i in range(at, min(at + length, 32)))
        assert inserted[k] == (y & ~field | x << at & field)


def test_products_and_quotients():
    a, b = words(), words(first=(1, 0xFFFFFFFF, 0x80000000))
    low, high = run("mul.wide.u32 %y0, %a0, -766435501; mov.b64 {%d0, %d1}, %y0;", a, outputs=2)
    exact = [x * (-766435501 & 0xFFFFFFFF) for x in a.tolist()]
    assert low.tolist() == [x & 0xFFFFFFFF for x in exact] and high.tolist() == [x >> 32 for x in exact]
    pairs = [(signed(x, 32), signed(y, 32)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert run("mul.hi.s32 %d0, %a0, %a1;", a, b).tolist() == [(x * y >> 32) & 0xFFFFFFFF for x, y in pairs]
    assert run("mad.lo.s32 %d0, %a0, %a1, %a0;", a, b).tolist() == [(x * y + x) & 0xFFFFFFFF for x, y in pairs]
    quotient, rest = run("div.s32 %d0, %a0, %a1; rem.s32 %d1, %a0, %a1;", a, b, outputs=2)
    for q, r, (x, y) in zip(quotient.tolist(), rest.tolist(), pairs, strict=True):
        toward_zero = int(Fraction(x, y))
        assert q == toward_zero & 0xFFFFFFFF and r == (x - toward_zero * y) & 0xFFFFFFFF
    wide = "mov.b64 %y0, {%a0, %a1}; mov.b64 %y1, {%a1, 0}; div.u64 %y2, %y0, %y1; mov.b64 {%d0, %d1}, %y2;"
    low, high = run(wide, a, b, outputs=2)
    assert [h << 32 | w for h, w in zip(high.tolist(), low.tolist(), strict=True)] == [
        (y << 32 | x) // y for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]


def test_packed_integers_and_logic():
    a, b, c = words(), words(), words()
    for op, f in (("max.s16x2", np.maximum), ("min.s16x2", np.minimum), ("add.s16x2", np.add)):
        assert (run(f"{op} %d0, %a0, %a1;", a, b).view(i16) == f(a.view(i16), b.view(i16))).all()
    for table, f in ((0x96, a ^ b ^ c), (0xE8, a & b | b & c | a & c), (0xCA, a & b | ~a & c)):
        assert (run(f"lop3.b32 %d0, %a0, %a1, %a2, {table:#x};", a, b, c) == f).all()
    assert run("popc.b32 %d0, %a0;", a).tolist() == [x.bit_count() for x in a.tolist()]


# ---- floating point -------------------------------------------------------------------------------------------------------


def nearest(x):
    """The float32 nearest to a fraction, ties to even."""
    near = f32(float(x))
    around = [v for v in (np.nextafter(near, f32(-np.inf)), near, np.nextafter(near, f32(np.inf))) if np.isfinite(v)]
    return min(around, key=lambda v: (abs(Fraction(float(v)) - x), int(v.view(u32)) & 1))


def test_fma_rounds_once():
    n = 4096
    a, b, c = (RNG.standard_normal(n) * np.exp2(RNG.integers(-60, 60, n)) for _ in range(3))
    a, b, c = (x.astype(f32) for x in (a, b, c))
    c[: n // 2] = -(a[: n // 2].astype(f64) * b[: n // 2]) * (1 + RNG.integers(-3, 4, n // 2) * 2.0**-24)
    # halfway cases, which two roundings get wrong, and subnormal results
    a[:3], b[:3], c[:3] = (
        (1 + 2.0**-12, 1 + 2.0**-12, 2.0**-30),
        (1 + 2.0**-12, 1 - 2.0**-12, 2.0**-30),
        (2.0**-60, -(2.0**-60), 1 + 2.0**-23),
    )
    a[3:6], b[3:6], c[3:6] = 2.0**-75, (1.5 * 2.0**-74, 2.0**-75, 1.25 * 2.0**-73), (0, 2.0**-149, -(2.0**-149))
    got, product, total = run(
        "fma.rn.f32 %d0, %a0, %a1, %a2; mul.rn.f32 %d1, %a0, %a1; add.rn.f32 %d2, %a0, %a2;", a, b, c, outputs=3
    )
    for k, (x, y, z) in enumerate(zip(a, b, c, strict=True)):
        x, y, z = (Fraction(float(v)) for v in (x, y, z))
        for out, exact in ((got, x * y + z), (product, x * y), (total, x + z)):
            assert abs(exact) >= 2**127 or out.view(f32)[k] == nearest(exact), k


def test_packed_floats():
    a, b, c, d = (RNG.standard_normal(32).astype(f32) for _ in range(4))
    pack, unpack = "mov.b64 %y0, {%a0, %a1}; mov.b64 %y1, {%a2, %a3};", "mov.b64 {%d0, %d1}, %y2;"
    for op, f in (("add.f32x2", np.add), ("mul.rn.f32x2", np.multiply), ("sub.f32x2", np.subtract)):
        x, y = run(f"{pack} {op} %y2, %y0, %y1; {unpack}", a, b, c, d, outputs=2)
        assert (x.view(f32) == f(a, c)).all() and (y.view(f32) == f(b, d)).all()
    for out, p, q in zip(
        run(f"{pack} fma.rn.f32x2 %y2, %y0, %y1, %y0; {unpack}", a, b, c, d, outputs=2), (a, b), (c, d), strict=True
    ):
        exact = [
            nearest(Fraction(float(s)) * Fraction(float(t)) + Fraction(float(s))) for s, t in zip(p, q, strict=True)
        ]
        assert (out.view(f32) == exact).all()


def test_bfloat16_fma_rounds_once_and_makes_nan_of_infinity_times_zero():
    n = 20000
    a, b, c = words(n), words(n), words(n)
    a[:8192], c[:5000] = np.arange(8192, dtype=u32) * u32(8 * 65537), a[:5000]
    got = run("fma.rn.bf16x2 %d0, %a0, %a1, %a2;", a, b, c)
    halves = (torch.from_numpy(w.view(i16).copy()).view(torch.bfloat16).double() for w in (a, b, c, got))
    a_, b_, c_, out = halves
    exact = a_ * b_ + c_
    # float64 is exact enough to judge, where it holds both addends: no other bfloat16 is nearer
    product = a_ * b_
    judged = (
        exact.isfinite()
        & (exact.abs() < 3e38)
        & ((product == 0) | (c_ == 0) | ((product / c_).abs().log2().abs() < 30))
    )
    up, down = (
        torch.nextafter(out.bfloat16(), torch.tensor(s, dtype=torch.bfloat16)).double() for s in (torch.inf, -torch.inf)
    )
    assert judged.sum() > 5000
    assert ((out - exact).abs() <= torch.minimum((up - exact).abs(), (down - exact).abs()))[judged].all()
    same = run("mov.b32 %x0, 0; fma.rn.bf16x2 %d0, %a0, %x0, %a0;", a).view(u16)
    finite = a.view(u16) & 0x7F80 != 0x7F80
    assert (same[finite] == a.view(u16)[finite]).all() and (same[~finite] == 0x7FFF).all()


def test_special_floats():
    x, y = np.repeat(SPECIAL, len(SPECIAL)), np.tile(SPECIAL, len(SPECIAL))
    a, b = x.view(f32), y.view(f32)
    either, both = np.isnan(a) | np.isnan(b), np.isnan(a) & np.isnan(b)
    with np.errstate(all="ignore"):
        for op, exact in (("add", a + b), ("mul", a * b), ("sub", a - b), ("div.full", a / b)):
            got = run(f"{op}.f32 %d0, %a0, %a1;", x, y)
            assert (got == np.where(np.isnan(exact), u32(0x7FFFFFFF), exact.view(u32))).all(), op
    for name, larger in (("max", True), ("min", False)):
        got, got_nan = run(f"{name}.f32 %d0, %a0, %a1; {name}.NaN.f32 %d1, %a0, %a1;", x, y, outputs=2)
        for k in range(len(x)):
            order = lambda v: (float(v.view(f32)), not int(v) >> 31)  # noqa: E731 - +0 is over -0
            expected = 0x7FFFFFFF
            if not both[k]:
                expected = int(
                    (y if np.isnan(a[k]) else x)[k] if either[k] else (max if larger else min)(x[k], y[k], key=order)
                )
            assert got[k] == expected and got_nan[k] == (0x7FFFFFFF if either[k] else expected)
    for op, expected in (("eq", a == b), ("ne", (a != b) & ~either), ("lt", a < b), ("gtu", (a > b) | either), ("neu", (a != b) | either),
                         ("nan", either), ("num", ~either), ("geu", (a >= b) | either), ("le", a <= b)):  # fmt: skip
        assert (run(f"setp.{op}.f32 %g0, %a0, %a1; selp.b32 %d0, 1, 0, %g0;", x, y) == expected).all(), op
    assert (run("abs.f32 %d0, %a0;", x) == x & u32(0x7FFFFFFF)).all()
    logarithm = run("lg2.approx.ftz.f32 %d0, %a0;", x).view(f32)
    assert np.isneginf(logarithm[x == 1]).all() and np.isnan(logarithm[a < -1e-30]).all()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions_between_floats_are_torch_s(name, dtype):
    x = words(8192, SPECIAL)
    x[100:2100] = (np.arange(2000, dtype=u32) << u32(12)) + u32(0x37FFF000)  # around float16's subnormals, with ties
    nan, one = np.isnan(x.view(f32)), torch.ones((), dtype=dtype).view(torch.int16).item()
    expected = torch.from_numpy(x.view(f32).copy()).to(dtype).view(torch.int16).numpy().view(u16)
    got = run(f"cvt.rn.{name}.f32 %h0, %a0; cvt.u32.u16 %d0, %h0;", x)
    assert (got == np.where(nan, 0x7FFF, expected)).all()
    two = run(f"cvt.rn.{name}x2.f32 %d0, %a0, 0f3F800000;", x).view(u16).reshape(-1, 2)
    assert (two[:, 1] == got).all() and (two[:, 0] == one).all()
    back = run(f"cvt.u16.u32 %h0, %a0; cvt.f32.{name} %d0, %h0;", x).view(f32)
    low = torch.from_numpy(x.astype(u16).view(i16)).view(dtype).float().numpy()
    assert (np.isnan(low) == np.isnan(back)).all() and (low[~np.isnan(low)] == back[~np.isnan(low)]).all()


def test_conversions_of_integers():
    x = words(8192, SPECIAL)
    for kind, dtype in (("s32", i32), ("u32", u32)):
        got, info = run(f"cvt.rzi.{kind}.f32 %d0, %a0;", x).view(dtype), np.iinfo(dtype)
        for out, v in zip(got.tolist(), x.view(f32).tolist(), strict=True):
            exact = 0 if v != v else int(v) if abs(v) < 1e30 else (1 << 60) * (1 if v > 0 else -1)
            assert out == max(info.min, min(info.max, exact))
        assert (run(f"cvt.rn.f32.{kind} %d0, %a0;", x) == x.view(dtype).astype(f32).view(u32)).all()
    byte = x.astype(u8).view(np.int8)
    assert (run("cvt.u16.u32 %h0, %a0; cvt.s16.s8 %h1, %h0; cvt.s32.s16 %d0, %h1;", x).view(i32) == byte).all()
    assert (run("cvt.s32.s8 %d0, %a0;", x).view(i32) == byte).all()
    floor = run("cvt.rmi.f32.f32 %d0, %a0;", x).view(f32)
    with np.errstate(invalid="ignore"):
        assert (floor == np.floor(x.view(f32)))[~np.isnan(floor)].all()


# ---- warps, tensor cores, barriers ------------------------------------------------------------------------------------------


def test_shuffles_and_reductions():
    a, lane = words(), np.arange(32)
    for k in (1, 2, 5, 16):
        assert (run(f"shfl.sync.bfly.b32 %d0, %a0, {k}, 31, -1;", a) == a[lane ^ k]).all()
        down, inside = run(f"shfl.sync.down.b32 %d0|%g0, %a0, {k}, 31, -1; selp.b32 %d1, 1, 0, %g0;", a, outputs=2)
        assert (down == a[np.where(lane + k < 32, lane + k, lane)]).all() and (inside == (lane + k < 32)).all()
        assert (run(f"shfl.sync.up.b32 %d0, %a0, {k}, 0, -1;", a) == a[np.where(lane >= k, lane - k, lane)]).all()
        groups_of_4 = run(f"xor.b32 %x0, %t, {k}; shfl.sync.idx.b32 %d0, %a0, %x0, 0x1c1f, -1;", a)
        assert (groups_of_4 == a[(lane & 28) | ((lane ^ k) & 3)]).all()
    assert (run("redux.sync.max.s32 %d0, %a0, -1;", a).view(i32) == a.view(i32).max()).all()
    assert (run("redux.sync.add.s32 %d0, %a0, -1;", a) == a.sum(dtype=u32)).all()
    vote = "setp.gt.u32 %g0, %a0, 0x7fffffff; vote.sync.ballot.b32 %d0, %g0, -1;"
    assert (run(vote, a) == sum(1 << i for i, x in enumerate(a.tolist()) if x >> 31)).all()


def test_a_product_of_int8_matrices_by_the_layout_of_the_isa():
    """m16n8k32 as the PTX ISA words it, element by element."""
    a, b = RNG.integers(-128, 128, (16, 32)), RNG.integers(-128, 128, (32, 8))
    registers = np.zeros((6, 32), u32)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(16):
            row = group if i < 4 or 8 <= i < 12 else group + 8
            column = thread * 4 + (i & 3) + (0 if i < 8 else 16)
            registers[i // 4, lane] |= u32((int(a[row, column]) & 255) << 8 * (i % 4))
        for i in range(8):
            row = thread * 4 + (i & 3) + (0 if i < 4 else 16)
            registers[4 + i // 4, lane] |= u32((int(b[row, group]) & 255) << 8 * (i % 4))
    body = """mov.b32 %x0, 7; mov.b32 %x1, -1; mov.b32 %x2, 0; mov.b32 %x3, 0;
        mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32
        {%d0, %d1, %d2, %d3}, {%a0, %a1, %a2, %a3}, {%a4, %a5}, {%x0, %x1, %x2, %x3};"""
    got = run(body, *registers, outputs=4)
    for lane in range(32):
        for i, c in enumerate((7, -1, 0, 0)):
            assert got[i].view(i32)[lane] == (a @ b)[(lane >> 2) + 8 * (i >> 1), lane % 4 * 2 + (i & 1)] + c


def test_lanes_that_took_different_ways_come_together():
    a = words()
    body = """mov.b32 %d0, 0; and.b32 %x0, %a0, 7;
        L0: setp.eq.b32 %g0, %x0, 0; @%g0 bra L1; add.s32 %d0, %d0, %x0; sub.s32 %x0, %x0, 1; bra L0;
        L1: shfl.sync.idx.b32 %d0, %d0, 3, 31, -1;"""
    n = int(a[3] & 7)
    assert (run(body, a) == n * (n + 1) // 2).all()


SHARED_WORD = "mov.b32 %x0, global_smem; shl.b32 %x1, %t, 2; add.s32 %x1, %x1, %x0; st.shared.b32 [%x1], %t;"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %d0, [%p0+256];", "out of bounds"),
        ("mov.b32 %d0, 1; st.global.b32 [%q0+-4], %d0;", "out of bounds|read only"),
        ("ld.global.b32 %d0, [%p0+2];", "misaligned"),
        ("ld.global.v2.b32 {%d0, %d1}, [%p0+4];", "misaligned"),
        ("mov.b32 %d0, 1; st.global.b32 [%p0], %d0;", "read only"),
        ("add.s32 %d0, %x9, 1;", "%x9 is read before it is written"),
        ("setp.gt.u32 %g0, %t, 40; @%g0 bra L; mov.b32 %x9, 1; L: setp.lt.u32 %g1, %t, 4; @%g1 bra M; mov.b32 %d0, 1; M: mov.b32 %d0, %x9;",
         "thread 41: .*%x9 is read before it is written"),
        ("mov.b32 %x0, 0; div.u32 %d0, %a0, %x0;", "division by zero"),
        ("mov.b32 %d0, 7; setp.lt.u32 %g0, %t, 5; @%g0 bra L; redux.sync.add.s32 %d0, %d0, -1; L: mov.b32 %d0, 1;", "lanes of the warp"),
        ("redux.sync.add.s32 %d0, %a0, 15;", "member mask"),
        ("setp.lt.u32 %g0, %t, 32; @%g0 bra L; bar.sync 0; L: mov.b32 %d0, 1;", "not at this barrier"),
        ("mov.b32 %x0, global_smem; ld.shared.b32 %d0, [%x0];", "nothing has written"),
        ("mov.b32 %x0, global_smem; st.shared.b32 [%x0+4096], %t; mov.b32 %d0, 0;", "out of bounds of the 512 bytes"),
        (SHARED_WORD + "ld.shared.b32 %d0, [%x0];", "race on shared"),
        (SHARED_WORD + "bar.warp.sync -1; ld.shared.b32 %d0, [%x0+4];", "race on shared"),
        ("mov.b32 %d0, 1; st.global.b32 [%q0], %d0; sqrt.rz.f32 %d0, %d0;", "unknown instruction"),
    ],
)  # fmt: skip
def test_the_sanitizer_finds(body, message):
    with pytest.raises(PTXError, match=message):
        run(body, words(64), shared=512)


def test_a_barrier_orders():
    body = SHARED_WORD + "BARRIER; ld.shared.b32 %d0, [%x0+4];"
    assert (run(body.replace("BARRIER", "bar.warp.sync -1"), words(32), shared=512) == 1).all()
    assert (run(body.replace("BARRIER", "bar.sync 0"), words(64), shared=512) == 1).all()


def test_programs_that_meet_in_memory_are_found_and_atomics_are_not():
    with pytest.raises(PTXError, match="race on output 0"):
        run("mov.b32 %d0, 1; st.global.b32 [%q0], %d0;", words(64), programs=2)
    counts = run(
        "mov.b32 %x0, 1; mov.b32 %d0, 0; atom.global.add.u32 %d1, [%q2], %x0; mov.b32 %d2, 0; exit;",
        words(64),
        outputs=3,
        programs=2,
    )
    assert counts[2].tolist() == [64] + [0] * 63


def test_a_register_that_was_never_written_can_hold_rubbish():
    body = "setp.gt.u32 %g0, %t, 4; @%g0 bra L; mov.b32 %x9, 1; L: mov.b32 %d0, %x9;"
    assert run(body, words(), undefined=0xA5A5A5A5A5A5A5A5).tolist() == [1] * 5 + [0xA5A5A5A5] * 27


def test_additions_that_ptxas_could_fuse_are_named():
    entry = (
        ".visible .entry k() .reqntid 32 { .reg .b32 %a<4>; mul.f32 %a1, %a0, %a0; add.f32 %a2, %a1, %a0; ADD ret; }"
    )
    fused = [
        machine.load(entry.replace("ADD", x)).fusible
        for x in ("", "sub.f32 %a3, %a0, %a1;", "add.rn.f32 %a3, %a1, %a0;")
    ]
    assert [len(f) for f in fused] == [1, 2, 1]


# ---- Triton's own kernels ---------------------------------------------------------------------------------------------------


@triton.jit
def dot_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TYPE: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x, y = tl.load(a + m[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(x, y, out_dtype=TYPE))


@triton.jit
def sums_kernel(x, out, n, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * n + at, mask=at < n, other=0.0)
    tl.store(out + row * 3, tl.sum(v, 0))
    tl.store(out + row * 3 + 1, tl.max(v, 0))
    tl.store(out + row * 3 + 2, tl.sum(tl.cumsum(v, 0), 0))


@triton.jit
def trans_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.reshape(tl.trans(tl.reshape(tl.load(x + at), (BLOCK // 8, 8))), (BLOCK,)))


FUSION = {"enable_fp_fusion": True}  # said, because Triton's default is about to change


@pytest.fixture(scope="module", params=[80, 90])
def gpu(request):
    with driver.emulated(request.param) as gpu:
        yield gpu


# Of four warps Triton makes wgmma for sm_90, which zo_core's kernels of one warp never have.
@pytest.mark.parametrize(("m", "n", "k"), [(16, 16, 32), (64, 32, 64)])
def test_tl_dot_of_int8(gpu, m, n, k):
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-128, 128, s, generator=g, dtype=torch.int8) for s in ((m, k), (k, n)))
    c = torch.zeros(m, n, dtype=torch.int32)
    dot_kernel[(1,)](a, b, c, m, n, k, tl.int32, num_warps=1, **FUSION)
    assert torch.equal(c, a.int() @ b.int())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tl_dot_of_16_bits(gpu, dtype):
    g = torch.Generator().manual_seed(1)
    a, b, c = (
        torch.randn(16, 32, generator=g).to(dtype),
        torch.randn(32, 16, generator=g).to(dtype),
        torch.zeros(16, 16),
    )
    dot_kernel[(1,)](a, b, c, 16, 16, 32, tl.float32, num_warps=1, **FUSION)
    assert torch.allclose(c, a.float() @ b.float(), atol=1e-5)


@pytest.mark.parametrize("warps", [1, 4])
def test_tl_sum_max_cumsum_and_trans(gpu, warps):
    for n in (1, 100, 1000):
        x, out = torch.randn(5, n, generator=torch.Generator().manual_seed(n)), torch.zeros(5, 3)
        sums_kernel[(5,)](x, out, n, 1024, num_warps=warps, **FUSION)
        running = torch.nn.functional.pad(x, (0, 1024 - n)).cumsum(1).sum(1)
        assert torch.allclose(out[:, 0], x.sum(1), atol=1e-4) and torch.equal(
            out[:, 1], x.amax(1).clamp(min=0) if n < 1024 else x.amax(1)
        )
        assert torch.allclose(out[:, 2], running, rtol=1e-4, atol=1e-2)
    v, swapped = torch.arange(1024, dtype=torch.int32), torch.zeros(1024, dtype=torch.int32)
    trans_kernel[(1,)](v, swapped, 1024, num_warps=warps, **FUSION)
    assert torch.equal(swapped, v.view(128, 8).T.reshape(-1))


def test_a_kernel_that_leaves_its_tensors_is_found(gpu):
    x, out = torch.randn(6, 100)[:5], torch.zeros(15)
    with pytest.raises(
        PTXError, match=r"sums_kernel, test_emulator.py:\d+: .*out of bounds: .*nearest is x of 2000 bytes, 2000 bytes"
    ):
        sums_kernel[(6,)](x, out, 100, 128, num_warps=1, **FUSION)
    with gpu.call(readable=[("x", x)]), pytest.raises(PTXError, match="writes out, which is read only"):
        sums_kernel[(5,)](x, out, 100, 128, num_warps=1, **FUSION)
    with (
        gpu.call(writable=[("out", out)]),
        pytest.raises(PTXError, match="reads torch.empty, which nothing has written"),
    ):
        sums_kernel[(5,)](torch.empty(5, 100), out, 100, 128, num_warps=1, **FUSION)


def test_the_device_before_comes_back():
    before = driver.active_driver._active
    with driver.emulated(80), driver.emulated(90) as inner:
        assert driver.active_driver.active is inner
    assert driver.active_driver._active is before
    with pytest.raises(ValueError, match=re.escape("capability: expected one of 80, ")):
        driver.Emulator(75)
