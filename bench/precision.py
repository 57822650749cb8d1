"""What happens to weights of 16 bits in zeroth-order training: the published way, ours, and ours with residuals.

displacement: known updates (Gaussian z, prescribed projected gradients g) on one layer, each after two probes, and how
far the weights then are from the exact sum of -lr g z. At lr 0 what is left is the drift that probing alone causes.
training: MeZO on movie reviews with the same data (and, but for the published way, the same probes) in every way. Each
finished run is kept in the JSON; an interrupted study goes on where it was.

A weight with a residual counts twice: weight + residual is what is trained, the weight alone what a model is saved as.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from zo_core.kernels import reference

import zo_core
from zo_core.integrations import report as report_of_run
from zo_core.integrations import tasks
from zo_core.integrations.config import EARLIER, FinetuneConfig
from zo_core.integrations.session import Session, prepare
from zo_core.weights import Update

from . import published
from .harness import console, keep, load, machine, report

EXAMPLES = """examples:
  python -m bench.precision                                  both parts (training takes an hour or so)
  python -m bench.precision --part displacement              the synthetic part, minutes
  python -m bench.precision --part training --seeds 5        two more seeds; those that are there are kept
  python -m bench.precision --part training --steps 2 --seeds 1 --validation 32 --json try.json --plot try.png
"""
EPS, SPREAD, GRADIENT = 1e-3, 0.02, 30.0  # of the synthetic part: of the probes, of the weights, of g
VALUE, WEIGHT = "weight + residual", "weight"


watched = partial(track, console=console, transient=True, disable=not console.is_terminal)


@dataclass(frozen=True)
class Way:
    """One way to train; without an engine it is the published one."""

    engine: str | None = "shadow"
    stochastic: bool = False
    residual: int | None = None

    def optimizer(self, model: nn.Module, **options: Any) -> zo_core.MeZO:
        """Ours, as this way has it."""
        return zo_core.MeZO(
            model, engine=self.engine, stochastic_rounding=self.stochastic, residual=self.residual, **options
        )

    def differs(self, dtype: str) -> bool:
        """Whether it is a way of its own with weights of this dtype: float32 rounds one way and has no residuals."""
        return dtype != "float32" or not (self.stochastic or self.residual)


WAYS = {
    "published": Way(None),
    "in place, nearest": Way("inplace"),
    "in place, stochastic": Way("inplace", stochastic=True),
    "in place, residual 8": Way("inplace", stochastic=True, residual=8),
    "in place, residual 16": Way("inplace", stochastic=True, residual=16),
    "nearest": Way(),
    "stochastic": Way(stochastic=True),
    "residual 8": Way(stochastic=True, residual=8),
    "residual 16": Way(stochastic=True, residual=16),
}
FLOAT32 = "float32"
TRAINED = {FLOAT32: ("nearest", "float32")} | {
    f"bfloat16, {name}": (name, "bfloat16")
    for name in ("residual 16", "residual 8", "stochastic", "nearest", "in place, stochastic", "published")
}


# ---- displacement ------------------------------------------------------------------------------------------


def start(n: int, count: int, dtype: str) -> nn.ModuleList:
    """Layers of n x n weights, all with the same, which bfloat16 has as well."""
    values = SPREAD * torch.randn(n, n, generator=torch.Generator().manual_seed(1))
    layers = nn.ModuleList(nn.Linear(n, n, bias=False) for _ in range(count))
    for p in layers.parameters():
        p.data = values.bfloat16().to(getattr(torch, dtype), copy=True)
    return layers


def published_steps(layers: nn.ModuleList, lrs: Sequence[float]) -> tuple[Callable[[int, float], None], list[Tensor]]:
    """A step with number k and projected gradient g of each layer at its own rate, and the layers' residuals."""

    def step(k: int, g: float) -> None:
        for p, lr in zip(layers.parameters(), lrs, strict=True):
            for scale in (1, -2, 1):
                published.perturb([p], k, scale, EPS)
            published.update([p], k, lr, g)

    return step, []


