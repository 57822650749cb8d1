"""How fast methods learn: equal forwards of one example, paired seeds, one ladder of rates, on a CPU or a GPU.

SmolLM2-135M in float32 (on a GPU products are TF32's) on movie reviews, product reviews and tweets. A run's budget is in forwards of
one example, of which a step of MeZO on 16 takes 32. The parts of the study:

    rates   validation loss over learning rates a decade each way, on movie reviews, with seeds of their own; the range of good rates
    tasks   all methods at their best rate on each task with the same seeds, which choose the examples and their order, so that
            differences between methods are paired; constant rates
    long    as many forwards as 2,000 steps of MeZO, rates that fall linearly, at the best rate and half a decade below
    demo    runs like that of ``make demo``: sentences of all lengths, rates that fall linearly, and the accuracy on its test
            sentences of the weights that were best on its validation sentences

Prompts are of at most --longest tokens but in the last part. Tables have the mean of the differences from another method's loss (--against)
with its 95% interval (Student's t). Every finished run is in the JSON; an interrupted study goes on where it was.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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

from .harness import console, keep, load, machine, report
from .methods import Study, mean_curve, reach, runs_of, without_long
from .screen import choose

EXAMPLES = """examples:
  python -m bench.learning                                       what is not in the JSON yet (days on a CPU)
  python -m bench.learning --parts tasks --tasks reviews --seeds 3
  python -m bench.learning --parts tasks --methods "FZOO, 8 probes of 16" --lr 3.2e-3
  python -m bench.learning --workers 12 --minutes 8              on a GPU, as much as this time allows
  python -m bench.learning --table                               the tables of what is in the JSON
