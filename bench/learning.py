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
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

import zo_core
from zo_core.integrations import tasks
from zo_core.integrations.session import Session
from zo_core.integrations.sweep import ladder

from .harness import keep, load, report
from .methods import Study, mean_curve, reach, runs_of, session_of, start_of
from .screen import choose

EXAMPLES = """examples:
  python -m bench.learning                                       what is not in the JSON yet (hours)
  python -m bench.learning --tasks reviews --seeds 3             a part of it
  python -m bench.learning --table                               the tables of what is in the JSON
"""
TASKS, SWEEP_SEED = ("reviews", "products", "tweets"), 100
MARKS = (1 / 3, 1 / 2, 1.0)  # of the budget, where validation is looked at
OPTIONS = {"autocast": False, "test_size": 0.01, "validation_size": 0.3}  # of the runs


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


@torch.no_grad()
def closure_of(session: Session, method: Method, step: int) -> Callable[[], Tensor]:
    """The loss of a step's batch. With a pool it is a mean of chosen examples with weights, whose mean is that of all examples."""
    if not method.pool:
        return session.loss_of(step)
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
    method, which = METHODS[job["method"]], (job["task"], "float32", job["longest"])
    start, session = start_of(*which, **OPTIONS), session_of(*which, **OPTIONS)
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
    job = {
        "what": "sweep" if seed == SWEEP_SEED else task,
        "task": task,
        "method": name,
        "lr": lr,
        "seed": seed,
        "marks": list(marks),
    }
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
    runs = {name: [r for r in runs_of(study, task, name) if r["job"]["forwards"] == args.forwards] for name in METHODS}
    last = {name: {r["job"]["seed"]: r["curve"][-1] for r in some} for name, some in runs.items()}
    goal = statistics.mean(loss for _, loss, _ in last[BASE].values()) if last[BASE] else -math.inf
    rows, out = list[list[str]](), dict[str, Any]()
    for name, ends in last.items():
        if not ends:
            continue
        (marks, losses, _), lr = mean_curve(runs[name]), runs[name][0]["job"]["lr"]
        row = out[name] = {
            "lr": lr, "seeds": sorted(ends), "accuracy": statistics.mean(accuracy for *_, accuracy in ends.values()),
            "curve": dict(zip(marks, losses, strict=True)), "reached_at": reach(marks, losses, goal),
        }  # fmt: skip
        paired, shown = [ends[seed][1] - last[BASE][seed][1] for seed in ends.keys() & last[BASE].keys()], ""
        if name != BASE and len(paired) > 1:
            low, high = stats.ttest_1samp(paired, 0.0).confidence_interval(0.95)
            row |= {"difference": statistics.mean(paired), "interval": [float(low), float(high)]}
            shown = f"{row['difference']:+.4f} ±{(high - low) / 2:.4f}"
        at = " ".join(f"{loss:.4f}" for loss in losses)
        rows.append([name, f"{lr:.2g}", f"{len(ends)}", at, f"{100 * row['accuracy']:.1f}", shown])
    title = f"{task}: {args.forwards} forwards of one example, {args.validation} examples of validation"
    report(title, ["", "lr", "seeds", "at 1/3, 1/2, the end", "acc. %", "- first's, 95%"], rows, {}, None)
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
        jobs = [
            job_of(args, task, name, rates[name], seed, MARKS)
            for task in args.tasks for seed in range(args.seeds) for name in args.methods
        ]  # fmt: skip
        study.side_by_side(study.do, jobs)
    known = load(args.json).get("tables", {})
    keep(args.json, tables={**known, **{task: table_of(args, study, task) for task in args.tasks}})


if __name__ == "__main__":
    main()
