"""Which estimator of a step promises the most progress for a forward of one example: a screen that is much cheaper than training.

A step moves the weights by -lr d, d = sum_k c_k z_k. On a loss L with gradient G and Hessian H,

    L(theta - lr d) - L(theta) = -lr G.d + lr^2 / 2 d'Hd + ...

so that steps of the best constant rate, lr = E[G.d] / E[d'Hd], lower L by E[G.d]^2 / (2 E[d'Hd]) each on average. The figure of
merit is that decrease divided by the forwards of one example that a step takes; the table gives it relative to MeZO's.

Losses of many examples, each by itself, are measured once at theta +- eps z_k for many probes. Every estimator is then a choice of
probes and examples among them, drawn thousands of times without another forward. G is computed by backpropagation on a large
batch of other examples, so that G.z_k is exact; the mean of its square over all z is |G|^2, by which the mean over the probes
measured here is corrected. Different probes are orthogonal but for 1 / sqrt(d), so that d'Hd = h |d|^2, with h the mean over probes
of z'Hz / |z|^2.

What it cannot say: how wide the range of good rates is, what happens over many steps, what methods with a memory of earlier steps
(momentum, HiZOO) gain. That takes training: python -m bench.methods. Every probe's losses are in the JSON as soon as they are
there; an interrupted screen goes on where it was.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from zo_core.integrations import tasks
from zo_core.integrations.config import EARLIER, FinetuneConfig
from zo_core.integrations.session import Session, prepare

from .harness import console, keep, load, machine, report
from .methods import without_long

EXAMPLES = """examples:
  python -m bench.screen                                     signs at eps 1e-3, 48 probes of 64 examples
  python -m bench.screen --distribution gaussian --eps 3e-3
  python -m bench.screen --probes 0                          the tables of what is in the JSON
"""
Array = np.ndarray[Any, Any]


# ---- what is measured: losses of each example at theta and at theta +- eps z_k ------------------------------------------


class Point:
    """A model in float32 with the gradient of a large batch, and the examples whose losses are measured.

    Args:
        session: model and data.
        large: how many training examples the gradient is of.
        examples: how many others are measured one by one.
    """

    def __init__(self, session: Session, large: int, examples: int) -> None:
        self.session, train = session, session.parts["train"]
        self.parameters: list[Tensor] = list(session.model.parameters())
        self.weights = [p.detach().clone() for p in self.parameters]
        for batch in track(self._batches(train[:large]), "the gradient", console=console, transient=True):
            share = len(batch.labels) / large
            (session.scorer.loss(batch) * share).backward()  # type: ignore[no-untyped-call]
        self.gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        session.model.zero_grad(set_to_none=True)
        self.batches = self._batches(train[large : large + examples])
        self.clean = self.losses()

    def _batches(self, examples: list[tasks.Encoded]) -> list[tasks.Batch]:
        """Batches of 32 of similar lengths, which need little padding."""
        order = sorted(examples, key=lambda e: len(e.tokens))
        return [self.session.scorer.batch(order[i : i + 32]) for i in range(0, len(order), 32)]

    @torch.no_grad()
    def losses(self) -> list[float]:
        """The loss of each example at the model's weights."""
        scorer, found = self.session.scorer, list[float]()
        for batch in self.batches:
            found += torch.nn.functional.cross_entropy(scorer(batch), batch.labels, reduction="none").tolist()
        return found

    @torch.no_grad()
    def probe(self, number: int, eps: float, noise: dict[str, Any]) -> dict[str, Any]:
        """Losses of each example at theta + eps z and theta - eps z, G.z and |z|^2, of a probe; the weights are put back."""

        def move(by: float) -> None:
            coeffs = torch.full((1, len(self.parameters)), by)
            torch.ops.zo_core.update_(
                self.parameters, [], list(range(len(self.parameters))), [], torch.tensor([number]), coeffs,
                counters=torch.zeros(1 + len(self.parameters), dtype=torch.int64), **noise,
            )  # fmt: skip

        try:
            move(eps)
            plus, slope, square = self.losses(), 0.0, 0.0
            for p, w, g in zip(self.parameters, self.weights, self.gradient, strict=True):
                z = (p - w).flatten().div_(eps)
                slope += float(torch.dot(z, g.flatten()))
                square += float(torch.dot(z, z))
            move(-2 * eps)
            minus = self.losses()
        finally:
            for p, w in zip(self.parameters, self.weights, strict=True):
                p.copy_(w)
        return {"plus": plus, "minus": minus, "slope": slope, "square": square}


