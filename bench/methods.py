"""Which method to take: all of them, published MeZO and backpropagation on one task, at equal budgets.

SmolLM2-135M on movie-review sentences of at most --longest tokens (and on product reviews, with the learning rates found on the
first). Learning rates are constant, and chosen on validation by one ladder for all: neighbours half a decade apart, until both
are worse. Budgets are in forwards of a batch (a backward counts as two) and in seconds, which are a step's median time on a
quiet machine (--part timing) times steps: workers here share cores, so that their own clocks mean nothing. One run answers for
both. Every finished run is in the JSON; an interrupted study goes on where it was.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import zo_core
from zo_core.integrations import tasks
from zo_core.integrations.config import EARLIER, FinetuneConfig
from zo_core.integrations.session import Session, prepare
from zo_core.integrations.sweep import ladder

from . import published
from .harness import console, interleaved, keep, load, machine, quantiles, report
from .step import gate

EXAMPLES = """examples:
  python -m bench.methods --part timing           seconds of a step, on a quiet machine
  python -m bench.methods                         all parts that are not in the JSON yet (hours)
  python -m bench.methods --part plot             the plot and the tables from the JSON
"""
PARTS = ("timing", "memory", "sweep", "reviews", "products", "plot")
EPS, BATCH, SWEEP_SEED = 1e-3, 16, 100
MARKS = (0.0, 1 / 6, 1 / 3, 1 / 2, 3 / 4, 1.0)  # of the budget of forwards, where validation is looked at


@dataclass(frozen=True)
class Method:
    """How it is made, the middle of its ladder of learning rates, and forwards a step."""

    make: Callable[..., Any]
    lr: float
    forwards: int


def ours(name: str, **options: Any) -> Callable[..., Any]:
    """A method of the library, at its defaults but for these options."""
    return lambda model, lr, seed: getattr(zo_core, name)(model, lr=lr, eps=EPS, seed=seed, **options)


def backprop(name: str) -> Callable[..., Any]:
    """A first-order optimizer of torch."""
    return lambda model, lr, seed: getattr(torch.optim, name)(model.parameters(), lr=lr)


class Published:
    """MeZO as published, behind an optimizer's face."""

    def __init__(self, model: nn.Module, lr: float, seed: int) -> None:
        self.params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.lr, self.number = lr, seed << 20

    def step(self, closure: Callable[[], Tensor]) -> float:
        """One step."""
        self.number += 1
        return published.mezo_step(self.params, closure, self.number, self.lr, EPS)


FIRST_ORDER, PUBLISHED = ("Adam", "SGD"), "MeZO, published"
METHODS = {
    PUBLISHED: Method(Published, 3.2e-5, 2),  # torch.normal in bfloat16, weights written to be probed
    "MeZO": Method(ours("MeZO", distribution="rademacher"), 3.2e-5, 2),  # random signs
    "MeZO, Gaussian": Method(ours("MeZO"), 3.2e-5, 2),  # the default
    "LeZO": Method(ours("LeZO", distribution="rademacher"), 1e-4, 2),  # rho 0.75, random signs
    "HiZOO": Method(ours("HiZOO"), 1e-4, 3),  # smoothing 1e-6
    "HiZOO-L": Method(ours("HiZOO", hessian="factored"), 1e-4, 3),  # smoothing 1e-6
    "FZOO": Method(ours("FZOO", distribution="rademacher"), 3.2e-3, 9),  # 8 probes
    "FZOO-R": Method(ours("FZOO", reuse=True, probes=4, distribution="rademacher"), 3.2e-3, 5),  # 4 new probes
    "1.5-SPSA": Method(ours("SPSA", probes=4), 3.2e-4, 9),  # 4 probes
    "Adam": Method(backprop("Adam"), 1e-5, 3),  # backpropagation
    "SGD": Method(backprop("SGD"), 1e-3, 3),  # backpropagation
}


# ---- one run -----------------------------------------------------------------------------------------------------


def without_long(session: Session, longest: int) -> Session:
    """A session without the examples of more tokens."""
    parts = {name: [e for e in part if len(e.tokens) <= longest] for name, part in session.parts.items()}
    return session._replace(parts=parts)


@cache
def session_of(data: str, dtype: str, longest: int, **options: Any) -> Session:
    """Model, and data without its long examples; options as of ``FinetuneConfig``."""
    usual = {"batch_size": BATCH, "test_size": 0.3, "validation_size": 0.1, "autocast": dtype == "float32"}
    usual |= EARLIER
    return without_long(prepare(FinetuneConfig(data=data, dtype=dtype, **{**usual, **options})), longest)  # type: ignore[arg-type]


