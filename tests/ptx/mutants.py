"""Faults put into the Triton kernels on purpose, each of which the emulator's lane must find.

A mutant replaces text that occurs exactly once in a file of ``kernels/triton``; a text that was renamed makes ``load`` fail, so
that the list stays true. Its check is a case of tests/cases.py, or a function of the backend that raises where it is wrong. To
add one: a line below, whose check passes on the kernels as they are and fails on the mutant.
"""

import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import BF16, F16, F32, Case, check
from zo_core.kernels import reference

from zo_core import kernels

from .backend import watch

KERNELS = Path(next(iter(kernels.__path__))) / "triton"


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    check: object  # a Case, or a function of the backend

    def found_by(self, backend):
        """Raise where the backend is wrong."""
        check(self.check, backend, noise=1e-5) if isinstance(self.check, Case) else self.check(backend)


def load(mutant, folder):
    """The backend with this fault: a package of its own beside ``zo_core.kernels.triton``, from a copy in ``folder``."""
    copy = folder / f"mutant_{mutant.name.replace(' ', '_')}"
    shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / mutant.file).read_text()
    if (count := source.count(mutant.old)) != 1:
        raise ValueError(f"mutant {mutant.name!r}: {mutant.file} has its text {count} times, not once: {mutant.old!r}")
    (copy / mutant.file).write_text(source.replace(mutant.old, mutant.new))
    name = f"zo_core.kernels.{copy.name}"
    spec = importlib.util.spec_from_file_location(name, copy / "__init__.py", submodule_search_locations=[str(copy)])
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    watch(module)
    return module


# ---- checks that are no case of a pass --------------------------------------------------------------------------------------


def words(backend):
    """300 blocks, after and before others that must stay."""
    got, expected = (torch.full((302, 4), -1, dtype=torch.int32) for _ in range(2))
    for module, out in ((backend, got), (reference, expected)):
        module.philox_(out[1:-1], domain=2, tensor_id=7, stream=1 << 31, block=(1 << 32) - 100, seed=(1 << 63) + 5)
    assert torch.equal(got, expected)


def rows(backend):
    """Gathered rows, of which none lies where it lay in the matrix."""
    src, names = torch.linspace(-1, 1, 5 * 1100).view(5, 1100), torch.tensor([3, 0, 3])
    got, expected = (torch.full((3, 1100), torch.nan) for _ in range(2))
    for module, out in ((backend, got), (reference, expected)):
        module.run_rows(
            src, names, out, 5, 1024, torch.tensor([4]), torch.tensor([[0.5]]), seed=9, distribution="rademacher",
            counters=torch.zeros(2, dtype=torch.int64),
        )  # fmt: skip
    assert torch.equal(got, expected)


SIGNS, NORMALS = "rademacher", "gaussian"
PLAIN, NORMAL = Case(SIGNS, F32), Case(NORMALS, F32)
WHOLE = (2100,)  # two whole tiles, and a part
JOIN_16, JOIN_8 = (Case(SIGNS, BF16, F32, residual=r, sizes=WHOLE) for r in (16, 8))
INFINITE_16, INFINITE_8 = (Case(SIGNS, BF16, F32, residual=r, bad="infinity", sizes=WHOLE) for r in (16, 8))
KEEP_16, KEEP_8, KEEP_8_RANDOM = (
    Case(SIGNS, BF16, residual=r, stochastic=s) for r, s in ((16, False), (8, False), (8, True))
)
JOIN_HALF = Case(SIGNS, F16, F32, k=0, residual=8)
UPDATE = Case(NORMALS, F32, k=1, hessian="update", decay=True)
SUMS = Case(SIGNS, F32, sizes=(2300, 40), offsets=(1024, 3), k=13)
MOMENT = Case(NORMALS, F32, k=2, moment=True)
FACTORS = Case(SIGNS, BF16, columns=(64, 100))
PRODUCTS = Case("factored", BF16, BF16, sizes=(2300, 40), offsets=(1003, 7), widths=(320, 3))
FIVES = Case("factored", F32, sizes=(2300, 40), offsets=(1003, 7), widths=(320, 3), k=4, rank=3)