def our_steps(
    way: Way, layers: nn.ModuleList, lrs: Sequence[float]
) -> tuple[Callable[[int, float], None], list[Tensor]]:
    """As ``published_steps``, through the engine."""
    optimizer = way.optimizer(layers, lr=0.0, eps=EPS)
    engine, rates = optimizer._prepare(), torch.tensor([lrs], dtype=torch.float64)
    none, usable = torch.zeros(len(lrs)), torch.ones((), dtype=torch.bool)

    def closure() -> Tensor:
        return torch.stack([p.sum() for p in layers.parameters()]).sum()

    def step(k: int, g: float) -> None:
        (probe,) = optimizer.draw(1)
        for c in (EPS, -EPS):
            engine.evaluate(closure, c, probe)
        engine.update(
            [probe], Update(usable, (-g * rates).float(), none), torch.tensor([k]) if way.stochastic else None
        )

    return step, engine.space.residuals


def exact(draw: Callable[[int], list[Tensor]], gradients: list[float], marks: Sequence[int]) -> dict[int, list[Tensor]]:
    """The sum of g z over so many updates, for each layer, in float64."""
    totals = [torch.zeros_like(z, dtype=torch.float64) for z in draw(0)]
    found = {}
    for k, g in enumerate(watched(gradients, "exact sums")):
        for total, z in zip(totals, draw(k), strict=True):
            total.add_(z, alpha=g)
        if k + 1 in marks:
            found[k + 1] = [total.clone() for total in totals]
    return found


def our_z(weights: Sequence[Tensor], k: int) -> list[Tensor]:
    """What probe k adds to each layer."""
    return [zo_core.noise.sample("gaussian", p.shape, seed=0, tensor_id=i, stream=k) for i, p in enumerate(weights)]


def published_z(weights: Sequence[Tensor], k: int) -> list[Tensor]:
    """What the published way draws in step k, the same for each layer."""
    published.reseed(k)
    return [published.normal(weights[0])] * len(weights)


def measure(before: Tensor, after: Tensor, wanted: Tensor) -> dict[str, float | None]:
    """Error and cosine of the displacement, the fraction that moved by a bit or more, change over the weights' RMS."""
    d = after.double() - before
    size, moved = wanted.norm(), (d != 0) | (after.signbit() != before.signbit())
    return {
        "error": float((d - wanted).norm() / size) if size else None,
        "cosine": float((d * wanted).sum() / (d.norm() * size).clamp(min=1e-300)) if size else None,
        "moved": float(moved.double().mean()),
        "change": float(d.norm() / before.norm()),
    }


