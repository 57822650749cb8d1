"""A step of many probes: the grouped engine against the shadow engine, and both against plain forwards over as many rows.

FZOO (of one probe BSZO) at several numbers of probes and sizes of a batch, with the same noise. "Forwards" is what the evaluations of a step cost at
least without grouping: one plain forward for each point. Memory is the peak of a process of its own: of steps of each engine, and of
a plain forward over as many rows as the grouped engine evaluates at once.
"""

import copy
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import zo_core

from .harness import console, interleaved, keep, machine, quantiles, ratio, report
from .step import workload as whole

EXAMPLES = """Examples:

python -m bench.grouped                                        all sizes and numbers of probes (an hour on 2 cores)

python -m bench.grouped --sizes 1x16 --probes 8,32             short batches only

python -m bench.grouped --autocast --json grouped.json         float32 weights, bfloat16 forwards; figures as JSON

python -m bench.grouped --model OPT-1.3B --sizes 1x16 --points-at-once 8

python -m bench.grouped --lora 8 --distribution gaussian --probes 16   adapters of rank 8 on all linear layers, the rest frozen
"""
ENGINES = ("shadow", "grouped")
FORWARDS = 8  # plain forwards that are timed; their mean stands for the others


def workload(model: str, dtype: str, batch: int, length: int, options: dict[str, Any]) -> tuple[Any, Any]:
    """The model in its scorer, if asked for with LoRA adapters, whose second factors are no longer zero; and prompts."""
    scorer, examples = whole(model, dtype, batch, length, options["autocast"])
    if options["lora"]:
        from peft import LoraConfig, get_peft_model

        scorer.model = get_peft_model(scorer.model, LoraConfig(r=options["lora"], target_modules="all-linear"))
        generator = torch.Generator().manual_seed(0)
        for p in scorer.model.parameters():
            if p.requires_grad:
                p.data.normal_(0, 0.02, generator=generator)
    return scorer, examples


def closure_of(scorer: Any, examples: Any) -> Callable[[], Tensor]:
    """The loss of a batch, without gradients."""
    found: Callable[[], Tensor] = torch.no_grad()(partial(scorer.loss, examples))
    return found


def optimizer(model: Any, engine: str, probes: int, options: dict[str, Any]) -> Any:
    """FZOO, or for one probe, of which it has no deviation, BSZO, whose steps are one-sided too; steps are too small to matter."""
    at_once = {"points_at_once": options["points_at_once"]} if engine == "grouped" else {}
    shared = {"lr": 1e-9, "probes": probes, "distribution": options["distribution"], "rank": options["rank"]}
    return (zo_core.FZOO if probes > 1 else zo_core.BSZO)(model, engine=engine, **shared, **at_once)


def gate(model: Any, loss: Callable[[], Tensor], options: dict[str, Any]) -> float:
    """The largest difference of the engines' losses at five points; SystemExit if it is more than rounding."""
    points: list[Any] = [(0.0, None), *((c, torch.tensor([k])) for k in (0, 1) for c in (1e-3, -1e-3))]
    found = {}
    for engine in ENGINES:
        serving = optimizer(model, engine, 2, options)._prepare()
        with torch.no_grad():
            found[engine] = serving.evaluate_all(loss, points)
        if left := getattr(serving, "fallback", None):
            raise SystemExit(f"correctness gate: the grouped engine does not serve this model: {left}")
    apart = float((found["grouped"] - found["shadow"]).abs().max())
    most = 1e-5 if {p.dtype for p in model.parameters()} == {torch.float32} and not options["autocast"] else 1e-1
    if not apart <= most:
        raise SystemExit(f"correctness gate: losses differ by {apart}; no figure is given")
    return apart


def timing(
    scorer: Any, examples: Any, size: str, probes: list[int], rounds: int, options: dict[str, Any]
) -> tuple[list[list[str]], dict[str, Any]]:
    """Rows of the table and figures, one a number of probes. Each engine has weights of its own."""
    copies = {engine: copy.deepcopy(scorer) for engine in ENGINES}
    losses = {engine: closure_of(own, examples) for engine, own in copies.items()}
    loss = closure_of(scorer, examples)
    rows, found = [], {}
    for n in probes:
        opts = {engine: optimizer(copies[engine].model, engine, n, options) for engine in ENGINES}
        timed = min(FORWARDS, 1 + n)
        tasks: dict[str, Callable[[], object]] = {"forwards": partial(repeat, loss, timed)}
        tasks |= {engine: partial(opts[engine].step, losses[engine]) for engine in ENGINES}
        seconds = interleaved(tasks, rounds, f"{size}, {n} probes")
        seconds["forwards"] = [s * (1 + n) / timed for s in seconds["forwards"]]
        at_once = min(1 + n, opts["grouped"]._engine._at_once())
        q = {name: quantiles(times) for name, times in seconds.items()}
        ratios = {f"{engine}_over_forwards": ratio(seconds[engine], seconds["forwards"]) for engine in ENGINES}
        ratios["times_faster"] = ratio(seconds["shadow"], seconds["grouped"])
        found[str(n)] = {"seconds": q, **ratios, "points_at_once": at_once}
        cells = [f"{q[name]['median'] * 1e3:,.0f}" for name in ("forwards", *ENGINES)]
        rows.append([f"{size}, {n} probes", *cells, *(f"{r['median']:.2f}" for r in ratios.values()), str(at_once)])
    return rows, found


