"""Where gradient and curvature sit, by kind of tensor, and what scales by kind could gain: exact figures beside ``calibrate``'s.

By backpropagation on SmolLM2-135M: |g|^2 of --batches batches, and without their noise; the trace of the Gauss-Newton matrix, which for
a choice between two label words with probability p is p (1 - p) |gradient of the difference of their logits|^2, of
--sentences sentences. Then ``zo_core.calibrate``. Progress of a step at its best rate is G^2 / (G_b C), with G and G_b the sums of
sigma^2 |g|^2 without and with a batch's noise, C that of sigma^2 times the trace; in parentheses with 2 sum sigma^4 g^T H g, by
products with the Hessian on one batch, added to G_b C.

    python -m bench.scales --json bench/results/scales.json
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zo_core
from zo_core.integrations import tasks
from zo_core.integrations.config import EARLIER, FinetuneConfig
from zo_core.integrations.session import Session, prepare

from .harness import console, report

Figures = dict[str, float]  # by kind


def by_kind(kinds: Mapping[str, Sequence[int]], one: Sequence[Tensor], other: Sequence[Tensor]) -> Figures:
    """The inner products of two lists of tensors, by kind."""
    return {k: sum(float((one[i] * other[i]).sum(dtype=torch.float64)) for i in which) for k, which in kinds.items()}


def mean(rows: Sequence[Figures]) -> Figures:
    """The mean of each kind."""
    return {k: sum(row[k] for row in rows) / len(rows) for k in rows[0]}


def exact(session: Session, kinds: Mapping[str, Sequence[int]], batches: int, sentences: int) -> dict[str, Any]:
    """|g|^2 of batches and of what they have in common, the trace, and g^T H g of the mean gradient, by kind."""
    params, scorer = list(session.model.parameters()), session.scorer
    total, squares, traces = [torch.zeros_like(p) for p in params], list[Figures](), list[Figures]()
    for number in range(batches):
        with torch.enable_grad():
            gradient = torch.autograd.grad(scorer.loss(session.batch_of(number)), params)
        squares.append(by_kind(kinds, gradient, gradient))
        for t, g in zip(total, gradient, strict=True):
            t.add_(g, alpha=1 / batches)
    size, train = session.config.batch_size, session.parts["train"]
    numbers = [
        i
        for b in range(-(-sentences // size))
        for i in tasks.batch_indices(len(train), size, step=b, seed=session.config.seed)
    ]
    for i in numbers[:sentences]:
        with torch.enable_grad():
            logits = scorer(scorer.batch([train[i]]))[0]
            gradient = torch.autograd.grad(logits[1] - logits[0], params)
        weight = float(logits.detach().softmax(0).prod())
        traces.append({k: weight * x for k, x in by_kind(kinds, gradient, gradient).items()})
    session.model.set_attn_implementation("eager")  # whose backward can be differentiated
    along: Figures = {}
    for kind, which in kinds.items():
        with torch.enable_grad():
            part = [params[i] for i in which]
            gradient = torch.autograd.grad(scorer.loss(session.batch_of(0)), part, create_graph=True)
            slope = torch.stack([(g * total[i]).sum() for g, i in zip(gradient, which, strict=True)]).sum()
            product = torch.autograd.grad(slope, part)
        along |= by_kind({kind: range(len(part))}, product, [total[i] for i in which])
    common = by_kind(kinds, total, total)
    return {
        "batches": squares,
        "batch": (b := mean(squares)),
        "common": {k: (batches * common[k] - b[k]) / (batches - 1) for k in kinds},
        "trace": mean(traces),
        "along": {k: x * sum(common.values()) ** -1 for k, x in along.items()},
    }


def progress(found: Mapping[str, Any], scales: Figures, more: bool = False) -> float:
    """G^2 / (G_b C), or with the term along the gradient."""

    def total(name: str, power: int = 2) -> float:
        return float(sum(scales[k] ** power * x for k, x in found[name].items()))

    along = 2 * total("along", 4) * sum(found["common"].values())
    return float(total("common") ** 2 / (total("batch") * total("trace") + along * more))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="reviews")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--sentences", type=int, default=96)
    parser.add_argument("--evaluations", type=int, default=48)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    config = FinetuneConfig(model=args.model, data=args.data, method="mezo", steps=1, autocast=False, **EARLIER)
    session = prepare(config, lambda text: console.print(text, style="dim"))
    kinds: dict[str, list[int]] = {}
    for i, kind in enumerate(zo_core.scales.kinds(session.model).values()):
        kinds.setdefault(kind, []).append(i)
    sizes = [p.numel() for p in session.model.parameters()]
    measured = {seed: session.calibrate(config.model_copy(update={"seed": seed}).optimizer(session.model), args.evaluations)
                for seed in args.seeds}  # fmt: skip
    found = exact(session, kinds, args.batches, args.sentences)
    found["weights"] = {k: float(sum(sizes[i] for i in which)) for k, which in kinds.items()}
    found["calibrate"] = {seed: [k._asdict() for k in c.kinds] for seed, c in measured.items()}

    def share(name: str, kind: str) -> float:
        return float(found[name][kind] / sum(found[name].values()))

    columns = ["kind", "weights", "|g|²", "trace", "ratio", *(f"slope²; scale, seed {s}" for s in measured)]
    rows = []
    chosen = {s: {k: c[next(n for n, x in zo_core.scales.kinds(session.model).items() if x == k)] for k in kinds}
              for s, c in measured.items()}  # fmt: skip
    for kind in kinds:
        shares = [share(name, kind) for name in ("weights", "common", "trace")]
        slopes = [
            {k.name: f"{k.slope2:.1f} ± {k.slope2_error:.1f}" for k in c.kinds}.get(kind, "-")
            for c in measured.values()
        ]
        scales = [f"{x}; {chosen[s][kind]:.2f}" for s, x in zip(measured, slopes, strict=True)]
        rows.append([kind, *(f"{x:.2%}" for x in shares), f"{shares[1] / shares[2]:.2f}", *scales])
    report("where gradient and curvature sit", columns, rows)
    dense = {k: share("common", k) / share("weights", k) for k in kinds}
    every = [dict(zip(kinds, x, strict=True)) for x in itertools.product((0.5, 2.0), repeat=len(kinds))]
    tried = {
        "sigma^2 ~ |g|^2 per weight": [{k: max(x, 0.0) ** 0.5 for k, x in dense.items()}],
        "sigma^2 ~ its square root": [{k: max(x, 0.0) ** 0.25 for k, x in dense.items()}],
        **{f"calibrate, seed {seed}": [scales] for seed, scales in chosen.items()},
        "the best between 1/2 and 2": every,
    }
    one = dict.fromkeys(kinds, 1.0)
    found["gains"] = {
        name: [max(progress(found, s, more) for s in some) / progress(found, one, more) for more in (False, True)]
        for name, some in tried.items()
    }
    rows = [[name, f"{plain:.2f}", f"{more:.2f}"] for name, (plain, more) in found["gains"].items()]
    report("progress of a step", ["scales", "over none", "with g^T H g"], rows, found, args.json)


if __name__ == "__main__":
    main()