@torch.no_grad()
@torch.random.fork_rng()
def displacement(
    n: int, rates: Sequence[float], marks: Sequence[int], dtypes: Sequence[str], ways: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[tuple[str, str, float], Tensor]]:
    """Run the ways; what was measured after each of ``marks`` updates, and the displacements in the end."""
    lrs = [0.0, *rates]
    gradients = GRADIENT * torch.randn(max(marks), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    records, reached = [], {}
    sums: dict[str, dict[int, list[Tensor]]] = {}  # by whose z
    for dtype in dtypes:
        for name in (name for name in ways if WAYS[name].differs(dtype)):
            way, layers = WAYS[name], start(n, len(lrs), dtype)
            weights = list(layers.parameters())
            before, whose = weights[0].double(), "ours" if way.engine else dtype
            if whose not in sums:
                sums[whose] = exact(partial(our_z if way.engine else published_z, weights), gradients.tolist(), marks)
            step, residuals = our_steps(way, layers, lrs) if way.engine else published_steps(layers, lrs)
            begun = time.perf_counter()
            for k, g in enumerate(watched(gradients.tolist(), f"{dtype}, {name}")):
                step(k, g)
                for i, lr in enumerate(lrs if k + 1 in marks else []):
                    values = {WEIGHT: weights[i].float()}
                    if residuals:
                        values = {VALUE: reference.join(weights[i], residuals[i])} | values
                    reached[dtype, name, lr] = next(iter(values.values())).double() - before
                    about = {"dtype": dtype, "way": name, "lr": lr, "updates": k + 1}
                    wanted = -lr * sums[whose][k + 1][i]
                    records += [{**about, "of": of, **measure(before, x, wanted)} for of, x in values.items()]
            console.print(f"{dtype}, {name}: {time.perf_counter() - begun:.0f} s", style="dim", highlight=False)
    return records, reached


def gate(records: list[dict[str, Any]], reached: dict[tuple[str, str, float], Tensor]) -> None:
    """What must hold before a figure is given."""
    rate = max(r["lr"] for r in records)
    for r in records:
        if (r["dtype"], r["way"], r["lr"]) == ("float32", "nearest", rate) and not r["error"] < 1e-3:
            raise SystemExit(
                f"correctness gate: the displacement of float32 is off by {r['error']}; no figure is given"
            )
        if r["lr"] == 0 and r["moved"] and WAYS[r["way"]].engine == "shadow":
            raise SystemExit(f"correctness gate: probes changed weights of {r['dtype']}; no figure is given")
    for lr in {lr for _, _, lr in reached}:
        ours, full = (reached.get(key) for key in (("bfloat16", "residual 16", lr), ("float32", "nearest", lr)))
        if ours is not None and full is not None and not (ours - full).norm() <= 1e-3 * full.norm():
            raise SystemExit(f"correctness gate: at lr {lr} residual 16 is not as float32; no figure is given")


def displacement_rows(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The table's columns and rows."""
    rates = sorted({r["lr"] for r in records} - {0.0})
    rows: dict[tuple[str, ...], list[str]] = {}
    for r in sorted(records, key=lambda r: r["lr"]):
        name = r["way"] + (", weight alone" if WAYS[r["way"]].residual and r["of"] == WEIGHT else "")
        rows.setdefault((r["dtype"], "", ""), [])
        cells = rows.setdefault((r["dtype"], name, f"{r['updates']:,}"), [])
        if r["lr"]:
            cells.append(f"{r['error']:.2g}  {r['cosine']:.3f}  {r['moved']:4.0%}")
        else:
            cells.append(f"{r['change']:.1e}" if r["moved"] else "none")
    table = [[name or dtype, updates, *cells] for (dtype, name, updates), cells in rows.items()]
    return ["", "updates", "drift", *(f"lr {lr:g}" for lr in rates)], table


def run_displacement(args: argparse.Namespace) -> None:
    """The synthetic part."""
    begun = time.perf_counter()
    records, reached = displacement(args.weights, args.rates, args.updates, args.dtypes, list(WAYS))
    gate(records, reached)
    console.print("correctness gate passed")
    columns, rows = displacement_rows(records)
    report(
        f"{args.weights} x {args.weights} weights: displacement error, cosine, weights that moved",
        columns,
        rows,
        {},
        None,
    )
    sizes = {"weights": args.weights, "eps": EPS, "rms of weights": SPREAD, "rms of g": GRADIENT}
    seconds = round(time.perf_counter() - begun)
    keep(args.json, displacement={"machine": machine(), **sizes, "seconds": seconds, "records": records})


# ---- training ----------------------------------------------------------------------------------------------


def stepper(way: Way, session: Session) -> Callable[[int, float, Callable[[], Tensor]], float]:
    """A MeZO step: its number, learning rate and closure; it returns the loss."""
    config = session.config
    if way.engine is None:
        params = [p for p in session.model.parameters() if p.requires_grad]
        first = config.seed * (config.steps or 0)
        return lambda k, lr, loss: published.mezo_step(params, loss, first + k, lr, config.eps)
    options = {"lr": config.lr, "eps": config.eps, "seed": config.seed, "distribution": config.distribution}
    optimizer = way.optimizer(session.model, **options)

    def step(k: int, lr: float, loss: Callable[[], Tensor]) -> float:
        for group in optimizer.param_groups:
            group["lr"] = lr
        return float(optimizer.step(loss))

    return step


@torch.random.fork_rng()
def train(way: Way, config: FinetuneConfig, title: str) -> dict[str, Any]:
    """One run: validation before and after, the loss of each step, and seconds of the steps."""
    with console.status(title):
        session = prepare(config)
        evaluate = partial(
            tasks.evaluate, session.scorer, session.parts["validation"], batch_size=config.eval_batch_size
        )
        before = evaluate().report()
    step, losses, seconds = stepper(way, session), [], 0.0
    for k in watched(range(config.steps or 0), title):
        loss = session.loss_of(k)
        begun = time.perf_counter()
        losses.append(step(k, config.lr_at(config.progress(k, 0.0)), loss))
        seconds += time.perf_counter() - begun
    return {"before": before, "after": evaluate().report(), "seconds": seconds, "losses": [round(x, 5) for x in losses]}


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a run depends on beside way and seed: runs that differ in it are not compared."""
    about = machine()
    names = ("model", "steps", "batch", "validation", "lr", "eps")
    return {name: getattr(args, name) for name in names} | {name: about[name] for name in ("processor", "torch")}


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation."""
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By way: loss and accuracy over seeds, and paired differences from float32 with their standard errors."""
    ways: dict[str, dict[str, Any]] = {}
    base = {run["seed"]: run for run in runs if run["way"] == FLOAT32}
    for name in (name for name in TRAINED if any(run["way"] == name for run in runs)):
        own = [run for run in runs if run["way"] == name]
        found = ways[name] = {"seeds": len(own), "seconds": spread([run["seconds"] for run in own])}
        for what in ("loss", "accuracy"):
            found[what] = {when: spread([run[when][what] for run in own]) for when in ("before", "after")}
            pairs = [run["after"][what] - base[run["seed"]]["after"][what] for run in own if run["seed"] in base]
            if pairs and name != FLOAT32:
                difference = spread(pairs)
                sd = difference.pop("sd")
                found[what]["difference"] = {**difference, "se": None if sd is None else sd / len(pairs) ** 0.5}
    return ways


def shown(x: dict[str, float | None] | None, scale: float = 1, digits: int = 4, sign: str = "") -> str:
    """A mean and what stands for its spread."""
    if x is None:
        return ""
    mean, *other = (None if v is None else v * scale for v in x.values())
    return f"{mean:{sign}.{digits}f}" + "".join(f" ±{v:.{digits}f}" for v in other if v is not None)


def run_training(args: argparse.Namespace) -> None:
    """The part on a model; every run is in the JSON as soon as it is done."""
    common = settings(args)
    jobs = [
        (name, seed)
        for seed in range(args.seeds)
        for name in args.ways
        if name != "bfloat16, published" or seed < args.published_seeds
    ]

    def key(run: dict[str, Any]) -> tuple[Any, ...]:
        return run["way"], run["seed"], run["settings"]

    runs = load(args.json).get("training", {}).get("runs", [])
    if not args.resume:
        runs = [run for run in runs if key(run) not in [(*job, common) for job in jobs]]

    def kept() -> dict[str, dict[str, Any]]:
        ways = summarize([run for run in runs if run["settings"] == common])
        keep(args.json, training={"machine": machine(), "settings": common, "ways": ways, "runs": runs})
        return ways

    for name, seed in jobs:
        if (name, seed, common) in map(key, runs):
            continue
        way, dtype = TRAINED[name]
        own = {"model": args.model, "dtype": dtype, "autocast": False, "seed": seed, "validation_size": args.validation}
        own |= EARLIER
        schedule = {"steps": args.steps, "batch_size": args.batch, "lr": args.lr, "eps": args.eps}
        config = FinetuneConfig(**own, **schedule)
        run = train(WAYS[way], config, f"{name}, seed {seed}")
        runs.append({"way": name, "seed": seed, "settings": common, **run})
        kept()
        after, took = run["after"], f"{run['seconds']:.0f} s"
        console.print(f"{name}, seed {seed}: loss {after['loss']:.4f}, accuracy {after['accuracy']:.4f}, {took}")
    rows = [
        [
            name, str(w["seeds"]), shown(w["loss"]["before"]), shown(w["loss"]["after"]),
            shown(w["loss"].get("difference"), sign="+"), shown(w["accuracy"]["after"], 100, 1),
            shown(w["accuracy"].get("difference"), 100, 1, "+"), shown(w["seconds"], digits=0),
        ]
        for name, w in kept().items()
    ]  # fmt: skip
    report(
        f"{args.model}, {args.steps} steps of {args.batch}: validation (n {args.validation}), mean ±sd; difference ±se",
        ["", "seeds", "loss before", "after", "from float32", "accuracy %", "from float32", "seconds"],
        rows,
    )  # fmt: skip


# ---- what is left ------------------------------------------------------------------------------------------


def draw_displacement(axes: Any, part: dict[str, Any]) -> None:
    """Error by way and rate, bfloat16, after the most updates."""
    last = max(r["updates"] for r in part["records"])
    chosen = [r for r in part["records"] if r["dtype"] == "bfloat16" and r["updates"] == last and r["lr"]]
    chosen = [r for r in chosen if r["of"] == VALUE or not WAYS[r["way"]].residual]
    for lr in sorted({r["lr"] for r in chosen}):
        rows = [r for r in chosen if r["lr"] == lr]
        axes.plot([r["error"] for r in rows], [r["way"] for r in rows], "o", label=f"lr {lr:g}", alpha=0.8)
    axes.axvline(1, color="#9ca3af", linewidth=1, linestyle="--")
    axes.set(xscale="log", xlabel="|D - exact| / |exact|", title=f"bfloat16, displacement error, {last:,} updates")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=9)


def draw_validation(axes: Any, part: dict[str, Any]) -> None:
    """Validation loss by way, with the standard deviation over seeds."""
    for name, way in part["ways"].items():
        loss = way["loss"]["after"]
        axes.errorbar(loss["mean"], name, xerr=loss["sd"], fmt="o", capsize=4)
    before = part["ways"][next(iter(part["ways"]))]["loss"]["before"]["mean"]
    axes.axvline(before, color="#9ca3af", linewidth=1, linestyle="--", label="before")
    axes.set(xlabel="loss (nats), ± sd over seeds", title=f"validation loss, {part['settings']['steps']} steps")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=9)


def draw_losses(axes: Any, part: dict[str, Any]) -> None:
    """Training loss of each step, mean over seeds, smoothed."""
    for name in part["ways"]:
        losses = [r["losses"] for r in part["runs"] if r["way"] == name and r["settings"] == part["settings"]]
        axes.plot(report_of_run.smooth([statistics.mean(step) for step in zip(*losses, strict=True)]), label=name)
    axes.set(xlabel="step", ylabel="loss (nats), smoothed", title="training loss")
    axes.legend(frameon=False, fontsize=8)


PANELS = (("displacement", draw_displacement), ("training", draw_validation), ("training", draw_losses))


def plot(result: dict[str, Any], path: Path) -> None:
    """A panel for each thing that is there."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(draw, result[part]) for part, draw in PANELS if part in result]
    figure = Figure(figsize=(6.2 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (draw, part) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, part)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    console.print(f"drawn in {path}")


PARTS = {"displacement": run_displacement, "training": run_training}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: both")
    parser.add_argument("--json", type=Path, default=Path("bench/results/precision.json"), help="(default %(default)s)")
    parser.add_argument("--plot", type=Path, default=Path("docs/precision.png"), help="(default %(default)s)")
    synthetic = parser.add_argument_group("displacement")
    synthetic.add_argument("--weights", type=int, default=256, metavar="N", help="N x N weights (default 256)")
    synthetic.add_argument("--updates", type=int, nargs="+", default=[1_000, 10_000], help="(default 1000 10000)")
    synthetic.add_argument(
        "--rates", type=float, nargs="+", default=[1e-7, 1e-6, 1e-5], help="(default 1e-7 1e-6 1e-5)"
    )
    synthetic.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"],
                           choices=["bfloat16", "float16", "float32"])  # fmt: skip
    training = parser.add_argument_group("training")
    training.add_argument("--model", default="smollm2", help="registry name, folder or hub id (default smollm2)")
    training.add_argument("--ways", nargs="+", default=list(TRAINED), choices=TRAINED, metavar="WAY",
                          help=f"of {'; '.join(TRAINED)} (default all)")  # fmt: skip
    training.add_argument("--steps", type=int, default=120)
    training.add_argument("--seeds", type=int, default=3, help="data orders and probes (default 3)")
    training.add_argument(
        "--published-seeds", type=int, default=1, help="of the published way, which is slow (default 1)"
    )
    training.add_argument("--validation", type=int, default=400, help="sentences (default 400)")
    training.add_argument("--batch", type=int, default=16)
    training.add_argument("--lr", type=float, default=3e-5, help="falls linearly (default 3e-5)")
    training.add_argument("--eps", type=float, default=1e-3)
    training.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                          help="keep finished runs with the same settings (the default)")  # fmt: skip
    args = parser.parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # and no bars of its own, before it is imported
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for part in args.part:
        PARTS[part](args)
    plot(load(args.json), args.plot)
    console.print(f"written to {args.json}")


if __name__ == "__main__":
    main()
