"""Cases of the pass that hold any backend against the reference: a backend is a module with ``run_pass``.

Buffers lie between guard elements, destinations start as NaN, so a lane too many or too few shows. Tolerances: a
backend's normals may be off by ``noise`` (its own bound), float32 arithmetic in another order by a few ulp of what is
added, and a 16-bit result by one ulp where either moves it across a rounding boundary. With a residual that ulp is the
residual's. Where float32 sums have one order only, every bit of weights and residuals must agree.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from zo_core.kernels import reference

SEED = 0x9E3779B97F4A7C15
GUARD = 16
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EPS = {F32: 2.0**-23, BF16: 2.0**-7, F16: 2.0**-10}
MIXED = ((F16, 8), (BF16, 0), (F32, 0), (BF16, 16), (F16, 16), (BF16, 8), (F16, 0))


@dataclass(frozen=True)
class Case:
    """One call. ``dst`` None is in place; ``hessian``: "", "read" or "update"; ``bad``: what is not finite or too large.

    ``residual``: bits of the residuals of all tensors but the second, which keeps none; ``mixed``: tensor i has the dtype
    and the residual of MIXED[i]. ``columns``: numbers of columns of scales in two factors, taken in turn, 0 for a vector;
    ``widths``: the same of factored noise, of ``rank``. ``moment``: noise is divided by the root of its second moment.
    """

    distribution: str = "gaussian"
    src: torch.dtype = F32
    dst: torch.dtype | None = None
    sizes: tuple[int, ...] = (1500, 3, 0, 130)
    offsets: tuple[int, ...] = ()
    k: int = 1
    decay: bool = False
    stochastic: bool = False
    hessian: str = ""
    skewed: int = 0  # elements by which views start off their alignment
    bad: str = ""
    residual: int = 0
    mixed: bool = False
    columns: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    rank: int = 1
    moment: bool = False

    def kinds(self) -> list[tuple[torch.dtype, int]]:
        """Dtype and bits of the residual, 0 for none, of each tensor of ``src``."""
        if self.mixed:
            return [MIXED[i % len(MIXED)] for i in range(len(self.sizes))]
        return [(self.src, self.residual if i != 1 else 0) for i in range(len(self.sizes))]

    def one_order(self) -> bool:
        """Whether every backend must make the same bits: sums of one addend that is the same for all."""
        return (
            self.distribution != "gaussian"
            and self.k * self.rank <= 1
            and not self.decay
            and not self.hessian
            and not self.columns
        )

    def __str__(self) -> str:
        base = Case()
        shown = [
            str(v).removeprefix("torch.") for n, v in vars(self).items() if n == "distribution" or v != vars(base)[n]
        ]
        return "-".join(shown)


def _guarded(x: Tensor, skewed: int) -> tuple[Tensor, Tensor]:
    """A copy of x inside a larger buffer, and that buffer."""
    buffer = torch.full((x.numel() + 2 * GUARD + skewed,), 7, dtype=x.dtype, device=x.device)
    view = buffer[GUARD + skewed : GUARD + skewed + x.numel()]
    view.copy_(x)
    return view, buffer


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """Arguments of ``run_pass``; ``buffers``, and ``inputs``, copies of src and of residuals, beside them."""
    g = torch.Generator().manual_seed(len(str(case)))
    count = len(case.sizes)

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return (torch.rand(shape, generator=g) * (high - low) + low).to(device)

    kinds = case.kinds()
    values = [(torch.randn(n, generator=g) * 0.3).to(device, t) for n, (t, _) in zip(case.sizes, kinds, strict=True)]
    if case.residual or case.mixed:
        # Subnormal in float16; zero, of which a residual may not change the sign. The first tile has no zero: with one that
        # has a residual below 0 a tile goes element by element, and assembly for whole tiles would decide no result.
        for v in values:
            v[3::13] *= 1e-4
            v[1030::26] *= case.bad == "infinity"
    if case.bad == "weights":
        for v in values:
            v[::5], v[1::7], v[2::11] = float("nan"), float("inf"), float("-inf")
    if case.bad == "infinity":  # in one word of a residual's four in the first tile, in the other one in the second
        for v in values:
            v[:1024:8], v[1:1024:8], v[1026::8], v[1027::8] = (float("inf"), float("-inf")) * 2
    if case.bad == "low":
        for v in values:
            v[::3] = torch.finfo(v.dtype).min
    if case.bad == "range":
        for v in values:
            v[::3], v[1::3] = torch.finfo(v.dtype).max, torch.finfo(v.dtype).min
    pairs = [_guarded(v, case.skewed) for v in values]
    src, buffers = [v for v, _ in pairs], [b for _, b in pairs]
    dst = src
    if case.dst is not None:
        pairs = [_guarded(torch.full((n,), torch.nan, dtype=case.dst, device=device), case.skewed) for n in case.sizes]
        dst, buffers = [v for v, _ in pairs], buffers + [b for _, b in pairs]
    hessians: list[Tensor] = []
    if case.hessian:
        pairs = [_guarded(uniform(n, low=0.5, high=2), case.skewed) for n in case.sizes]
        hessians, buffers = [v for v, _ in pairs], buffers + [b for _, b in pairs]
    scales: tuple[list[Tensor], list[Tensor]] = ([], [])
    for i, size in enumerate(case.sizes if case.columns else ()):
        n = case.columns[i % len(case.columns)]
        end = size + (case.offsets[i] if case.offsets else 0)
        for factors, length in zip(scales, (-(-end // (n or 1)), n), strict=True):
            factors.append(_guarded(uniform(length, low=0.5, high=2), case.skewed)[0])
    residuals: list[Tensor] = []
    if case.residual or case.mixed:
        for v, (_, bits) in zip(values, kinds, strict=True):
            r = torch.randint(-(1 << 15), 1 << 15, v.shape if bits else (0,), generator=g).to(torch.int16)
            if bits and case.bad == "infinity":
                r[v.isinf().cpu()] |= -(1 << 15)  # below zero: taken as numbers, infinities would come to be finite
            view, buffer = _guarded((r if bits == 16 else (r >> 8).to(torch.int8)).to(device), case.skewed)
            residuals, buffers = [*residuals, view], [*buffers, buffer]
    coeffs = uniform(case.k, count, low=-1e-2, high=1e-2)
    if case.k > 1 and count:
        coeffs[:, 0] *= torch.arange(case.k, device=device) % 3 != 1
    if count > 3:
        coeffs[:, 3] = 0  # a tensor without work
    if case.bad == "range":
        coeffs *= 1e38
    if case.bad == "coeffs":
        coeffs[0, 0] = float("nan")
    options: dict[str, Any] = {"counters": torch.zeros(1 + count, dtype=torch.int64, device=device)}
    if residuals:
        options["residuals"] = residuals
    if case.columns:
        options |= {"row_scales": scales[0], "column_scales": scales[1]}
    if case.widths:
        options |= {"rank": case.rank, "columns": [case.widths[i % len(case.widths)] for i in range(count)]}
    if case.decay:
        options["decay"] = uniform(count, low=0, high=0.1)
        if case.bad == "decay":
            options["decay"][-1] = float("inf")
    if case.stochastic:
        options["update"] = torch.tensor([2**32 + 9], device=device)
    if case.hessian == "update":
        options |= {
            "restore": uniform(case.k, count, low=-1e-2, high=1e-2),
            "curvature": uniform(case.k, count, low=0, high=0.5),
            "smoothing": uniform(count, low=0, high=0.5),
            "hessian_min": 0.6,
            "hessian_max": 1.7,
        }
    if case.moment:
        options["squares"] = uniform(case.k, count, low=0.5, high=2)
        if case.bad == "squares":
            options["squares"][0, -1] = float("inf")
    args = (
        src, dst, hessians, [7 * i + (i == 1) * (2**32 - 9) for i in range(count)], list(case.offsets),
        torch.arange(case.k, device=device) * 3 - 1, coeffs,
    )  # fmt: skip
    return {"args": args, "options": options, "buffers": buffers, "inputs": [v.clone() for v in (*src, *residuals)]}


def run(case: Case, backend: Any, device: str = "cpu") -> dict[str, Any]:
    """``make`` and one call of the backend."""
    job = make(case, device)
    backend.run_pass(*job["args"], seed=SEED, distribution=case.distribution, **job["options"])
    return job


def check(case: Case, backend: Any, noise: float, device: str = "cpu") -> None:
    """Raise AssertionError where the backend is not the reference."""
    got, expected = run(case, backend, device), run(case, reference, device)
    assert got["options"]["counters"].tolist() == expected["options"]["counters"].tolist(), "counters"
    spread = 8.0 if case.distribution == "gaussian" else case.rank**0.5
    added = spread * got["args"][6].abs().sum(0)  # most that a tensor can be moved by
    if case.hessian == "update":
        added = added + spread * got["options"]["restore"].abs().sum(0)
    # With a second moment: an error of z counts by 1 / |z|, which is large for few elements.
    scale = 2.0 if case.hessian else 4.0 if case.columns else 20.0 if case.moment else 1.0
    moved = noise if case.distribution == "gaussian" else 0.0
    kinds = case.kinds() if case.dst is None else [(case.dst, 0)] * len(case.sizes)
    for i, ((dtype, bits), x, y) in enumerate(zip(kinds, got["args"][1], expected["args"][1], strict=True)):
        assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.isinf(), y.isinf()), f"non-finite values of {i}"
        if bits:
            rest, expected_rest = (job["options"]["residuals"][i] for job in (got, expected))
            if case.one_order() or i >= len(added) or added[i] == 0:
                assert torch.equal(rest, expected_rest), f"residuals {i}"
            assert torch.equal(rest[~x.isfinite()], expected_rest[~y.isfinite()]), f"residuals of non-finite values {i}"
            weight, x, y = x.double().nan_to_num(1, 1, 1), reference.join(x, rest), reference.join(y, expected_rest)
        x, y = x.float().nan_to_num(1, 1, 1), y.float().nan_to_num(1, 1, 1)
        if bits:
            nearest = (x.to(dtype).double() - x.double()).abs()
            assert torch.equal((weight - x.double()).abs(), nearest), f"weights {i} are not their values rounded"
        exact = (moved + 6 * EPS[F32]) * scale * added[i].double().nan_to_num() + 4 * EPS[F32] * y.abs()
        ulp = EPS[dtype] * 2.0**-bits * y.abs().clamp(min=torch.finfo(dtype).smallest_normal) if dtype != F32 else 0
        error = (x - y).abs()
        assert bool((error <= exact + ulp).all()), f"tensor {i}: off by {error.max():g} at {int(error.argmax())}"
        if case.one_order():
            assert not error.any(), f"tensor {i}: {int((error > 0).sum())} elements differ"
        elif dtype != F32 and not bits and x.numel() > 100 and not case.bad:
            share = (error > 0).float().mean()
            assert share <= 0.02, f"tensor {i}: {share:.1%} of the elements differ"
    for i, (x, y) in enumerate(zip(got["args"][2], expected["args"][2], strict=True)):
        assert torch.allclose(x, y, rtol=40 * (moved + EPS[F32]), atol=0), f"hessian {i}"
    for buffer, view in zip(got["buffers"], expected["buffers"], strict=True):
        n = GUARD + case.skewed
        assert torch.equal(buffer[:n], view[:n]) and torch.equal(buffer[-GUARD:], view[-GUARD:]), "wrote outside"
    if case.dst is not None:
        for x, y in zip((*got["args"][0], *got["options"].get("residuals", ())), got["inputs"], strict=True):
            assert torch.equal(x.nan_to_num(1), y.nan_to_num(1)), "wrote its source"


def _cases() -> list[Case]:
    both = ("gaussian", "rademacher")
    cases = [Case(d, t, stochastic=s) for d in both for t in EPS for s in (False, True)]
    cases += [Case(d, s, t, stochastic=r) for d in both for s, t, r in (
        (F32, BF16, True), (F32, F16, False), (BF16, BF16, False), (BF16, F32, False), (F16, F16, True), (F16, BF16, True),
    )]  # fmt: skip
    cases += [Case(d, t, sizes=(2100, 129, 1, 5), offsets=(2**34 + 1003, 1, 127, 64), k=k)
              for d in both for t, k in ((F32, 2), (BF16, 3))]  # fmt: skip
    cases += [Case(d, F32, offsets=(1024, 0, 5, 3), k=k, decay=True) for d in both for k in (0, 2, 5)]
    cases += [Case(d, t, k=k, hessian=h, decay=h == "update", stochastic=t is BF16)
              for d in both for t in (F32, BF16) for k, h in ((1, "read"), (1, "update"), (3, "update"))]  # fmt: skip
    cases += [Case(d, t, dst=s, k=2, skewed=3) for d in both for t, s in ((BF16, None), (F32, F16))]
    cases += [
        Case(d, t, bad=b, stochastic=s) for d in both for t in EPS for b, s in (("weights", True), ("range", False))
    ]
    cases += [Case("rademacher", BF16, bad="range", stochastic=True), Case("gaussian", F16, bad="weights")]
    cases += [
        Case(b and "gaussian", F32, k=2, decay=True, bad=b, dst=t) for b in ("coeffs", "decay") for t in (None, BF16)
    ]
    cases += [Case("gaussian", F16, F16, bad="range"), Case("gaussian", BF16, sizes=(), k=2), Case(sizes=(0,))]
    cases += [Case("rademacher", t, sizes=(2300, 40), offsets=(1024, 3), k=k) for t in (F32, BF16) for k in (8, 13, 40)]
    cases += [
        Case(d, t, residual=r, stochastic=s) for d in both for t in (BF16, F16) for r in (8, 16) for s in (False, True)
    ]
    cases += [Case(d, t, o, k=k, residual=r, stochastic=s) for t, o, r, s in (
        (BF16, BF16, 8, True), (BF16, F32, 16, False), (F16, F16, 16, True), (F16, BF16, 8, False), (F16, F32, 8, False),
    ) for d, k in (("gaussian", 1), ("rademacher", 1), ("rademacher", 0))]  # fmt: skip
    cases += [Case(d, t, bad=b, residual=r, stochastic=r == 8)
              for d, b in (("gaussian", "weights"), ("rademacher", "range")) for t in (BF16, F16) for r in (8, 16)]  # fmt: skip
    cases += [Case("gaussian", BF16, bad="coeffs", residual=8), Case("rademacher", BF16, F32, bad="range", residual=16)]
    cases += [
        Case("rademacher", BF16, t, sizes=(2100,), bad="infinity", residual=r) for t in (None, F32) for r in (8, 16)
    ]
    cases += [Case("rademacher", F16, bad="low"), Case("gaussian", F16, F16, bad="low")]
    # decay would bring an infinity with a residual below 0 back into the range, were it read as a number
    cases += [Case("gaussian", BF16, t, bad="weights", residual=r, decay=True) for t in (None, BF16) for r in (8, 16)]
    cases += [Case(d, sizes=(2100, 129, 40, 5, 2200, 300, 77), offsets=(2**34 + 1003, 1, 127, 64, 0, 2047, 5), k=k,
                   mixed=True, decay=k > 1, hessian=h, stochastic=s, skewed=k)
              for d in both for k, h, s in ((1, "", True), (1, "", False), (3, "", True), (2, "read", True),
                                            (9, "update", False))]  # fmt: skip
    cases += [
        Case(d, t, columns=c, stochastic=t is F16) for d in both for t in EPS for c in ((1, 3, 8), (0,), (64, 100))
    ]
    cases += [Case(d, t, o, sizes=(2600, 1500, 2100, 5), offsets=offsets, k=k, decay=k > 1, columns=c)
              for d in both for t, o, k, c, offsets in (
                  (F32, None, 1, (24, 0, 1000), ()), (F32, BF16, 2, (1024, 1032, 7), (1024, 77, 5, 0)),
                  (BF16, None, 1, (4096, 0, 64), (2**20, 2048, 3, 0)), (BF16, F32, 3, (4100, 16, 1 << 20), ()),
                  (F16, F16, 9, (2056, 40, 131), (9, 0, 1030, 7)),
              )]  # fmt: skip
    cases += [Case(d, F32, sizes=(2100, 129, 1, 5), offsets=(2**34 + 1003, 1, 127, 64), k=2, columns=((1 << 22) + 8, 3))
              for d in both]  # fmt: skip
    cases += [Case(d, BF16, sizes=(5200, 7200), offsets=(0, 1024), columns=(1032, 4096)) for d in both]
    cases += [Case(d, BF16, residual=r, stochastic=s, k=k, columns=(24, 1, 0), decay=True)
              for d in both for r, s, k in ((8, True, 1), (16, True, 2), (8, False, 3))]  # fmt: skip
    cases += [Case(d, sizes=(2100, 1290, 40, 5, 2200, 300, 77), offsets=(1024, 1, 127, 64, 0, 2047, 5), k=k, mixed=True,
                   stochastic=True, skewed=k - 1, columns=(16, 8, 0, 3, 1024))
              for d, k in (("gaussian", 2), ("rademacher", 9))]  # fmt: skip
    cases += [Case("gaussian", BF16, bad="weights", columns=(8,)), Case("rademacher", F16, bad="range", columns=(8, 3)),
              Case("gaussian", F32, sizes=(), columns=(8,)), Case("gaussian", BF16, bad="coeffs", columns=(8,))]  # fmt: skip

    cases += [Case("gaussian", t, k=k, moment=True, residual=r, decay=k != 2, stochastic=s) for t, k, r, s in (
        (F32, 1, 0, False), (F32, 3, 0, False), (BF16, 2, 0, True), (BF16, 3, 8, True), (F16, 10, 16, False))]  # fmt: skip
    cases += [Case("gaussian", sizes=(2100, 129, 40, 5, 2200, 300, 77), offsets=(2**34 + 1003, 1, 127, 64, 0, 2047, 5), k=4,
                   mixed=True, stochastic=True, skewed=1, moment=True),
              Case("gaussian", BF16, bad="weights", moment=True), Case("gaussian", F32, bad="squares", k=2, moment=True)]  # fmt: skip

    def factored(*args: Any, **given: Any) -> Case:
        """Narrow rows, a vector, and rows that a backend may cut into blocks; tensors that start and end inside of rows."""
        shapes = {
            "sizes": (4700, 131, 40, 5, 2300),
            "offsets": (1003, 0, 2**34 + 7, 3, 517),
            "widths": (320, 0, 3, 8, 257),
        }
        return Case("factored", *args, **{**shapes, **given})

    cases += [factored(t, stochastic=s) for t in EPS for s in (False, True)]
    cases += [
        factored(BF16, BF16, k=3, rank=2),
        factored(F32, F16, k=9, decay=True),
        factored(F16, BF16, rank=19, skewed=3),
    ]
    cases += [factored(BF16, k=2, residual=r, stochastic=True, decay=True) for r in (8, 16)] + [
        factored(F32, k=0, decay=True)
    ]
    cases += [
        factored(BF16, hessian="read", k=2),
        factored(F16, columns=(7, 64), k=2, offsets=(1003, 0, 70, 3, 517)),
    ]
    cases += [factored(BF16, bad="weights", decay=True), factored(F16, F16, bad="range"), factored(F32, bad="coeffs")]
    cases += [factored(F32, mixed=True, k=k, sizes=(9000, 129, 40, 5, 2200, 6000, 77), offsets=(), stochastic=True, decay=True)
              for k in (1, 5)]  # fmt: skip
    cases += [factored(F32, sizes=(2900, 77), offsets=(2**46 - 1500, 2**40), widths=(2**45 + 3, 2**20 + 1), k=2)]
    cases += [factored(BF16, F32, sizes=(70000,), offsets=(), widths=(4096,), k=2)]
    return cases


CASES = _cases()
