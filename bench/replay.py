"""What it costs to replay steps from their scalars, many a pass, against one pass a step.

Weights are those of SmolLM2-135M in one tensor (--elements), with a coefficient a step as MeZO's journal has it. Before
anything is timed, both ways must leave the same bits. Divide the seconds a run took for its steps by those here to know how much faster a
replay is than the run.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from zo_core.kernels import reference

from .harness import interleaved, quantiles, ratio, report

KINDS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16, residual 8": (torch.bfloat16, torch.int8),
    "bfloat16, residual 16": (torch.bfloat16, torch.int16),
}


def both(
    weights: Tensor, residual: Tensor | None, distribution: str, steps: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The same steps in one call of ``replay_`` and in one call of ``update_`` each."""
    streams = torch.arange(steps).view(-1, 1)
    coeffs = torch.linspace(-1e-5, 1e-5, steps).view(-1, 1, 1)
    residuals = None if residual is None else [residual]
    options = {
        "seed": 1,
        "distribution": distribution,
        "counters": torch.zeros(2, dtype=torch.int64),
        "residuals": residuals,
    }
    rounding = None if weights.dtype == torch.float32 else torch.arange(steps)

    def one_by_one() -> None:
        for s in range(steps):
            update = None if rounding is None else rounding[s]
            torch.ops.zo_core.update_([weights], [], [0], [], streams[s], coeffs[s], update=update, **options)

    replay = partial(torch.ops.zo_core.replay_, [weights], [0], [], streams, coeffs, updates=rounding, **options)
    return replay, one_by_one


def gate(distribution: str, dtype: torch.dtype, residual: torch.dtype | None) -> None:
    """Both ways must leave the same bits."""
    kept = []
    for way in (0, 1):
        weights = torch.linspace(-1, 1, 300_007).to(dtype)
        low = None if residual is None else torch.zeros(weights.shape, dtype=residual)
        both(weights, low, distribution, 20)[way]()
        kept.append((weights, low))
    (a, low_a), (b, low_b) = kept
    if not (torch.equal(a, b) and (low_a is None or low_b is None or torch.equal(low_a, low_b))):
        raise SystemExit(f"correctness gate: {distribution} {dtype} differs from one pass a step; no figure is given")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=134_515_008, help="of the tensor (default SmolLM2-135M's)")
    parser.add_argument("--steps", type=int, default=50, help="in one call (default 50)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds, after one that is not counted")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    rows, result = [], []
    for kind in args.kinds:
        dtype, low = KINDS[kind]
        for distribution in reference.DISTRIBUTIONS:
            gate(distribution, dtype, low)
            weights = torch.zeros(args.elements, dtype=dtype)
            residual = None if low is None else torch.zeros(args.elements, dtype=low)
            replay, one_by_one = both(weights, residual, distribution, args.steps)
            title = f"{kind} {distribution}"
            seconds = interleaved({"replay": replay, "passes": one_by_one}, args.rounds, title)
            a_step = {name: quantiles([s / args.steps for s in times]) for name, times in seconds.items()}
            times_faster = ratio(seconds["passes"], seconds["replay"])
            result.append({"kind": kind, "distribution": distribution, "seconds_a_step": a_step, "ratio": times_faster})
            rows.append([title, *(f"{1e3 * a_step[n]['median']:.1f} ms" for n in seconds), f"{times_faster['median']:.1f}",
                         f"{500 * a_step['replay']['median']:.1f} s"])  # fmt: skip
    shape = f"{args.elements:,} weights, {args.steps} steps a call"
    columns = ["", "replay, a step", "one pass a step", "times faster", "500 steps"]
    report(shape, columns, rows, {"elements": args.elements, "steps": args.steps, "rows": result}, args.json)


if __name__ == "__main__":
    main()
