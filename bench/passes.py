"""What a pass costs, against the published way of doing the same and against copying the weights.

Each row times our fused pass and, in the same rounds, what it replaces: torch.normal or torch.randint and the
arithmetic around it, as MeZO and FZOO publish them; K=8 and K=16 replace as many published updates. The last columns compare
with a plain copy of the tensor, which reads and writes the same bytes. Factored noise, which nobody publishes as a pass, stands
beside random signs, of the same matrix (``--columns``).
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from zo_core.kernels import reference

from . import published
from .harness import console, interleaved, quantiles, ratio, report

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fused(
    weights: Tensor, distribution: str, k: int, stochastic: bool = False, dst: Tensor | None = None,
    hessian: Tensor | None = None, curvature: bool = False, residual: Tensor | None = None,
) -> Callable[[], None]:  # fmt: skip
    """One of our passes, ready to call."""
    device = weights.device
    common = [[hessian] if hessian is not None else [], [0], [], torch.arange(k, device=device)]
    coeffs = torch.full((k, 1), 1e-6, device=device)
    options = {"seed": 1, "distribution": distribution, "counters": torch.zeros(2, dtype=torch.int64, device=device)}
    if residual is not None:
        options["residuals"] = [residual]
    if stochastic:
        options["update"] = torch.zeros(1, dtype=torch.int64, device=device)
    if curvature:
        options |= {"restore": coeffs, "curvature": coeffs, "smoothing": torch.full((1,), 1e-6, device=device)}
    op = torch.ops.zo_core
    if dst is not None:
        return lambda: op.perturb([weights], [dst], *common, coeffs, **options)
    return lambda: op.update_([weights], *common, coeffs, **options)


def gate() -> None:
    """Every pass that is timed must agree with the reference first."""
    for name, dtype in DTYPES.items():
        for distribution in reference.DISTRIBUTIONS:
            for k in (1, 8):
                got, expected = (torch.linspace(-1, 1, 100_800).view(175, 576).to(dtype) for _ in range(2))
                fused(got, distribution, k)()
                reference.run_pass(
                    [expected], [expected], [], [0], [], torch.arange(k), torch.full((k, 1), 1e-6), seed=1,
                    distribution=distribution, counters=torch.zeros(2, dtype=torch.int64),
                )  # fmt: skip
                error = float((got.float() - expected.float()).abs().max())
                if not error <= torch.finfo(dtype).eps:
                    raise SystemExit(
                        f"correctness gate: {name} {distribution} K={k} is off by {error}; no figure is given"
                    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 26, help="of the matrix (default 67,108,864)")
    parser.add_argument(
        "--columns", type=int, default=4096, help="of the matrix (default 4,096), a divisor of its elements"
    )
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds, after one that is not counted")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    gate()
    console.print("correctness gate passed")
    rows, result = [], []
    for name in args.dtypes:
        dtype = DTYPES[name]
        weights = torch.zeros(args.elements, dtype=dtype).view(-1, args.columns)
        other, hessian = torch.empty_like(weights), torch.ones(weights.shape)
        theirs = torch.nn.Parameter(torch.zeros(args.elements, dtype=dtype), requires_grad=False)
        for distribution in reference.DISTRIBUTIONS:
            draw = published.DRAW.get(distribution, published.signs)
            tasks: dict[str, Callable[[], object]] = {
                "published perturb": partial(published.perturb, [theirs], 0, 1, 1e-6, draw),
                "published update": partial(published.update, [theirs], 0, 1e-6, 1.0, draw),
                "copy": partial(other.copy_, weights),
                "in place": fused(weights, distribution, 1),
                "in place, stochastic": fused(weights, distribution, 1, stochastic=True),
                "into a shadow": fused(weights, distribution, 1, dst=other),
                "scaled by H^-1/2": fused(weights, distribution, 1, hessian=hessian),
                "H update": fused(weights, distribution, 1, hessian=hessian, curvature=True),
                "K=8": fused(weights, distribution, 8),
            }
            if distribution == "factored":
                tasks |= {"K=16": fused(weights, distribution, 16)}
                del tasks["H update"]
            if dtype != torch.float32:
                for bits, kept in (8, torch.int8), (16, torch.int16):
                    residual = torch.zeros_like(weights, dtype=kept)
                    tasks[f"in place, {bits}-bit residual"] = fused(
                        weights, distribution, 1, bits == 8, residual=residual
                    )
            seconds = interleaved(tasks, args.rounds, f"{name} {distribution}")
            for task, times in seconds.items():
                factor = int(task[2:]) if task.startswith("K=") else 1
                baseline = "published perturb" if factor == 1 else "published update"
                faster = ratio([factor * s for s in seconds[baseline]], times)
                copies = ratio(times, seconds["copy"])
                ours = task not in ("published perturb", "published update", "copy")
                q = quantiles(times)
                result.append(
                    {"dtype": name, "distribution": distribution, "pass": task, "seconds": q, "elements": args.elements}
                    | ({"times_faster_than_published": faster, "times_a_copy": copies} if ours else {})
                )
                rows.append(
                    [name, distribution, task, f"{q['median'] * 1e3:.1f}", f"{q['p20'] * 1e3:.1f}-{q['p80'] * 1e3:.1f}",
                     f"{args.elements / q['median'] / 1e6:,.0f}", f"{faster['median']:.1f}x" if ours else "",
                     f"{copies['median']:.2f}"]
                )  # fmt: skip
    report(
        f"A pass over {args.elements:,} weights",
        ["dtype", "noise", "pass", "ms", "p20-p80", "M weights/s", "vs published", "x copy"],
        rows, {"passes": result}, args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
