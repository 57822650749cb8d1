"""How fast methods learn where they differ by how many examples and probes a step has: equal forwards of one example, paired seeds.

SmolLM2-135M in float32 on movie reviews, product reviews and tweets of at most --longest tokens. A run's budget is in forwards of one
example, of which a step of MeZO on 16 takes 32. Learning rates are constant and chosen by one ladder for all, half a decade between
neighbours until both are worse, by runs on movie reviews with a seed of their own. Then all methods train on each task with the same
seeds, which choose the examples and their order, so that differences between methods are paired. The table has the mean of these
differences from the first method's loss with its 95% interval (Student's t).

Which methods are worth it is what bench.screen says. Every finished run is in the JSON; an interrupted study goes on where it was.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

import zo_core
from zo_core.integrations import tasks
from zo_core.integrations.config import FinetuneConfig
from zo_core.integrations.session import Session, prepare
from zo_core.integrations.sweep import ladder

from .harness import keep, machine, report
from .methods import Study
from .screen import choose

EXAMPLES = """examples:
  python -m bench.learning                                       what is not in the JSON yet (hours)
  python -m bench.learning --tasks reviews --seeds 3             a part of it
  python -m bench.learning --table                               the tables of what is in the JSON
"""
TASKS, SWEEP_SEED = ("reviews", "products", "tweets"), 100


@dataclass(frozen=True)
class Method:
    """An optimizer of the library with its options, the examples that a forward has, and the middle of its ladder of rates."""

    name: str
    batch: int
    lr: float
    options: dict[str, Any]
    pool: int = 0  # how many examples the batch is chosen from, by their losses

    def make(self, model: torch.nn.Module, lr: float, seed: int) -> Any:
        """The optimizer."""
        return getattr(zo_core, self.name)(model, lr=lr, seed=seed, **self.options)

    @property
    def examples(self) -> int:
        """Forwards of one example that a step takes."""
        probes: int = self.options.get("probes", 1)
        return self.pool + self.batch * (1 + probes if self.name == "FZOO" else 2 * probes)


BASE = "MeZO, 1 probe of 16"
MEAN = {"probes": 16, "beta": 0.9}
METHODS = {
    BASE: Method("MeZO", 16, 3.2e-5, {}),
    "FZOO, 8 probes of 16": Method("FZOO", 16, 3.2e-3, {"probes": 8}),
    "FZOO, mean deviation, 16 probes of 4": Method("FZOO", 4, 3.2e-3, MEAN),
    "FZOO, mean deviation, 16 probes of 4 among 16": Method("FZOO", 4, 3.2e-3, MEAN, pool=16),
    "FZOO, mean deviation, 16 factored probes of 4 among 16": Method(
        "FZOO", 4, 5.6e-3, {**MEAN, "distribution": "factored", "engine": "grouped"}, pool=16
    ),
}


@cache
def session_of(data: str, longest: int) -> Session:
    """Model, and data without its long examples."""
    sizes: dict[str, Any] = {"test_size": 0.01, "validation_size": 0.3}
    session = prepare(FinetuneConfig(data=data, dtype="float32", autocast=False, **sizes))
    return session._replace(
        parts={k: [e for e in part if len(e.tokens) <= longest] for k, part in session.parts.items()}
    )


@cache
def start_of(data: str, longest: int) -> dict[str, Tensor]:
    """The weights as they came; asked for before they move."""
    return {name: t.clone() for name, t in session_of(data, longest).model.state_dict().items()}


@torch.no_grad()
def closure_of(session: Session, method: Method, step: int) -> Callable[[], Tensor]:
    """The loss of a step's batch. With a pool it is a mean of chosen examples with weights, whose mean is that of all examples."""
    if not method.pool:
        return torch.no_grad()(session.loss_of(step))
    train, scorer = session.parts["train"], session.scorer
    numbers = tasks.batch_indices(len(train), method.pool, step=step, seed=session.config.seed)
    pool = [train[i] for i in numbers]
    batch = scorer.batch(pool)
    unlikely = 1 - scorer(batch).softmax(-1).gather(1, batch.labels[:, None])[:, 0]
    rng = np.random.default_rng((session.config.seed, step))
    places, weights = choose(unlikely.double().numpy() + 1e-3, method.batch, rng)
    chosen, by = scorer.batch([pool[i] for i in places]), torch.from_numpy(weights).float()
    return torch.no_grad()(lambda: (by * F.cross_entropy(scorer(chosen), chosen.labels, reduction="none")).mean())


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train, looking at validation at each mark; what came of it. A loss that is far above the first ends it."""
    method, which = METHODS[job["method"]], (job["task"], job["longest"])
    start, session = start_of(*which), session_of(*which)
    config = session.config.model_copy(update={"seed": job["seed"], "batch_size": method.batch})
    session = session._replace(config=config)
    session.model.load_state_dict(start)
    optimizer = method.make(session.model, job["lr"], job["seed"])
    validation, curve = session.parts["validation"][: job["validation"]], list[list[float]]()
    steps = round(job["forwards"] / method.examples)
    marks = {round(mark * steps): mark for mark in job["marks"]}
    begun = time.perf_counter()
    for step in range(steps + 1):
        if step in marks:
            found = tasks.evaluate(session.scorer, validation)
            curve.append([marks[step], round(found.loss, 5), round(found.accuracy, 5)])
            if not found.loss < 1.0:
                break
        if step < steps:
            optimizer.step(closure_of(session, method, step))
    out = {"curve": curve, "steps": steps, "skipped": optimizer.skipped, "finished": curve[-1][0] == 1.0}
    return {**out, "worker_seconds": round(time.perf_counter() - begun, 1)}


def job_of(
    args: argparse.Namespace, task: str, name: str, lr: float, seed: int, marks: Sequence[float]
) -> dict[str, Any]:
    """All that a run depends on."""
    job = {"what": f"{task}, seed {seed}", "task": task, "method": name, "lr": lr, "seed": seed, "marks": list(marks)}
    return {**job, "forwards": args.forwards, "longest": args.longest, "validation": args.validation}


def rate_of(args: argparse.Namespace, study: Study, name: str) -> float:
    """The best learning rate of a method by the ladder."""

    def loss(lr: float) -> float:
        found = study.do(job_of(args, "reviews", name, lr, SWEEP_SEED, (0.5, 1.0)))
        return float(found["curve"][-1][1]) if found["finished"] else math.inf

    tried = ladder(loss, METHODS[name].lr, most=5)
    return min(tried, key=lambda lr: tried[lr])


def table_of(args: argparse.Namespace, study: Study, task: str) -> dict[str, Any]:
    """Print what is known of a task, and return it."""
    every = [r for r in study.runs if r["job"]["task"] == task and r["job"]["forwards"] == args.forwards]
    last = {(r["job"]["method"], r["job"]["seed"]): r["curve"][-1][1:] for r in every if r["job"]["seed"] != SWEEP_SEED}
    rows, out = list[list[str]](), dict[str, Any]()
    for name in METHODS:
        seeds = [seed for method, seed in last if method == name]
        if not seeds:
            continue
        losses, accuracies = ([last[name, seed][i] for seed in seeds] for i in (0, 1))
        lrs = {r["job"]["lr"] for r in every if r["job"]["method"] == name and r["job"]["seed"] in seeds}
        row = out[name] = {
            "lr": sorted(lrs),
            "seeds": seeds,
            "loss": statistics.mean(losses),
            "accuracy": statistics.mean(accuracies),
        }
        goal = (
            statistics.mean(last[BASE, seed][0] for seed in seeds if (BASE, seed) in last)
            if (BASE, seeds[0]) in last
            else math.nan
        )
        curves = [r["curve"] for r in every if r["job"]["method"] == name and r["job"]["seed"] in seeds]
        means = {
            c[0]: statistics.mean(curve[i][1] for curve in curves if len(curve) > i) for i, c in enumerate(curves[0])
        }
        row |= {"curve": means, "reached_at": next((mark for mark, loss in means.items() if loss <= goal), None)}
        paired = [last[name, seed][0] - last[BASE, seed][0] for seed in seeds if (BASE, seed) in last]
        shown = ""
        if name != BASE and len(paired) > 1:
            low, high = stats.ttest_1samp(paired, 0.0).confidence_interval(0.95)
            row |= {"difference": statistics.mean(paired), "interval": [float(low), float(high)]}
            shown = f"{row['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
        at = ", ".join(f"{loss:.4f}" for loss in means.values())
        rows.append([name, f"{min(lrs):.2g}", f"{len(seeds)}", at, f"{100 * row['accuracy']:.1f}", shown])
    marks = ", ".join(f"{mark:.2g}" for mark in max((r["curve"] for r in out.values()), key=len, default=()))
    columns = ["", "lr", "seeds", f"loss at {marks} of the budget", "acc. %", f"loss - that of {BASE} (95%)"]
    report(
        f"{task}: {args.forwards} forwards of one example, {args.validation} examples of validation",
        columns,
        rows,
        {},
        None,
    )
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--forwards", type=int, default=3072, help="of one example, the budget of a run (default 3072)")
    parser.add_argument("--longest", type=int, default=32, help="tokens of a prompt; longer ones are left out")
    parser.add_argument("--validation", type=int, default=512, help="examples")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that share the cores")
    parser.add_argument("--table", action="store_true", help="only the tables of what is in the JSON")
    parser.add_argument("--json", type=Path, default=Path("bench/results/learning.json"))
    args = parser.parse_args()
    study = Study(args.json, args.workers, run)
    if not args.table:
        rates = dict(
            zip(args.methods, study.side_by_side(lambda name: rate_of(args, study, name), args.methods), strict=True)
        )
        marks = (1 / 3, 1 / 2, 1.0)
        jobs = [
            job_of(args, task, name, rates[name], seed, marks)
            for task in args.tasks for seed in range(args.seeds) for name in args.methods
        ]  # fmt: skip
        study.side_by_side(study.do, jobs)
    keep(args.json, machine=machine(), tables={task: table_of(args, study, task) for task in args.tasks})


if __name__ == "__main__":
    main()