MUTANTS = (
    Mutant("join 16 swaps halves", "residuals.py", "$0, $3, 0x001, a;", "$0, $3, 0x100, a;", JOIN_16),
    Mutant("join 16 keeps the place of the upper half", "residuals.py", "$1, $3, 0x100, b;", "$1, $3, 0x001, b;", JOIN_16),
    Mutant("join 16 takes infinity as a number", "residuals.py", "fma.rn.bf16x2 w, $2, z, $2;", "mov.b32 w, $2;", INFINITE_16),
    Mutant("join 8 takes infinity as a number", "residuals.py", "fma.rn.bf16x2 v, $4, z, $4;", "mov.b32 v, $4;", INFINITE_8),
    Mutant("join 8 takes infinity as a number in the second word", "residuals.py", "fma.rn.bf16x2 w, $5, z, $5;", "mov.b32 w, $5;", INFINITE_8),
    Mutant("join 8 takes a byte of the lower pair", "residuals.py", "dp2a.hi.s32.s32 $2, low, $6, c;", "dp2a.lo.s32.s32 $2, low, $6, c;", JOIN_8),
    Mutant("join 8 takes a byte as unsigned", "residuals.py", "dp2a.lo.s32.s32 $1, high, $6, b;", "dp2a.lo.s32.u32 $1, high, $6, b;", JOIN_8),
    Mutant("join 8 weighs a byte with a sixteenth", "residuals.py", "mov.b32 high, 0x1000000;", "mov.b32 high, 0x100000;", JOIN_8),
    Mutant("split 16 packs the upper halves as residuals", "residuals.py", "prmt.b32 $1, $2, $3, 0x5410;", "prmt.b32 $1, $2, $3, 0x7632;", KEEP_16),
    Mutant("split 16 rounds at a quarter", "residuals.py", "add.u32 a, $2, 0x8000;", "add.u32 a, $2, 0x4000;", KEEP_16),
    Mutant("split 8 carries into the wrong bit", "residuals.py", "shr.u32 low, low, 15;", "shr.u32 low, low, 14;", KEEP_8),
    Mutant("split 8 packs a wrong byte", "residuals.py", "low, high, 0x7531;", "low, high, 0x7521;", KEEP_8),
    Mutant("split 8 rounds with a wrong constant", "residuals.py", "add.u32 b, $4, 0x80;", "add.u32 b, $4, 0x40;", KEEP_8),
    Mutant("split 8 stochastic takes the lower byte", "residuals.py", "c, $8, 0x100, $5;", "c, $8, 0x1, $5;", KEEP_8_RANDOM),
    Mutant("the definition loses the sign", "residuals.py", "((bits >> 15) << 31)", "((bits >> 14) << 31)", JOIN_HALF),
    Mutant("subnormals of float16 end too early", "residuals.py", "u >= 1 << 26, normal", "u >= 1 << 25, normal", JOIN_HALF),
    Mutant("philox adds a wrong constant to its key", "noise.py", "k1.to(tl.uint64) + _W1", "k1.to(tl.uint64) + _W0", words),
    Mutant("philox rotates a word", "noise.py", "c1 = (p1 & 0xFFFFFFFF)", "c1 = (p0 & 0xFFFFFFFF)", words),
    Mutant("a wrong radius", "noise.py", "1.1774100225154747", "1.1773", NORMAL),
    Mutant("sine and cosine change places", "noise.py", "return r * _cos(phi), r * _sin(phi)", "return r * _sin(phi), r * _cos(phi)", NORMAL),
    Mutant("a wrong angle", "noise.py", "1.4629180792671596e-09", "1.4629e-09", NORMAL),
    Mutant("signs are shifted by one", "noise.py", "(31 - tl.arange(0, 32))", "(30 - tl.arange(0, 32))", PLAIN),
    Mutant("signs are inverted", "noise.py", "words ^ 0xFFFFFFFF, SHAPE", "words, SHAPE", PLAIN),
    Mutant("random halves change places", "rounding.py", "tl.join(words & 0xFFFF, words >> 16)", "tl.join(words >> 16, words & 0xFFFF)", Case(SIGNS, BF16, stochastic=True)),
    Mutant("stochastic rounding has half the range", "rounding.py", "b = (b + random) >> 16", "b = (b + (random >> 1)) >> 16", Case(SIGNS, BF16, stochastic=True)),
    Mutant("float16 takes a bit too many at random", "rounding.py", "(magnitude + (random >> 3))", "(magnitude + (random >> 2))", Case(SIGNS, F16, stochastic=True)),
    Mutant("a digit has a wrong weight", "sums.py", "(d3 * 128 + d2)", "(d3 * 64 + d2)", SUMS),
    Mutant("bit 7 has a positive weight", "sums.py", "-64 * total, 128 * total", "-64 * total, -128 * total", SUMS),
    Mutant("a bit is taken twice", "sums.py", "_bits(words, 5)", "_bits(words, 4)", SUMS),
    Mutant("a digit's range is off by one", "sums.py", "low = ((whole + 64) & 127) - 64", "low = ((whole + 63) & 127) - 64", SUMS),
    Mutant("totals are subtracted", "sums.py", "total += tl.sum(value, axis=1)", "total -= tl.sum(value, axis=1)", SUMS),
    Mutant("the gate is open to what is not finite", "gate.py", "tl.store(go, all_finite)", "tl.store(go, 1)", Case(SIGNS, F32, bad="coeffs")),
    Mutant("a void pass counts twice", "gate.py", "tl.atomic_add(counters, tl.full((), 1, tl.int64))", "tl.atomic_add(counters, tl.full((), 2, tl.int64))", Case(SIGNS, F32, bad="coeffs")),
    Mutant("the range of a tile is that of its positive numbers", "rounding.py", "tl.max(tl.abs(x).to(", "tl.max(x.to(", Case(SIGNS, F16, bad="low")),
    Mutant("every number is in range", "rounding.py", "& 0x40000000)", "& 0x00000000)", Case(SIGNS, F16, bad="low")),
    Mutant("a bit of an upper weight is lost", "residuals.py", "and.b32 $1, $2, 0xffff0000", "and.b32 $1, $2, 0xfffe0000", Case(SIGNS, BF16)),
    Mutant("a mask is off by one", "passes.py", "(at < row.end - start)", "(at <= row.end - start)", PLAIN),
    Mutant("a tile that is not whole is taken for one", "passes.py", "tl.minimum(stop, row.end // TILE)", "tl.minimum(stop, (row.end + 1) // TILE)", Case(SIGNS, F32, sizes=(2047,))),
    Mutant("the Hessian has no floor", "passes.py", "call.hessian_min), ", "0.0), ", UPDATE),
    Mutant("curvature is not squared", "streams.py", "tl.fma(z * z, stream.curvature, squares)", "tl.fma(z, stream.curvature, squares)", UPDATE),
    Mutant("a second moment has no root", "passes.py", "inverse(root(squares) + FLOOR)", "inverse(squares + FLOOR)", MOMENT),
    Mutant("the gate is open to squares that are not finite", "gate.py", "finite, _ = _add(curvature", "finite, _ = _add(coeffs", Case(NORMALS, F32, k=2, moment=True, bad="squares")),
    Mutant("decay grows", "passes.py", "keep = 1 - tl.load(", "keep = 1 + tl.load(", UPDATE),
    Mutant("rows of factors are too long", "places.py", "(1 << 31) // tl", "(1 << 30) // tl", FACTORS),
    Mutant("rows have the signs of columns", "factored.py", "_programs(ROWS, top", "_programs(COLUMNS, top", PRODUCTS),
    Mutant("rows end a column early", "places.py", "x = short - ", "x = 8 + short - ", PRODUCTS),
    Mutant("columns of a careful tile are off by one", "places.py", "(place.column + at -", "(place.column + at + 1 -", PRODUCTS),
    Mutant("factors of a stream are all the first", "factored.py", "s = signs(key, stream, 8, above | ((term % rank).to(tl.uint32) << 8))", "s = signs(key, stream, 8, above)", FIVES),
    Mutant("the last term is dropped", "factored.py", "mask=term < n_terms, other=0.0)", "mask=term < n_terms - 1, other=0.0)", FIVES),
    Mutant("coefficients are not divided by the root of the rank", "factored.py", "other=0.0) * root", "other=0.0)", FIVES),
    Mutant("the second five has a term of the first", "factored.py", "shr.u32 x, x, 5;", "shr.u32 x, x, 4;", FIVES),
    Mutant("upper lanes are not asked", "factored.py", "shfl.sync.idx.b32 $0, $4, x, 31,", "shfl.sync.idx.b32 $0, $4, x, 15,", FIVES),
    Mutant("the second element has a bit of the first", "factored.py", "shr.u32 y, x, 16;", "shr.u32 y, x, 15;", FIVES),
    Mutant("a step is left out", "factored.py", "range(1, made.n_steps)", "range(2, made.n_steps)", FIVES),
    Mutant("saturated elements count once", "rounding.py", "tl.sum(beyond.to(tl.int32))", "tl.max(beyond.to(tl.int32))", Case(SIGNS, F16, F16, bad="range")),
    Mutant("words are written past the end", "noise.py", "mask = (row >= 0) & (row < n)", "mask = (row >= 0) & (row <= n)", words),
    Mutant("gathered rows are read one too far", "rows.py", "source = tl.load(rows + j)", "source = tl.load(rows + j) + 1", rows),
)  # fmt: skip