"""
PARTS, TASKS = ("rates", "tasks", "long", "demo"), ("reviews", "products", "tweets")
SWEEP_SEEDS = (100, 101)
MARKS = (0.0, 1 / 3, 1 / 2, 1.0)
BUDGET = 3072  # forwards of one example
LONG, DEMO = 64_000, 19_000  # 2,000 steps of MeZO; what 8 minutes of `make demo` were
RUNGS = tuple(10 ** (i / 2) for i in (0, -1, 1, -2, 2))


@dataclass(frozen=True)
class Method:
    """An optimizer of the library with its options.

    Args:
        name: its class.
        batch: examples of a forward.
        points: forwards of a step.
        lr: the middle of its ladder of rates.
        options: of the optimizer.
        pool: how many examples the batch is chosen from, by their losses; 0: it is not.
        spread: whether each probe has a batch of its own.
        biases: how many examples label biases are fitted to for an evaluation, as ``FinetuneConfig.label_bias``; 0: there are none.
        stratify: whether each batch has the labels in their shares, as ``FinetuneConfig.stratify``.
        temperature: of the loss, as ``FinetuneConfig.temperature``.
    """

    name: str
    batch: int
    points: int
    lr: float
    options: dict[str, Any]
    pool: int = 0
    spread: bool = False
    biases: int = 0
    stratify: bool = False
    temperature: float = 1.0

    def steps(self, forwards: float) -> int:
        """As many as so many forwards of one example pay for, with those that the biases are fitted by at the end."""
        return max(0, round((forwards - self.biases) / self.examples))

    @property
    def examples(self) -> int:
        """Forwards of one example that a step takes."""
        return self.pool + self.batch * self.points

    def make(self, model: torch.nn.Module, lr: float, seed: int) -> Any:
        """The optimizer. On a GPU models of this size wait for the host, which the engines here call the least."""
        options: dict[str, Any] = {}
        if next(model.parameters()).is_cuda:
            options["engine"] = "grouped" if self.points > 4 else "inplace"
            if self.points > 4 and self.options.get("distribution") != "factored":  # weights are copied for each point
                options["points_at_once"] = 17
        return getattr(zo_core, self.name)(model, lr=lr, seed=seed, **options | self.options)


SIGNS: dict[str, Any] = {"distribution": "rademacher"}


def fzoo(probes: int, batch: int, lr: float = 3.2e-3, pool: int = 0, **options: Any) -> Method:
    """FZOO with the mean deviation of its steps, or another ``beta``."""
    return Method("FZOO", batch, 1 + probes, lr, {"probes": probes, "beta": 0.9, **SIGNS, **options}, pool)


BASE, BASE_EVEN = "MeZO, 1 probe of 16", "MeZO, label biases, T 2, 1 probe of 8"
RANK_1: dict[str, Any] = {"distribution": "factored"}
RANK_4: dict[str, Any] = {"distribution": "factored", "rank": 4}
EVEN: dict[str, Any] = {"biases": 256, "stratify": True, "temperature": 10.0}
FINETUNE: dict[str, Any] = EVEN | {"batch": 8, "temperature": 2.0}  # as ``zo-core finetune --temperature 2``
METHODS = {
    BASE: Method("MeZO", 16, 2, 3.2e-5, {}),
    "MeZO, signs, 1 probe of 16": Method("MeZO", 16, 2, 3.2e-5, SIGNS),
    "MeZO, factored, 1 probe of 16": Method("MeZO", 16, 2, 3.2e-5, RANK_1),
    "MeZO, 4 probes of 4 of their own": Method("MeZO", 4, 8, 1e-4, {"probes": 4, "engine": "inplace"}, spread=True),
    "MeZO, momentum 0.9, 1 probe of 16": Method("MeZO", 16, 2, 1e-5, {"momentum": 0.9, "window": 16}),
    "LeZO, 1 probe of 16": Method("LeZO", 16, 2, 3.2e-5, SIGNS),
    "HiZOO, 1 probe of 16": Method("HiZOO", 16, 3, 1e-4, {}),
    "HiZOO-L, 1 probe of 16": Method("HiZOO", 16, 3, 1e-4, {"hessian": "factored"}),
    "AdaMeZO, 1 probe of 16": Method("AdaMeZO", 16, 2, 2e-4, {}),
    "MEAZO, 1 probe of 16": Method("MEAZO", 16, 2, 2e-4, {}),
    "BSZO, 2 probes of 16": Method("BSZO", 16, 3, 2e-5, {}),
    "1.5-SPSA, 4 probes of 16": Method("SPSA", 16, 9, 3.2e-4, {"probes": 4}),
    "1.5-SPSA, factored, 4 probes of 16": Method("SPSA", 16, 9, 3.2e-4, {"probes": 4, **RANK_1}),
    "FZOO-R, 4 probes of 16": Method("FZOO", 16, 5, 1e-3, {"probes": 4, "reuse": True, **SIGNS}),
    "FZOO, 8 probes of 16": fzoo(8, 16, beta=0.0),
    "FZOO, factored, 8 probes of 16": fzoo(8, 16, beta=0.0, **RANK_1),
    "FZOO, factored, rank 4, 8 probes of 16": fzoo(8, 16, beta=0.0, **RANK_4),
    "MeZO, label biases, 1 probe of 16": Method("MeZO", 16, 2, 3.2e-5, {}, biases=256),
    "FZOO, factored, label biases, 8 probes of 16": replace(fzoo(8, 16, beta=0.0, **RANK_1), biases=256),
    "MeZO, label biases, T 10, 1 probe of 4": Method("MeZO", 4, 2, 3.2e-5, {}, **EVEN),
    "FZOO, factored, label biases, T 1, 8 probes of 8": replace(fzoo(8, 8, beta=0.0, **RANK_1), **EVEN | {"temperature": 1.0}),
    "FZOO, factored, label biases, T 3, 8 probes of 4": replace(fzoo(8, 4, beta=0.0, **RANK_1), **EVEN | {"temperature": 3.0}),
    "FZOO, factored, label biases, T 10, 8 probes of 4": replace(fzoo(8, 4, beta=0.0, **RANK_1), **EVEN),
    "FZOO, factored, label biases, T 10, 8 probes of 8": replace(fzoo(8, 8, beta=0.0, **RANK_1), **EVEN),
    BASE_EVEN: Method("MeZO", points=2, lr=3.2e-5, options={}, **FINETUNE),
    "MeZO, momentum 0.9, label biases, T 2, 1 probe of 8": Method(
        "MeZO", points=2, lr=1e-5, options={"momentum": 0.9, "window": 16}, **FINETUNE
    ),
    "LeZO, label biases, T 2, 1 probe of 8": Method("LeZO", points=2, lr=3.2e-5, options=SIGNS, **FINETUNE),
    "HiZOO, label biases, T 2, 1 probe of 8": Method("HiZOO", points=3, lr=1e-4, options={}, **FINETUNE),
    "AdaMeZO, label biases, T 2, 1 probe of 8": Method("AdaMeZO", points=2, lr=2e-4, options={}, **FINETUNE),
    "MEAZO, label biases, T 2, 1 probe of 8": Method("MEAZO", points=2, lr=2e-4, options={}, **FINETUNE),
    "MEAZO, label biases, T 1, 1 probe of 8": Method("MEAZO", points=2, lr=2e-4, options={}, **FINETUNE | {"temperature": 1.0}),
    "BSZO, label biases, T 2, 2 probes of 8": Method("BSZO", points=3, lr=6.3e-5, options={}, **FINETUNE),
    "1.5-SPSA, label biases, T 2, 4 probes of 8": Method("SPSA", points=9, lr=3.2e-4, options={"probes": 4}, **FINETUNE),
    "FZOO-R, label biases, T 2, 4 probes of 8": Method(
        "FZOO", points=5, lr=1e-3, options={"probes": 4, "reuse": True, **SIGNS}, **FINETUNE
    ),
    "FZOO, factored, label biases, T 2, 8 probes of 8": replace(fzoo(8, 8, beta=0.0, **RANK_1), **FINETUNE),
    "FZOO, mean deviation, 8 probes of 16": fzoo(8, 16),
    "FZOO, mean deviation, 16 probes of 4": fzoo(16, 4),
    "FZOO, mean deviation, factored, 16 probes of 4": fzoo(16, 4, **RANK_1),
    "FZOO, mean deviation, factored, eps 3e-4, 16 probes of 4": fzoo(16, 4, **RANK_1, eps=3e-4),
    "FZOO, mean deviation, factored, rank 4, 16 probes of 4": fzoo(16, 4, **RANK_4),
    "FZOO, mean deviation, 16 probes of 4 among 16": fzoo(16, 4, pool=16),
    "FZOO, mean deviation, 32 probes of 2 among 8": fzoo(32, 2, pool=8),
}  # fmt: skip
LONGER = (
    BASE, BASE_EVEN, "MEAZO, label biases, T 2, 1 probe of 8", "MEAZO, label biases, T 1, 1 probe of 8",
    "FZOO, factored, label biases, T 2, 8 probes of 8",
)  # fmt: skip


def device_of(name: str) -> str:
    """The device for "auto", "cpu" or "cuda"."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