@cache
def start_of(data: str, dtype: str, longest: int, **options: Any) -> dict[str, Tensor]:
    """The weights as they came; asked for before they move."""
    return {name: t.clone() for name, t in session_of(data, dtype, longest, **options).model.state_dict().items()}


def dtype_of(method: str) -> str:
    """Of the weights."""
    return "float32" if method in FIRST_ORDER else "bfloat16"


def trainer(name: str, session: Session, lr: float, seed: int) -> tuple[Any, Callable[[int], object]]:
    """The method's optimizer, and a step of it on the batch of a number."""
    optimizer = METHODS[name].make(session.model, lr, seed)
    if name not in FIRST_ORDER:
        return optimizer, lambda number: optimizer.step(session.loss_of(number))

    def first_order(number: int) -> None:
        optimizer.zero_grad()
        session.scorer.loss(session.batch_of(number)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return optimizer, first_order


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train, looking at validation at each mark; what came of it. A loss that is far above the first ends it."""
    which = job["data"], dtype_of(job["method"]), job["longest"]
    start, session = start_of(*which), session_of(*which)
    session = session._replace(config=session.config.model_copy(update={"seed": job["seed"]}))
    model, scorer = session.model, session.scorer
    model.load_state_dict(start)
    torch.set_rng_state(torch.Generator().manual_seed(job["seed"]).get_state())
    optimizer, train = trainer(job["method"], session, job["lr"], job["seed"])
    curve: list[list[float]] = []
    out: dict[str, Any] = {"curve": curve}
    begun = time.perf_counter()
    for step in range(job["steps"] + 1):
        if step in job["marks"]:
            found = tasks.evaluate(scorer, session.parts["validation"][: job["validation"]], batch_size=BATCH)
            curve.append([step, round(found.loss, 5), round(found.accuracy, 5)])
            if not found.loss <= job["give_up"] * curve[0][1]:
                break
        if step == job["tested"]:
            found = tasks.evaluate(scorer, session.parts["test"][: job["test"]], batch_size=BATCH)
            out |= {"test": {"loss": found.loss, "accuracy": found.accuracy}}
        if step == job["steps"]:
            break
        train(step)
    if hasattr(optimizer, "memory"):
        out |= {"memory": optimizer.memory(), "skipped": optimizer.skipped}
    model.zero_grad(set_to_none=True)
    return {**out, "finished": curve[-1][0] == job["steps"], "worker_seconds": round(time.perf_counter() - begun, 1)}


def _in_time(until: float, run: Callable[[dict[str, Any]], dict[str, Any]], job: dict[str, Any]) -> dict[str, Any]:
    """The run of a job. TimeoutError, and no run, after ``until``, in seconds of the clock."""
    if time.time() > until:
        raise TimeoutError("no time is left")
    return run(job)


def _quiet(threads: int) -> None:
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message="eps=")  # bfloat16 probes are coarse; that is part of the study
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"


class Study:
    """The JSON where runs are kept, and the processes that make those that are not there.

    Args:
        path: of the JSON.
        workers: how many processes.
        run: makes the run of a job.
        until: when no more runs are begun, in seconds of the clock.
    """

    def __init__(
        self, path: Path, workers: int, run: Callable[[dict[str, Any]], dict[str, Any]], until: float = math.inf
    ) -> None:
        self.run, self.path, self.lock, self.until = run, path, threading.Lock(), until
        self.runs = load(path).get("runs", [])
        self.pool = ProcessPoolExecutor(
            workers,
            multiprocessing.get_context("spawn"),
            initializer=_quiet,
            initargs=(max(1, torch.get_num_threads() // workers),),
        )

    def do(self, job: dict[str, Any]) -> dict[str, Any]:
        """The run of a job, made now or before. TimeoutError if no time is left for it."""
        with self.lock:
            known: dict[str, Any] | None = next((r for r in self.runs if r["job"] == job), None)
        if known is not None:
            return known
        found = {"job": job, **self.pool.submit(_in_time, self.until, self.run, job).result()}
        with self.lock:
            self.runs.append(found)
            keep(self.path, runs=self.runs)
        step, loss, accuracy = found["curve"][-1]
        console.print(
            f"{job['what']}: {job['method']}, lr {job['lr']:g}, seed {job['seed']}: step {step}, "
            f"validation loss {loss:.4f}, accuracy {accuracy:.3f}, {found['worker_seconds']:.0f} s",
            highlight=False,
        )
        return found

    def side_by_side(self, what: Callable[[Any], Any], things: Sequence[Any]) -> list[Any]:
        """What of each thing, each in a thread that waits for its runs."""
        with ThreadPoolExecutor(max(1, len(things))) as threads:
            return list(threads.map(what, things))


# ---- the parts ---------------------------------------------------------------------------------------------------


def job_of(
    args: argparse.Namespace, what: str, method: str, lr: float, seed: int, clock: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:  # fmt: skip
    """All that a run depends on; with a clock, it lasts until both budgets end."""
    ends = steps_at(method, args.forwards, clock or {})
    last, steps = ends["forwards"], max(ends.values())
    job: dict[str, Any] = {
        "what": what,
        "data": "products" if what == "products" else "reviews",
        "method": method,
        "lr": lr,
        "seed": seed,
    }
    job |= {"steps": steps, "marks": sorted({*(round(m * last) for m in MARKS), steps}), "tested": last, "give_up": 4.0}
    return {**job, "longest": args.longest, "validation": args.validation, "test": args.test, **more}


def steps_in(method: str, forwards: int) -> int:
    """Steps that so many forwards pay for."""
    return max(1, round(forwards / METHODS[method].forwards))


def steps_at(method: str, forwards: int, seconds: dict[str, Any]) -> dict[str, int]:
    """Steps of a method at the end of each budget; that of seconds is what MeZO takes for its forwards."""
    last = steps_in(method, forwards)
    if not {method, "MeZO"} <= set(seconds):
        return {"forwards": last, "seconds": last}
    budget = seconds["MeZO"]["median"] * steps_in("MeZO", forwards)
    return {"forwards": last, "seconds": max(1, round(budget / seconds[method]["median"]))}


def sweep(args: argparse.Namespace, study: Study) -> dict[str, float]:
    """The best learning rate of each method, by validation loss after a run with a seed of its own."""

    def search(name: str) -> float:
        def loss(lr: float) -> float:
            steps = steps_in(name, args.forwards)
            how: dict[str, Any] = {"marks": [0, steps // 2, steps], "tested": None, "test": 0, "give_up": 1.25}
            found = study.do(job_of(args, "sweep", name, lr, SWEEP_SEED, **how))
            return float(found["curve"][-1][1]) if found["finished"] else math.inf

        tried = ladder(loss, METHODS[name].lr, most=5)
        return min(tried, key=lambda lr: tried[lr])

    names = [name for name in args.methods if name != PUBLISHED]
    rates = dict(zip(names, study.side_by_side(search, names), strict=True))
    return {**rates, PUBLISHED: rates.get("MeZO", METHODS[PUBLISHED].lr)}  # the same equations, three times as slow


def timing(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of each method, interleaved, beside a plain forward."""
    session = session_of("reviews", "bfloat16", args.longest)
    gate(session.model, session.loss_of(0), "shadow")
    console.print("correctness gate passed")
    session.model.to(torch.bfloat16)
    work: dict[str, Callable[[], object]] = {"forward": lambda: session.loss_of(0)()}
    for name in args.methods:
        _, train = trainer(name, session_of("reviews", dtype_of(name), args.longest), 1e-12, 0)
        work[name] = partial(train, 0)
    times = interleaved(work, args.rounds, "steps")
    found: dict[str, Any] = {}
    for name, seconds in times.items():
        found[name] = quantiles(seconds)
        if name in METHODS and name not in FIRST_ORDER:
            forwards = METHODS[name].forwards
            rest = [s - forwards * f for s, f in zip(seconds, times["forward"], strict=True)]
            found[name]["beside"] = quantiles(rest)["median"]
    rows = [
        [name, f"{f['median'] * 1e3:,.0f}", *([f"{f['beside'] * 1e3:,.0f}"] if "beside" in f else [""])]
        for name, f in found.items()
    ]
    report("A step (medians), and what it takes beside its forwards", ["", "step ms", "beside ms"], rows)
    return {"seconds": found, "batch": list(session.batch_of(0)[0].shape), "threads": torch.get_num_threads()}


def peak(name: str, longest: int) -> dict[str, int]:
    """Bytes that this process takes at most in three steps of a method, and in a forward; once a process."""
    session = session_of("reviews", dtype_of(name), longest)

    def at_most(work: Callable[[], object]) -> int:
        Path("/proc/self/clear_refs").write_text("5")
        work()
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) << 10

    inference = max(at_most(session.loss_of(0)) for _ in range(3))
    _, train = trainer(name, session, 1e-12, 0)
    return {"inference": inference, "training": max(at_most(partial(train, 0)) for _ in range(3))}