# ---- estimators: coefficients of n probes from the losses of B examples each -------------------------------------------


def central(plus: Array, minus: Array, clean: Array, eps: float) -> Array:
    """MeZO: projected gradients by central differences, averaged over the probes.

    Args:
        plus: losses at theta + eps z of the examples that each probe sees, (draws, probes, examples); so are ``minus`` and ``clean``.
        minus: at theta - eps z.
        clean: at theta.
        eps: size of the perturbation.

    Returns:
        The coefficients, (draws, probes).
    """
    coeffs: Array = (plus - minus).mean(2) / (2 * eps * plus.shape[1])
    return coeffs


def one_sided(plus: Array, minus: Array, clean: Array, eps: float) -> Array:
    """Projected gradients by differences from the clean loss."""
    coeffs: Array = (plus - clean).mean(2) / (eps * plus.shape[1])
    return coeffs


def fzoo(plus: Array, minus: Array, clean: Array, eps: float) -> Array:
    """FZOO: one-sided differences over their standard deviation among the step's probes."""
    change = (plus - clean).mean(2)
    coeffs: Array = change / (plus.shape[1] * change.std(1, ddof=1, keepdims=True))
    return coeffs


def spsa(plus: Array, minus: Array, clean: Array, eps: float) -> Array:
    """1.5-SPSA with alpha 0.1: projected gradients over a power of the curvature along each probe."""
    curvature = np.abs((plus + minus - 2 * clean).mean(2)) / eps**2
    coeffs: Array = central(plus, minus, clean, eps) / np.maximum(curvature**0.1, 1.0)
    return coeffs


@dataclass(frozen=True)
class Estimator:
    """How coefficients come of losses, for how many probes, of how many examples, and whether each probe has its own.

    With a pool, the examples of a step are chosen among so many, whose clean losses are evaluated first.
    """

    rule: Callable[[Array, Array, Array, float], Array]
    probes: int
    examples: int
    own: bool = False
    pool: int = 0

    @property
    def two_sided(self) -> bool:
        """Whether it evaluates at theta - eps z too."""
        return self.rule in (central, spsa)

    @property
    def forwards(self) -> int:
        """Forwards of one example that a step takes; those of the pool are the clean losses too."""
        sides = 2 if self.two_sided else 1
        clean = 0 if self.rule is central else self.probes if self.own else 1
        return sides * self.probes * self.examples + max(clean * self.examples, self.pool)

    def drawn(self, clean: Array, rng: np.random.Generator, draws: int) -> tuple[Array, Array]:
        """The examples that the probes of each draw see, and their weights, (draws, 1 or probes, examples)."""
        sets = self.probes if self.own else 1
        count = self.pool or sets * self.examples
        seen = rng.permuted(np.tile(np.arange(len(clean)), (draws, 1)), axis=1)[:, :count]
        if not self.pool:
            seen = seen.reshape(draws, sets, self.examples)
            return seen, np.ones(seen.shape)
        chosen = [choose(1 - np.exp(-clean[some]), self.examples, rng) for some in seen]
        places, weights = (np.stack(x) for x in zip(*chosen, strict=True))
        return np.take_along_axis(seen, places, 1)[:, None], weights[:, None]


BASE = "MeZO, 1 probe of 16"
ESTIMATORS = {
    BASE: Estimator(central, 1, 16),
    "MeZO, 1 probe of 4": Estimator(central, 1, 4),
    "MeZO, 1 probe of 1": Estimator(central, 1, 1),
    "MeZO, 4 probes of the same 16": Estimator(central, 4, 16),
    "MeZO, 4 probes of 4 each": Estimator(central, 4, 4, True),
    "MeZO, 16 probes of 1 each": Estimator(central, 16, 1, True),
    "MeZO, 16 probes of the same 4": Estimator(central, 16, 4),
    "one-sided, 8 probes of the same 16": Estimator(one_sided, 8, 16),
    "FZOO, 8 probes of the same 16": Estimator(fzoo, 8, 16),
    "FZOO, 8 probes of the same 4": Estimator(fzoo, 8, 4),
    "FZOO, 8 probes of 4 each": Estimator(fzoo, 8, 4, True),
    "FZOO, 32 probes of the same 16": Estimator(fzoo, 32, 16),
    "FZOO, 32 probes of the same 2": Estimator(fzoo, 32, 2),
    "1.5-SPSA, 4 probes of the same 16": Estimator(spsa, 4, 16),
    "one-sided, 16 probes of the same 4": Estimator(one_sided, 16, 4),
    "one-sided, 32 probes of the same 2": Estimator(one_sided, 32, 2),
    "one-sided, 32 probes of the same 4": Estimator(one_sided, 32, 4),
    "one-sided, 8 probes of 4 among 16": Estimator(one_sided, 8, 4, pool=16),
    "one-sided, 16 probes of 4 among 16": Estimator(one_sided, 16, 4, pool=16),
    "one-sided, 32 probes of 2 among 8": Estimator(one_sided, 32, 2, pool=8),
    "one-sided, 32 probes of 2 among 16": Estimator(one_sided, 32, 2, pool=16),
    "one-sided, 32 probes of 4 among 16": Estimator(one_sided, 32, 4, pool=16),
    "FZOO, 16 probes of the same 4": Estimator(fzoo, 16, 4),
    "FZOO, 16 probes of 4 among 16": Estimator(fzoo, 16, 4, pool=16),
    "FZOO, 32 probes of 2 among 16": Estimator(fzoo, 32, 2, pool=16),
    "MeZO, 1 probe of 4 among 16": Estimator(central, 1, 4, pool=16),
}