def repeat(work: Callable[[], object], times: int) -> None:
    """Do it so many times."""
    for _ in range(times):
        work()


def peak(
    what: str, model: str, dtype: str, size: tuple[int, int], probes: int, options: dict[str, Any], threads: int
) -> tuple[int, int]:
    """Bytes that this process takes at most in a plain forward or in steps of an engine; and points at once."""
    torch.set_num_threads(threads)
    scorer, examples = workload(model, dtype, *size, options)
    work, at_once = closure_of(scorer, examples), 1
    if what != "forward":
        opt = optimizer(scorer.model, what, probes, options)
        work = partial(opt.step, work)
        work()
        at_once = min(1 + probes, opt._engine._at_once()) if what == "grouped" else 1
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        work()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10, at_once


def peaks_of(model: str, dtype: str, size: tuple[int, int], probes: int, options: dict[str, Any]) -> dict[str, int]:
    """Peak memory of each engine, and of a plain forward over as many rows as the grouped engine evaluates at once."""

    def measured(what: str, size: tuple[int, int]) -> tuple[int, int]:  # in a process of its own, whose peak it is
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(peak, what, model, dtype, size, probes, options, torch.get_num_threads()).result()

    grouped, at_once = measured("grouped", size)
    shadow, _ = measured("shadow", size)
    forward, _ = measured("forward", (size[0] * at_once, size[1]))
    return {"forward": forward, "shadow": shadow, "grouped": grouped, "points_at_once": at_once}


def plot(found: dict[str, Any], path: Path) -> None:
    """Milliseconds a point over the number of probes, a panel for each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(5 * len(found), 4), squeeze=False)
    for axis, (size, by_probes) in zip(axes[0], found.items(), strict=True):
        for name in ("forwards", *ENGINES):
            points = [(int(n), x["seconds"][name]["median"] * 1e3 / (1 + int(n))) for n, x in by_probes.items()]
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(title=f"{size} tokens", xlabel="probes", ylabel="ms a point", xscale="log", ylim=0)
        axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    console.print(f"plot in {path}")


def main(
    model: Annotated[str, typer.Option(help="Registry name, folder, hub id or size of bench.gpu_models.")] = "smollm2",
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "bfloat16",
    autocast: Annotated[bool, typer.Option(help="bfloat16 forwards over float32 weights, as make demo.")] = False,
    sizes: Annotated[str, typer.Option(help="Examples x tokens, comma-separated.")] = "1x16,4x32,16x32",
    probes: Annotated[str, typer.Option(help="Numbers of probes, comma-separated.")] = "1,8,32,128",
    distribution: Annotated[str, typer.Option(help="Of both engines.")] = "factored",
    rank: Annotated[int, typer.Option(help="Of factored noise.")] = 1,
    points_at_once: Annotated[int | None, typer.Option(help="Of the grouped engine. Without: its own choice.")] = None,
    lora: Annotated[int, typer.Option(help="Rank of LoRA adapters, which alone are trained; 0: all weights are.")] = 0,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds, after one that is not counted.")] = 3,
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory too, at the largest number of probes up to 32.")
    ] = True,
    json: Annotated[
        Path | None, typer.Option(help="Write the figures here; what is there of other sizes stays.")
    ] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="Write a plot here.")] = None,
) -> None:
    """Step times of the grouped and the shadow engine over probes and sizes, behind a correctness gate."""
    dtype = "float32" if autocast else dtype
    counts = [int(n) for n in probes.split(",")]
    shapes = {size: (int(size.split("x")[0]), int(size.split("x")[1])) for size in sizes.split(",")}
    options: dict[str, Any] = {"distribution": distribution, "rank": rank, "points_at_once": points_at_once}
    options |= {"autocast": autocast, "lora": lora}
    rows: list[list[str]] = []
    result: dict[str, Any] = {}
    for size, shape in shapes.items():
        scorer, examples = workload(model, dtype, *shape, options)
        apart = gate(scorer.model, closure_of(scorer, examples), options)
        console.print(f"{size}: correctness gate passed, losses differ by {apart:.1e} at most")
        more, result[size] = timing(scorer, examples, size, counts, rounds, options)
        rows += more
        if json:
            keep(json, machine=machine(), **{f"{size}, LoRA {lora}" if lora else size: result[size]})
    columns = [
        "",
        "forwards",
        "shadow, ms",
        "grouped, ms",
        "shadow / forwards",
        "grouped / forwards",
        "times faster",
        "at once",
    ]
    report("A step of one-sided probes", columns, rows, result, None)
    if memory:
        n = max((n for n in counts if n <= 32), default=min(counts))
        table, peaks = [], {}
        for size, shape in shapes.items():
            taken = peaks[size] = {"probes": n, **peaks_of(model, dtype, shape, n, options)}
            cells = [f"{taken[name] / 2**20:,.0f}" for name in ("forward", *ENGINES)]
            table.append([f"{size}, {n} probes", *cells, f"{taken['grouped'] / taken['forward']:.2f}"])
        report("Peak memory, MiB", ["", "forward, same rows", *ENGINES, "grouped / forward"], table, peaks, None)
        if json:
            keep(json, memory=peaks)
    if json:
        console.print(f"written to {json}")
    if picture:
        plot(result, picture)


if __name__ == "__main__":
    main.__doc__ = f"{main.__doc__}\n\n{EXAMPLES}"
    typer.run(main)