def memory(names: Sequence[str], longest: int) -> dict[str, dict[str, int]]:
    """Peak memory of each method, each in a process of its own."""
    spawn, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    with ProcessPoolExecutor(1, spawn, _quiet, (threads,), max_tasks_per_child=1) as pool:
        return {name: pool.submit(peak, name, longest).result() for name in names}


def zero_shot(args: argparse.Namespace, data: str) -> dict[str, float]:
    """Test loss and accuracy of the weights as they came."""
    session = session_of(data, "bfloat16", args.longest)
    found = tasks.evaluate(session.scorer, session.parts["test"][: args.test], batch_size=BATCH)
    return {"loss": found.loss, "accuracy": found.accuracy}


def runs_of(study: Study, what: str, method: str) -> list[dict[str, Any]]:
    """The runs of one part by one method."""
    return [r for r in study.runs if r["job"]["what"] == what and r["job"]["method"] == method]


def mean_curve(runs: Sequence[dict[str, Any]], column: int = 1) -> tuple[list[int], list[float], list[float]]:
    """Steps, mean and standard deviation over seeds of the validation loss (column 2: accuracy), at marks that all reached."""
    curves = [{p[0]: p[column] for p in r["curve"]} for r in runs]
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    values = [[curve[step] for curve in curves] for step in steps]
    return steps, [statistics.mean(v) for v in values], [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]