# ---- one run -----------------------------------------------------------------------------------------------------


@cache
def start_of(device: str) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """The model, one for all tasks, and its weights as they came."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    session = prepare(FinetuneConfig(device=device, autocast=False))  # type: ignore[call-arg]
    return session.model, {name: t.clone() for name, t in session.model.state_dict().items()}


@cache
def session_of(task: str, longest: int, device: str, demo: bool) -> Session:
    """A task's data: validation large enough to tell methods apart, or divided as in `make demo`."""
    sizes = {} if demo else {"test_size": 0.01, "validation_size": 0.3, "group_by_length": False}
    model, _ = start_of(device)
    session = without_long(prepare(FinetuneConfig(data=task, device=device, autocast=False, **sizes)), longest)  # type: ignore[arg-type]
    session.scorer.model = model
    return session._replace(model=model)


@torch.no_grad()
def closures_of(session: Session, method: Method, step: int) -> Any:
    """The closure of a step, or those of its probes.

    With a pool its loss, plain cross-entropy, is a mean of chosen examples with weights, whose mean is that of all examples of the pool.
    """
    if method.spread:
        n = method.options["probes"]
        return [session.loss_of(step * n + k) for k in range(n)]
    if not method.pool:
        return session.loss_of(step)
    train, scorer = session.parts["train"], session.scorer
    numbers = tasks.batch_indices(len(train), method.pool, step=step, seed=session.config.seed)
    pool = [train[i] for i in numbers]
    batch = scorer.batch(pool)
    unlikely = 1 - scorer(batch).softmax(-1).gather(1, batch.labels[:, None])[:, 0]
    rng = np.random.default_rng((session.config.seed, step))
    places, weights = choose(unlikely.double().cpu().numpy() + 1e-3, method.batch, rng)
    chosen, by = scorer.batch([pool[i] for i in places]), torch.from_numpy(weights).float().to(scorer.device)
    return torch.no_grad()(lambda: (by * F.cross_entropy(scorer(chosen), chosen.labels, reduction="none")).mean())


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train until the last mark, looking at validation at each; what came of it. A loss that is far above the first ends it."""
    method, demo = METHODS[job["method"]], job["what"] == "demo"
    model, start = start_of(job["device"])
    session = session_of(job["task"], job["longest"], job["device"], demo)
    config = session.config.model_copy(
        update={
            "seed": job["seed"], "batch_size": method.batch, "label_bias": method.biases, "stratify": method.stratify,
            "temperature": method.temperature,
        }
    )  # fmt: skip
    session = session._replace(config=config)
    session.scorer.biases.zero_()
    model.load_state_dict(start)
    optimizer = method.make(model, job["lr"], job["seed"])
    validation, curve = session.parts["validation"][: job["validation"]], list[list[float]]()
    steps = method.steps(job["forwards"])
    marks = {method.steps(mark * job["forwards"]): mark for mark in job["marks"]}
    best, out = math.inf, dict[str, Any]()
    begun = time.perf_counter()
    last = max(marks)
    for step in range(last + 1):
        if step in marks:
            session.fit_label_biases()
            found = tasks.evaluate(session.scorer, validation, batch_size=64)
            curve.append([round(marks[step], 4), round(found.loss, 5), round(found.accuracy, 5)])
            if not found.loss < 1.0:
                break
            if demo and found.loss < best:
                best, kept = found.loss, tasks.evaluate(session.scorer, session.parts["test"], batch_size=64)
                out = {"test": {"mark": curve[-1][0], "loss": round(kept.loss, 5), "accuracy": round(kept.accuracy, 5)}}
        if step < last:
            if job["schedule"] == "linear":
                optimizer.param_groups[0]["lr"] = job["lr"] * (1 - step / steps)
            optimizer.step(closures_of(session, method, step))
    out |= {
        "curve": curve,
        "steps": steps,
        "skipped": optimizer.skipped,
        "fallback": optimizer.fallback,
        "finished": curve[-1][0] == round(max(job["marks"]), 4),
    }
    return {**out, "worker_seconds": round(time.perf_counter() - begun, 1)}


# ---- the parts ---------------------------------------------------------------------------------------------------


def job_of(args: argparse.Namespace, what: str, task: str, name: str, lr: float, seed: int) -> dict[str, Any]:
    """All that a run depends on."""
    longer, demo = what in ("long", "demo"), what == "demo"
    return {
        "what": what, "task": task, "method": name, "lr": float(f"{lr:.2g}"), "seed": seed, "device": args.device,
        "forwards": args.forwards or {"long": LONG, "demo": DEMO}.get(what, BUDGET), "schedule": "linear" if longer else "constant",
        "marks": [i / 10 for i in range(11)] if longer else args.marks,
        "longest": 256 if demo else args.longest, "validation": args.validation,
    }  # fmt: skip


def rate_of(args: argparse.Namespace, study: Study, name: str) -> float:
    """The best learning rate of a method, by its mean loss: a decade each way, and further as long as the best is the last."""

    def loss(lr: float) -> float:
        jobs = [job_of(args, "rates", "reviews", name, lr, seed) for seed in SWEEP_SEEDS]
        runs = study.side_by_side(study.do, jobs)
        return statistics.mean(r["curve"][-1][1] if r["finished"] else math.inf for r in runs)

    rates = [METHODS[name].lr * rung for rung in RUNGS]
    found = dict(zip(rates, study.side_by_side(loss, rates), strict=True))
    while len(found) < 7 and (best := min(found, key=lambda lr: found[lr])) in (min(found), max(found)):
        lr = best * (RUNGS[1] if best == min(found) else RUNGS[2])
        found[lr] = loss(lr)
    return min(found, key=lambda lr: found[lr])


def known_rates(args: argparse.Namespace, study: Study) -> dict[str, float]:
    """The best rate of each method whose ladder is in the JSON, or could be made in time."""

    def rate(name: str) -> float | None:
        try:
            return rate_of(args, study, name)
        except TimeoutError:
            return None

    found = dict(zip(args.methods, study.side_by_side(rate, args.methods), strict=True))
    return {name: lr for name, lr in found.items() if lr is not None}


def jobs_of(args: argparse.Namespace, rates: dict[str, float]) -> list[dict[str, Any]]:
    """The runs after the ladders, in the order in which they are begun: the long ones, five seeds of the tasks, all others."""
    last = args.seeds if "tasks" in args.parts else 0

    def of_tasks(seeds: Iterable[int]) -> list[dict[str, Any]]:
        return [
            job_of(args, task, task, name, lr, seed)
            for seed in seeds for task in args.tasks for name, lr in rates.items()
        ]  # fmt: skip

    rungs = RUNGS[:2] if args.lr is None else RUNGS[:1]
    both = [(name, rates[name] * rung) for name in LONGER if name in rates for rung in rungs]
    long = [job_of(args, "long", "reviews", name, lr, 0) for name, lr in both if "long" in args.parts]
    demo = [job_of(args, "demo", "reviews", name, lr, s) for s in range(3) for name, lr in both if "demo" in args.parts]
    return [*long, *of_tasks(range(min(5, last))), *demo, *of_tasks(range(5, last))]


# ---- tables ------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> list[float]:
    """Of the mean, 95%, by Student's t."""
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return [float(low), float(high)]


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table, if it has any rows."""
    if rows:
        report(title, columns, rows)


def table_of_task(args: argparse.Namespace, study: Study, task: str) -> dict[str, Any]:
    """Print what is known of a task, and return it."""
    budget = args.forwards or BUDGET
    which = {"forwards": budget, "device": args.device, "longest": args.longest}
    runs = {
        name: [r for r in runs_of(study, task, name) if {k: r["job"][k] for k in which} == which and r["finished"]]
        for name in METHODS
    }
    last = {name: {r["job"]["seed"]: r["curve"][-1] for r in some} for name, some in runs.items()}
    base = last[args.against]
    goal = statistics.mean(loss for _, loss, _ in base.values()) if base else -math.inf
    rows, out = list[list[str]](), dict[str, Any]()
    for name, ends in last.items():
        if not ends:
            continue
        (stops, losses, _), lr = mean_curve(runs[name]), runs[name][0]["job"]["lr"]
        marks = [max(mark, METHODS[name].biases / budget) for mark in stops]  # a fit is no step, but forwards
        row = out[name] = {
            "lr": lr, "seeds": len(ends), "accuracy": statistics.mean(accuracy for *_, accuracy in ends.values()),
            "curve": dict(zip(map(str, marks), losses, strict=True)), "reached_at": reach(marks, losses, goal),
        }  # fmt: skip
        paired, shown = [ends[seed][1] - base[seed][1] for seed in ends.keys() & base.keys()], ""
        if name != args.against and len(paired) > 1:
            low, high = row["interval"] = interval(paired)
            row |= {"difference": statistics.mean(paired), "from": args.against}
            shown = f"{row['difference']:+.4f} ±{(high - low) / 2:.4f}"
        at = ", ".join(f"{loss:.4f} at {mark:.2g}" for mark, loss in zip(marks, losses, strict=True))
        reached = "" if row["reached_at"] is None else f"{'≤' * (losses[0] <= goal)}{row['reached_at']:.2f}"
        rows.append([name, f"{lr:.2g}", f"{len(ends)}", at, f"{100 * row['accuracy']:.1f}", shown, reached])
    title = f"{task}: {budget} forwards of one example, {args.validation} examples of validation"
    columns = ["", "lr", "seeds", "loss at parts of them", "acc. %", "difference, 95%", "its end at"]
    show(title, columns, rows)
    return out


def table_of_rates(args: argparse.Namespace, study: Study) -> dict[str, Any]:
    """Print the losses over rates, and how wide the range is where at least half of the progress of --against at its best is made, of
    methods with label biases half of that of MeZO with them.
    """
    losses: dict[str, dict[float, list[float]]] = {name: {} for name in METHODS}
    before = dict[str, float]()
    for r in study.runs:
        if r["job"]["what"] == "rates" and r["job"]["device"] == args.device and not r["curve"][0][0]:
            before[r["job"]["method"]] = r["curve"][0][1]
            end = r["curve"][-1][1] if r["finished"] else math.inf
            losses[r["job"]["method"]].setdefault(r["job"]["lr"], []).append(end)
    means = {name: {lr: statistics.mean(x) for lr, x in sorted(by.items())} for name, by in losses.items() if by}
    levels = {b: (before[b] + min(means[b].values())) / 2 for b in (args.against, BASE_EVEN) if b in means}
    rows, out = list[list[str]](), dict[str, Any]()
    for name, by in means.items():
        level = levels.get(BASE_EVEN if METHODS[name].biases else args.against, math.nan)
        best, width = min(by, key=lambda lr: by[lr]), decades(list(by.items()), level)
        finite = {f"{lr:g}": x if math.isfinite(x) else None for lr, x in by.items()}
        out[name] = {"before": before[name], "losses": finite, "best": best, "level": level, "decades": width}
        shown = ", ".join(f"{lr:g} {'-' if math.isinf(x) else f'{x:.3f}'}" for lr, x in by.items())
        rows.append([name, f"{best:g}", f"{by[best]:.3f}", f"{width:.2f}, {level:.3f}", shown])
    columns = ["", "best", "its loss", "decades of at most", "loss at each rate (-: far above the first)"]
    show("Learning rates, movie reviews; decades of rates whose losses are at most a level", columns, rows)
    return out


def decades(losses: Sequence[tuple[float, float]], level: float) -> float:
    """How many decades of rates around the best have losses below a level, on straight lines over the logarithm of rates."""
    rates, values = [math.log10(lr) for lr, _ in losses], [min(x, 1.0) for _, x in losses]
    grid = np.linspace(rates[0], rates[-1], 2001)
    below = np.interp(grid, rates, values) <= level
    best = int(np.argmin(np.interp(grid, rates, values)))
    left, right = best, best
    while left > 0 and below[left - 1]:
        left -= 1
    while right < len(grid) - 1 and below[right + 1]:
        right += 1
    return float(grid[right] - grid[left])


def table_of_longer(args: argparse.Namespace, study: Study, what: str) -> dict[str, Any]:
    """Print what came of the long runs or of those like the demo, and return it."""
    rows, out = list[list[str]](), dict[str, Any]()
    for name in METHODS:
        some = [r for r in runs_of(study, what, name) if r["job"]["device"] == args.device and r["finished"]]
        for lr, forwards in sorted({(r["job"]["lr"], r["job"]["forwards"]) for r in some}):
            runs = [r for r in some if (r["job"]["lr"], r["job"]["forwards"]) == (lr, forwards)]
            marks, losses, _ = mean_curve(runs)
            row = {
                "seeds": len(runs),
                "forwards": forwards,
                "steps": runs[0]["steps"],
                "curve": dict(zip(map(str, marks), losses, strict=True)),
            }
            row["accuracy"] = [r["curve"][-1][2] for r in runs]
            if what == "demo":
                row["test"] = [r["test"] for r in runs]
            out[f"{name}, lr {lr:g}, {forwards} forwards"] = row
            tests = [r["test"]["accuracy"] for r in runs if "test" in r]
            shown = (
                f"{100 * statistics.mean(tests):.2f} ({', '.join(f'{100 * x:.1f}' for x in tests)})" if tests else ""
            )
            at = " ".join(f"{loss:.3f}" for loss in losses[::2])
            rows.append(
                [
                    name,
                    f"{lr:g}",
                    f"{len(runs)}",
                    f"{forwards}",
                    f"{row['steps']}",
                    at,
                    f"{100 * statistics.mean(row['accuracy']):.1f}",
                    shown,
                ]
            )
    columns = ["", "lr", "seeds", "forwards", "steps", "at 0, .2 .. 1", "acc. %", "test accuracy %"]
    show(f"{what}: rates that fall linearly; forwards of one example", columns, rows)
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--seeds", type=int, default=5, help="of the tasks (default 5)")
    parser.add_argument(
        "--lr", type=float, help="of all --methods, in place of the best of each one's ladder, which is not made"
    )
    parser.add_argument(
        "--forwards", type=int, help=f"of one example, the budget of a run (default {BUDGET}, long {LONG}, demo {DEMO})"
    )
    parser.add_argument(
        "--marks", type=float, nargs="+", default=list(MARKS), help="of the budget, where validation is looked at"
    )
    parser.add_argument("--longest", type=int, default=32, help="tokens of a prompt; longer ones are left out")
    parser.add_argument("--validation", type=int, default=512, help="examples")
    parser.add_argument("--against", choices=METHODS, default=BASE, metavar="METHOD", help=f"(default {BASE!r})")
    parser.add_argument("--device", default="auto", help="cpu, cuda; auto is a GPU if there is one")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that share the device")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no run is begun")
    parser.add_argument("--table", action="store_true", help="only the tables of what is in the JSON")
    parser.add_argument("--json", type=Path, default=Path("bench/results/learning.json"))
    args = parser.parse_args()
    args.device = device_of(args.device)
    study = Study(args.json, args.workers, run, time.time() + 60 * args.minutes)
    if not args.table:
        keep(args.json, machine={**load(args.json).get("machine", {}), args.device: machine()})
        rates = known_rates(args, study) if args.lr is None else dict.fromkeys(args.methods, args.lr)

        def attempt(job: dict[str, Any]) -> bool:
            try:
                return bool(study.do(job))
            except TimeoutError:
                return False

        jobs = jobs_of(args, rates)
        console.print(f"{sum(study.side_by_side(attempt, jobs))} of {len(jobs)} runs are there")
    out = {task: table_of_task(args, study, task) for task in args.tasks}
    out |= {
        "rates": table_of_rates(args, study),
        **{what: table_of_longer(args, study, what) for what in ("long", "demo")},
    }
    tables = load(args.json).get("tables", {})
    shown = {name: table for name, table in out.items() if table}  # runs of another --forwards leave tables as they are
    keep(args.json, tables={**tables, args.device: {**tables.get(args.device, {}), **shown}})


if __name__ == "__main__":
    main()
