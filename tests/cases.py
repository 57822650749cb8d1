"""Cases of the pass that hold any backend against the reference: a backend is a module with ``run_pass``.

Buffers lie between guard elements, destinations start as NaN, so a lane too many or too few shows. Tolerances: a
backend's normals may be off by ``noise`` (its own bound), float32 arithmetic in another order by a few ulp of what is
added, and a 16-bit result by one ulp where either moves it across a rounding boundary.
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


@dataclass(frozen=True)
class Case:
    """One call. ``dst`` None is in place; ``hessian``: "", "read" or "update"; ``bad``: what is not finite or too large."""

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
    """Arguments of ``run_pass``; ``buffers`` and ``inputs`` beside them."""
    g = torch.Generator().manual_seed(len(str(case)))
    count = len(case.sizes)

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return (torch.rand(shape, generator=g) * (high - low) + low).to(device)

    values = [(torch.randn(n, generator=g) * 0.3).to(device, case.src) for n in case.sizes]
    if case.bad == "weights":
        for v in values:
            v[::5], v[1::7], v[2::11] = float("nan"), float("inf"), float("-inf")
    if case.bad == "range":
        for v in values:
            v[::3], v[1::3] = torch.finfo(case.src).max, torch.finfo(case.src).min
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
    coeffs = uniform(case.k, count, low=-1e-2, high=1e-2)
    if case.k > 1 and count:
        coeffs[:, 0] *= torch.arange(case.k, device=device) % 3 != 1
    if count > 3:
        coeffs[:, 3] = 0  # a tensor without work
    if case.bad == "range":
        coeffs *= 1e38
    if case.bad == "coeffs":
        coeffs[0, 0] = float("nan")
    options: dict[str, Any] = {"counters": torch.zeros(2, dtype=torch.int64, device=device)}
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
    args = (
        src, dst, hessians, [7 * i + (i == 1) * (2**32 - 9) for i in range(count)], list(case.offsets),
        torch.arange(case.k, device=device) * 3 - 1, coeffs,
    )  # fmt: skip
    return {"args": args, "options": options, "buffers": buffers, "inputs": [v.clone() for v in src]}


def run(case: Case, backend: Any, device: str = "cpu") -> dict[str, Any]:
    """``make`` and one call of the backend."""
    job = make(case, device)
    backend.run_pass(*job["args"], seed=SEED, distribution=case.distribution, **job["options"])
    return job


def check(case: Case, backend: Any, noise: float, device: str = "cpu") -> None:
    """Raise AssertionError where the backend is not the reference."""
    got, expected = run(case, backend, device), run(case, reference, device)
    assert got["options"]["counters"].tolist() == expected["options"]["counters"].tolist(), "counters"
    spread = 8.0 if case.distribution == "gaussian" else 1.0
    added = spread * got["args"][6].abs().sum(0)  # most that a tensor can be moved by
    if case.hessian == "update":
        added = added + spread * got["options"]["restore"].abs().sum(0)
    scale = 2.0 if case.hessian else 1.0
    moved = noise if case.distribution == "gaussian" else 0.0
    for i, (x, y) in enumerate(zip(got["args"][1], expected["args"][1], strict=True)):
        assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.isinf(), y.isinf()), f"non-finite values of {i}"
        x, y = x.float().nan_to_num(1, 1, 1), y.float().nan_to_num(1, 1, 1)
        exact = (moved + 6 * EPS[F32]) * scale * added[i].double().nan_to_num() + 4 * EPS[F32] * y.abs()
        dtype = got["args"][1][i].dtype
        ulp = EPS[dtype] * y.abs().clamp(min=torch.finfo(dtype).smallest_normal) if dtype != F32 else 0
        error = (x - y).abs()
        assert bool((error <= exact + ulp).all()), f"tensor {i}: off by {error.max():g} at {int(error.argmax())}"
        if dtype != F32 and x.numel() > 100 and not case.bad:
            share = (error > 0).float().mean()
            assert share <= 0.02, f"tensor {i}: {share:.1%} of the elements differ"
    for i, (x, y) in enumerate(zip(got["args"][2], expected["args"][2], strict=True)):
        assert torch.allclose(x, y, rtol=40 * (moved + EPS[F32]), atol=0), f"hessian {i}"
    for buffer, view in zip(got["buffers"], expected["buffers"], strict=True):
        n = GUARD + case.skewed
        assert torch.equal(buffer[:n], view[:n]) and torch.equal(buffer[-GUARD:], view[-GUARD:]), "wrote outside"
    if case.dst is not None:
        for x, y in zip(got["args"][0], got["inputs"], strict=True):
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
    return cases


CASES = _cases()