def reach(steps: Sequence[float], losses: Sequence[float], goal: float) -> float | None:
    """Steps until the loss is at the goal, on straight lines between marks; the first mark where it is already there."""
    if losses[0] <= goal:
        return steps[0]
    for (a, la), (b, lb) in pairwise(zip(steps, losses, strict=True)):
        if lb <= goal:
            return a + (b - a) * ((la - goal) / (la - lb) if la > lb else 1.0)
    return None


def loss_at(run: dict[str, Any], step: int) -> float:
    """Validation loss of a run at a step, on straight lines between marks."""
    steps, losses, _ = zip(*run["curve"], strict=True)
    return float(np.interp(step, steps, losses))


def mean_sd(values: Sequence[float]) -> dict[str, float | None]:
    """Over seeds."""
    return {
        "mean": statistics.mean(values) if values else None,
        "sd": statistics.stdev(values) if len(values) > 1 else None,
    }


def tables(args: argparse.Namespace, study: Study) -> dict[str, Any]:
    """Print what is known, and return it: each budget, and at it each method."""
    seconds, out = load(args.json).get("timing", {}).get("seconds", {}), dict[str, Any]()

    def shown(seconds: float | None) -> str:
        return "" if seconds is None else f"{seconds:.0f}"

    def plus_minus(q: dict[str, float | None], times: float, digits: int) -> str:
        return " ±".join(f"{times * v:.{digits}f}" for v in q.values() if v is not None)

    for what, budget in (("reviews", "forwards"), ("reviews", "seconds"), ("products", "forwards")):
        if not (base := runs_of(study, what, "MeZO")):
            continue
        rows, table = [], dict[str, Any]()
        goal = statistics.mean(loss_at(r, steps_in("MeZO", args.forwards)) for r in base)
        for name, method in METHODS.items():
            clock = seconds.get(name, {}).get("median")
            if not (runs := runs_of(study, what, name)) or (budget == "seconds" and clock is None):
                continue
            steps, losses, _ = mean_curve(runs)
            end = steps_at(name, args.forwards, seconds)[budget]
            at, memory = reach(steps, losses, goal), runs[-1].get("memory")
            row = table[name] = {
                "lr": runs[0]["job"]["lr"], "seeds": len(runs), "steps": end, "forwards": end * method.forwards,
                "seconds": clock and round(end * clock, 2), "before": losses[0],
                "validation_loss": mean_sd([loss_at(r, end) for r in runs]),
                "diverged": sum(not r["finished"] for r in runs),
                "forwards_to_mezo": None if at is None else at * method.forwards,
                "seconds_to_mezo": at and clock and at * clock, "memory": memory,
            }  # fmt: skip
            if budget == "forwards":
                row |= {f"test_{k}": mean_sd([r["test"][k] for r in runs if "test" in r]) for k in ("accuracy", "loss")}
            extra = sum(v for k, v in memory.items() if k != "weights") / 2**20 if memory else None
            rows.append([
                name, f"{row['lr']:.2g}", f"{len(runs)}", f"{end}", shown(row["seconds"]),
                plus_minus(row["validation_loss"], 1, 4),
                plus_minus(row["test_accuracy"], 100, 1) if "test_accuracy" in row else "",
                "never" if at is None else f"{at * method.forwards:.0f} / {shown(row['seconds_to_mezo'])}",
                "" if extra is None else f"{extra:.0f}",
            ])  # fmt: skip
        out[f"{what}, {budget}"] = table
        report(
            f"{what}, equal {budget}: validation loss {losses[0]:.4f} before; means ±sd over seeds",
            ["", "lr", "seeds", "steps", "s", "val. loss", "test acc. %", "forwards / s to MeZO's", "MiB beside"],
            rows,
        )  # fmt: skip
    return out


