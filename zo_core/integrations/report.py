"""What people read about a run or a machine: versions, the findings of `zo-core doctor`, the summary table and the plot."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import zo_core
from zo_core import Calibration
from zo_core.bindings import cuda, native
from zo_core.integrations import assets


def versions() -> dict[str, str | None]:
    """Version of Python and of each package that can change a result; None where one is not installed."""
    found: dict[str, str | None] = {"zo_core": zo_core.__version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Any]:
    """The system, processor, number of logical cores and of torch's threads, memory in bytes, and the names of GPUs."""
    import psutil

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def diagnose() -> list[dict[str, str]]:
    """What is installed and what is missing: dicts of `state` ("ok", "slow" or "missing"), `what`, `found` and `advice`."""
    found, backend, rows = versions(), zo_core.backend_info(), list[tuple[str, str, str, str]]()

    def add(what: str, value: object, otherwise: str = "ok", advice: str = "") -> None:
        """A row whose state is "ok" if there is a value, and else ``otherwise``, with the advice."""
        rows.append(("ok" if value else otherwise, what, str(value or "none"), "" if value else advice))

    add("zo_core", found["zo_core"])
    add("Python", found["python"])
    add("torch", found["torch"])
    add("transformers", found["transformers"], "missing", "pip install 'zo_core[train]'")
    isas = ", ".join(map(str, backend["isas"]))  # type: ignore[call-overload]
    native_library = backend["native"] and f"{backend['isa']} (of {isas})"
    add("native library", native_library, "slow", str(backend["why_missing"]))
    add("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    gpus = ", ".join(machine()["gpus"])
    add("GPU", gpus, advice="the CPU is used; for a GPU install a torch built for it")
    add("triton", found["triton"], "slow" if gpus else "ok", "pip install 'triton>=3.6'" if gpus else "only for a GPU")
    rows.extend(_kernels(torch.device("cuda", i)) for i in range(torch.cuda.device_count()))
    pip = importlib.util.find_spec("pip") and importlib.metadata.version("pip")
    cached = [name for name in assets.ASSETS if assets.is_cached(name)]
    without_pip = "ok" if len(cached) == len(assets.ASSETS) else "slow"
    add("pip", pip, without_pip, "python -m ensurepip, to fetch assets")
    folder = cuda.cache_folder()
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    writable = os.access(nearest, os.W_OK)
    add("cache folder", writable and str(folder), "missing", f"{folder} is read-only: set ZO_CORE_CACHE")
    add("cached assets", ", ".join(cached), advice=f"{', '.join(assets.ASSETS)} are fetched when first used")
    return [dict(zip(("state", "what", "found", "advice"), row, strict=True)) for row in rows]


def _kernels(device: torch.device) -> tuple[str, str, str, str]:
    """A row about the kernels on a GPU: whether their check found them right, and how many are compiled already."""
    verdict = None if native.CHOICE == "reference" else cuda.check(device)
    if verdict is None:
        state, found, advice = "slow", "none", "ZO_CORE_BACKEND=reference switches them off: unset it"
    elif verdict.wrong:
        state, found = "slow", "wrong: the torch reference is used"
        advice = f"report this as a bug of zo_core: {verdict}"
    else:
        from zo_core.kernels.triton import cache

        when = "found right by an earlier process" if verdict.remembered else f"found right in {verdict.seconds:.1f} s"
        state, found, advice = "ok", f"{when}; {cache.kept()} compiled forms in {cache.folder()}", ""
    return state, f"kernels on {device}", found, advice


def peak_rss() -> int | None:
    """The largest resident memory of this process so far, in bytes; None where the system does not report it."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """The bias-corrected exponential moving average of the values; values that are not finite are passed over."""
    average, total, out = 0.0, 0.0, []
    for value in values:
        if value - value == 0:
            average, total = weight * average + (1 - weight) * value, weight * total + (1 - weight)
        out.append(average / total if total else float("nan"))
    return out


def plot(path: Path, steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]], title: str) -> None:
    """Write a PNG: training loss and validation accuracy over forward passes, with training seconds on an axis at the top.

    Args:
        path: the file.
        steps: the `step` lines of metrics.jsonl (`forwards`, `seconds`, `loss`).
        evaluations: the `evaluation` lines (`split`, `forwards`, `accuracy`, `interval`).
        title: drawn above both panels.
    """
    from matplotlib.figure import Figure

    blue, orange, grey = "#2563eb", "#d97706", "#9ca3af"
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2, sharex=True)
    forwards = [0, *(line["forwards"] for line in steps)]
    seconds = [0.0, *(line["seconds"] for line in steps)]
    losses = [float("nan") if line["loss"] is None else line["loss"] for line in steps]
    left.plot(forwards[1:], losses, color=grey, alpha=0.45, linewidth=0.8, label="each step")
    left.plot(forwards[1:], smooth(losses), color=blue, linewidth=2, label="smoothed")
    left.set_ylabel("training loss")

    validation = [line for line in evaluations if line["split"] == "validation"]
    x = [line["forwards"] for line in validation]
    right.plot(x, [line["accuracy"] for line in validation], "o-", color=blue, linewidth=2, label="validation")
    low, high = ([line["interval"][side] for line in validation] for side in (0, 1))
    right.fill_between(x, low, high, color=blue, alpha=0.15, linewidth=0, label="95% interval")
    for line in evaluations:
        if line["split"] == "test":
            error = [[line["accuracy"] - line["interval"][0]], [line["interval"][1] - line["accuracy"]]]
            label = "test" if line["forwards"] else None
            right.errorbar(line["forwards"], line["accuracy"], error, fmt="D", color=orange, capsize=4, label=label)
    right.set_ylabel("accuracy")
    for axes in (left, right):
        axes.set_xlabel("forward passes")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
        if len(steps) > 1:
            _seconds_on_top(axes, forwards, seconds)
    figure.savefig(path, dpi=150)


def _seconds_on_top(axes: Any, forwards: Sequence[float], seconds: Sequence[float]) -> None:
    """A second axis, at the top, with the training seconds, linear between the steps and after the last one."""
    import numpy

    rate = seconds[-1] / forwards[-1]

    def to_seconds(x: Any) -> Any:
        return numpy.where(x > forwards[-1], x * rate, numpy.interp(x, forwards, seconds))

    def to_forwards(y: Any) -> Any:
        return numpy.where(y > seconds[-1], y / rate, numpy.interp(y, seconds, forwards))

    axes.secondary_xaxis("top", functions=(to_seconds, to_forwards)).set_xlabel("training seconds")


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{max(0, round(seconds)) // 60}:{max(0, round(seconds)) % 60:02d}"


def scales_table(found: Calibration) -> Table:
    """What a calibration has measured, and the scales that follow, for the console."""
    table = Table("kind", "weights", "slope²", "curvature", "scale")
    table.title = f"scales from {found.evaluations} forwards; rounding of a loss {found.noise:.1e}"
    for kind in found.kinds:
        slope, curvature = (
            f"{kind.slope2:.3g} ± {kind.slope2_error:.2g}",
            f"{kind.curvature:.3g} ± {kind.curvature_error:.2g}",
        )
        table.add_row(kind.name, f"{kind.weights:,}", slope, curvature, f"{kind.scale:.3f}")
    return table


def summary_table(summary: dict[str, Any]) -> Table:
    """The most important figures of a summary."""
    before, after, change = (summary["test"][key] for key in ("before", "after", "change"))

    def percent(value: float) -> str:
        return f"{100 * value:.1f}%"

    def measured(found: dict[str, Any]) -> str:
        return f"{percent(found['accuracy'])}  (95%: {' to '.join(map(percent, found['interval']))})"

    low, high = (f"{100 * value:+.1f}" for value in change["interval"])
    rss, saturated = summary["peak_rss_bytes"], summary["saturated"]
    table = Table(title=f"{summary['config']['model']} on {summary['config']['data']}", show_header=False)
    table.add_row(f"test accuracy before (n {before['n']})", measured(before))
    if alone := summary["test"].get("biases_alone"):
        table.add_row("with label biases, untrained", measured(alone))
    table.add_row(f"test accuracy after (step {summary['selected_step']})", f"[bold]{measured(after)}[/]")
    table.add_row("difference", f"[bold]{100 * change['difference']:+.1f}[/]  (95%: {low} to {high}) points")
    table.add_row("test loss", f"{before['loss']:.4f} -> {after['loss']:.4f}")
    table.add_row("steps", f"{summary['steps']} ({summary['skipped_steps']} skipped), {summary['forwards']} forwards")
    table.add_row("training", f"{clock(summary['seconds']['training'])}, {summary['seconds']['step']:.3f} s a step")
    if saturated:
        most = sorted(saturated, key=lambda name: -saturated[name])[:3]
        table.add_row("beyond the range of the dtype", ", ".join(f"{name} ({saturated[name]} times)" for name in most))
    table.add_row("peak memory", "unknown" if rss is None else f"{rss / 2**30:.2f} GiB")
    return table