def choose(scores: Array, n: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Places of n examples, each drawn as often as its share of the scores says, and weights that leave means unbiased.

    Systematic sampling: n points at equal distances, with one random start, on the line that the scores divide.
    """
    share = scores / scores.sum()
    ends = np.cumsum(share)
    places = np.searchsorted(ends / ends[-1], (np.arange(n) + rng.random()) / n, side="right")
    return places, 1 / (len(scores) * share[places])


def merit(e: Estimator, m: dict[str, Array], eps: float, rng: np.random.Generator, draws: int) -> tuple[float, float]:
    """Expected decrease of the loss for a forward of one example, at the best rate, and that rate, over random draws.

    Args:
        e: the estimator.
        m: "plus" and "minus" (K, N), "clean" (N,), "slope" and "square" (K,), and "norm", |G|^2.
        eps: at which they were measured.
        rng: chooses probes and examples, without repetition inside of a draw.
        draws: how many.
    """
    which = rng.permuted(np.tile(np.arange(len(m["plus"])), (draws, 1)), axis=1)[:, : e.probes]
    sign = rng.choice((-1, 1), which.shape)  # -z is as likely as z
    seen, weights = e.drawn(m["clean"], rng, draws)
    sides = m["plus"][which[..., None], seen], m["minus"][which[..., None], seen]
    plus, minus = (weights * np.where(sign[..., None] > 0, *pair) for pair in (sides, sides[::-1]))
    clean = weights * m["clean"][seen]
    coeffs = e.rule(plus, minus, clean, eps)
    # The mean of a difference over the examples of a draw is on average that over all examples: a control variate.
    drawn = (plus - (minus if e.two_sided else clean)).mean(2)
    every = sign * ((m["plus"] - m["minus"]).mean(1) / (1 if e.two_sided else 2))[which]
    steady = coeffs - (drawn - every) * (coeffs * drawn).sum() / (drawn**2).sum()
    slope = (steady * sign * m["slope"][which]).sum(1).mean() * m["norm"] / (m["slope"] ** 2).mean()
    square = (coeffs**2 * m["square"][which]).sum(1).mean()
    curvature = ((m["plus"] + m["minus"] - 2 * m["clean"]).mean(1) / (eps**2 * m["square"])).mean()
    best = slope / (curvature * square)
    return float(best * slope / 2 / e.forwards), float(best)


def resampled(m: dict[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """The measurements of probes and examples drawn anew with repetition."""
    k, n = (rng.integers(0, size, size) for size in m["plus"].shape)
    return {
        **m, "plus": m["plus"][k][:, n], "minus": m["minus"][k][:, n], "clean": m["clean"][n], "slope": m["slope"][k],
        "square": m["square"][k],
    }  # fmt: skip


def table_of(found: dict[str, Any], eps: float, draws: int, resamples: int) -> tuple[list[list[str]], dict[str, Any]]:
    """Rows of the table, and what they say: each estimator's merit over the first one's, with an interval of 95%.

    The interval is by bootstrap over probes and examples. It compares estimators on the same ones, so that it is much narrower than that of
    each merit by itself.
    """
    m = {k: np.array([p[k] for p in found["probes"]]) for k in ("plus", "minus", "slope", "square")}
    m |= {"clean": np.array(found["clean"]), "norm": np.array(found["norm"])}
    rng, rows, table = np.random.default_rng(0), list[list[str]](), dict[str, Any]()
    samples = [m] + [resampled(m, rng) for _ in range(resamples)]
    fitting = {n: e for n, e in ESTIMATORS.items() if e.probes <= len(m["plus"])}
    every = {n: [merit(e, x, eps, rng, draws) for x in samples] for n, e in fitting.items()}
    for name, values in every.items():
        over = [v[0] / b[0] for v, b in zip(values, every[BASE], strict=True)]
        low, high = np.quantile(over[1:], [0.025, 0.975])
        table[name] = {
            "forwards": fitting[name].forwards, "merit": values[0][0], "best_lr": values[0][1], "over": over[0],
            "interval": [float(low), float(high)],
        }  # fmt: skip
        rows.append([
            name, f"{fitting[name].forwards}", f"{values[0][1]:.1e}", f"{values[0][0] * 1e6:.2f}", f"{over[0]:.2f}",
            f"{low:.2f} to {high:.2f}",
        ])  # fmt: skip
    return rows, table


def facts_of(found: dict[str, Any], eps: float) -> dict[str, float]:
    """What the differences say about the task: how large is the noise of a single example beside the gradient, and the curvature."""
    m = {k: np.array([p[k] for p in found["probes"]]) for k in ("plus", "minus", "slope", "square")}
    g = (m["plus"] - m["minus"]) / (2 * eps)
    curvature = (m["plus"] + m["minus"] - 2 * np.array(found["clean"])).mean(1) / eps**2
    return {
        "gradient": math.sqrt(found["norm"]),
        "noise of an example over |g|^2": float(g.var(1, ddof=1).mean() / found["norm"]),
        "curvature": float((curvature / m["square"]).mean()),
        "correlation with the exact slope": float(np.corrcoef(g.mean(1), m["slope"])[0, 1]),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="reviews", help="data, as of zo-core finetune (default reviews)")
    parser.add_argument("--model", default="smollm2", help="model, as of zo-core finetune (default smollm2)")
    parser.add_argument("--distribution", default="rademacher", choices=["gaussian", "rademacher", "factored"])
    parser.add_argument("--rank", type=int, default=1, help="of factored probes")
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--probes", type=int, default=48, help="how many are measured (default 48)")
    parser.add_argument("--examples", type=int, default=64, help="of which losses are measured (default 64)")
    parser.add_argument("--large", type=int, default=256, help="examples of the gradient (default 256)")
    parser.add_argument("--longest", type=int, default=32, help="tokens of a prompt; longer ones are left out")
    parser.add_argument("--draws", type=int, default=2000, help="of each estimator, without forwards (default 2000)")
    parser.add_argument("--resamples", type=int, default=100, help="for the intervals (default 100)")
    parser.add_argument("--json", type=Path, default=Path("bench/results/screen.json"))
    args = parser.parse_args()
    key = f"{args.model}, {args.data}, {args.distribution}, rank {args.rank}, eps {args.eps:g}"
    known = load(args.json).get("measured", {})
    found = known.get(key, {"probes": []})
    if len(found["probes"]) < args.probes:
        config = FinetuneConfig(model=args.model, data=args.data, test_size=0.3, validation_size=0.1, **EARLIER)  # type: ignore[call-arg]
        session = prepare(config, console.print)
        point = Point(without_long(session, args.longest), args.large, args.examples)
        about = {
            "clean": point.clean, "norm": sum(float(g.square().sum()) for g in point.gradient), "autocast": session.scorer.autocast,
            "large": args.large, "longest": args.longest,
        }  # fmt: skip
        if found["probes"] and (found["clean"], found["large"]) != (about["clean"], about["large"]):
            parser.error(f"{args.json} has probes of {key} at other examples or weights: give another --json")
        noise = {"seed": 0, "distribution": args.distribution, "rank": args.rank}
        for number in track(range(len(found["probes"]), args.probes), "probes", console=console, transient=True):
            found = {**about, "probes": [*found["probes"], point.probe(number, args.eps, noise)]}
            known = load(args.json).get("measured", {})
            keep(args.json, machine=machine(), measured={**known, key: found})
    for key, found in load(args.json).get("measured", {}).items():
        eps = float(key.rsplit(" ", 1)[1])
        rows, table = table_of(found, eps, args.draws, args.resamples)
        columns = ["", "forwards", "best lr", "merit 1e-6", f"over {BASE}'s", "95%"]
        facts = facts_of(found, eps)
        report(f"{key}: progress for a forward of one example, {len(found['probes'])} probes", columns, rows)
        console.print(", ".join(f"{name} {value:.3g}" for name, value in facts.items()), highlight=False)
        keep(args.json, tables={**load(args.json).get("tables", {}), key: {**facts, "estimators": table}})


if __name__ == "__main__":
    main()