def plot(args: argparse.Namespace, study: Study) -> None:
    """Validation loss and accuracy against forwards and seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seconds = load(args.json).get("timing", {}).get("seconds", {})
    figure, axes = pyplot.subplots(2, 3, figsize=(16, 9))
    shown = (("reviews", "forwards"), ("reviews", "seconds"), ("products", "forwards"))
    for (column, measure), (at, (what, unit)) in product(((1, "loss"), (2, "accuracy")), enumerate(shown)):
        axis = axes[column - 1, at]
        for i, name in enumerate(METHODS):
            if runs := runs_of(study, what, name):
                steps, means, spread = mean_curve(runs, column)
                per = METHODS[name].forwards if unit == "forwards" else seconds.get(name, {}).get("median", math.nan)
                style = {"color": pyplot.colormaps["tab20"](i), "linestyle": "--" if name in FIRST_ORDER else "-"}
                axis.errorbar([s * per for s in steps], means, spread, label=name, marker=".", capsize=2, **style)
        task = "product" if what == "products" else "movie"
        axis.set(title=f"{task} reviews", xlabel=unit, ylabel=f"validation {measure}")
    axes[0, 1].legend(frameon=False, fontsize=9, loc="lower right")  # only the published way takes so long
    figure.tight_layout()
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.plot, dpi=110)
    console.print(f"written to {args.plot}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given again")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--published-seeds", type=int, default=1, help="of published MeZO, which is slow")
    parser.add_argument("--forwards", type=int, default=192, help="budget of a run (default 192)")
    parser.add_argument("--longest", type=int, default=32, help="tokens of a prompt; longer ones are left out")
    parser.add_argument("--validation", type=int, default=128, help="sentences")
    parser.add_argument("--test", type=int, default=480, help="sentences")
    parser.add_argument("--workers", type=int, default=torch.get_num_threads(), help="processes that share the cores")
    parser.add_argument("--rounds", type=int, default=7, help="of timing")
    parser.add_argument("--json", type=Path, default=Path("bench/results/methods.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/methods.png"))
    args = parser.parse_args()
    parts, study = args.part or PARTS, Study(args.json, args.workers, run)
    if "memory" in parts:
        known = load(args.json).get("memory", {})
        wanted = [name for name in args.methods if args.part or name not in known]
        keep(args.json, memory={**known, **memory(wanted, args.longest)})
    if "timing" in parts and ("timing" not in load(args.json) or args.part):
        known, found = load(args.json).get("timing", {}), timing(args)
        keep(args.json, timing={**found, "seconds": {**known.get("seconds", {}), **found["seconds"]}})
    rates = sweep(args, study) if {"sweep", "reviews", "products"} & set(parts) else {}
    seeds = {name: args.published_seeds if name == PUBLISHED else args.seeds for name in args.methods}
    for what in [part for part in ("reviews", "products") if part in parts]:
        known = load(args.json).get("zero_shot", {})
        if what not in known:
            keep(args.json, zero_shot={**known, what: zero_shot(args, what)})
        clock = load(args.json).get("timing", {}).get("seconds", {}) if what == "reviews" else {}
        study.side_by_side(study.do, [
            job_of(args, what, name, rates[name], seed, clock)
            for seed in range(args.seeds) for name in args.methods if seed < seeds[name]
        ])  # fmt: skip
    keep(args.json, machine=machine(), summary=tables(args, study))
    if "plot" in parts and study.runs:
        plot(args, study)


if __name__ == "__main__":
    main()
