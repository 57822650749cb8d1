"""`zo-core probe`: how large eps should be for a model, a batch and a method, as a table, a plot or JSON."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Group
from rich.table import Table

import zo_core
from zo_core.floor import Measurement
from zo_core.integrations.config import FinetuneConfig
from zo_core.integrations.errors import RunError
from zo_core.integrations.session import prepare


def probe(
    config: FinetuneConfig, *, least: float, most: float, draws: int, status: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], object] = lambda done, of: None,
) -> Measurement:  # fmt: skip
    """Measure differences of losses on the first batch of a run, over eps in half decades.

    Args:
        config: its Model, Data and Method fields are used.
        least: the smallest eps.
        most: the largest eps is at most this.
        draws: number of probes.
        status: called with a short sentence at the start of each slow stage.
        progress: called with the number of eps that are done, and how many there are.

    Raises:
        AssetError, TaskError, RunError: see `prepare`; RunError also where nothing can be measured.
    """
    ladder, eps = [], least
    while eps <= most * 1.0001:
        ladder.append(eps)
        eps = least * 10 ** (len(ladder) / 2)
    if len(ladder) < 4:
        raise RunError(f"--most: expected at least 1.5 decades above --least {least:g}, got {most:g}")
    session = prepare(config, status)
    optimizer = config.optimizer(session.model)
    session.model.train(config.dropout)
    status("measuring")
    try:
        return zo_core.measure(optimizer, session.loss_of(0), eps=ladder, probes=draws, progress=progress)
    except ValueError as error:
        raise RunError(f"nothing can be measured: {error}") from error


def sides(config: FinetuneConfig) -> str:
    """Which differences the method is made of: "one-sided" or "two-sided"."""
    return "one-sided" if config.optimizer_class().one_sided else "two-sided"


def report(found: Measurement, config: FinetuneConfig) -> Group:
    """The table, with a line on what it says for the method."""
    own = sides(config)
    table = Table(title=f"{config.model} on {config.data}, {found.probes} probes, loss {found.loss:.4f}")
    table.add_column("eps", justify="right")
    table.add_column("rounding", justify="right")
    for kind in ("two-sided", "one-sided"):
        for name in (f"{kind}\nRMS", "bias", "correlation", "below"):
            table.add_column(name, justify="right", style="bold" if kind == own else "")
    for rung in found.rungs:
        marks = [" <" if rung.eps == found.recommended[kind] else "" for kind in ("two-sided", "one-sided")]
        cells = [
            cell
            for d, mark in zip((rung.two_sided, rung.one_sided), marks, strict=True)
            for cell in (f"{d.rms:.2g}", f"{d.bias:.2g}", f"{d.correlation:.3f}{mark}", f"{d.below:.0%}")
        ]
        table.add_row(f"{rung.eps:.2g}", f"{rung.error:.2g}", *cells)
    best, here = found.recommended[own], found.at(config.eps)
    differences = here.one_sided if own == "one-sided" else here.two_sided
    lines = [
        f"--eps {best:.2g} suits --method {config.method}, whose differences are {own}: least rounding and bias for their size",
        f"at --eps {config.eps:g} (nearest measured {here.eps:.2g}) their correlation with the slopes is {differences.correlation:.3f}, "
        f"so that a step does {max(0.0, differences.correlation) ** 2:.0%} of what one of exact slopes does",
    ]
    if best in (found.rungs[0].eps, found.rungs[-1].eps):
        lines.append("it is at the end of what was measured: --least and --most widen that")
    return Group(table, *lines)


def plot(path: Path, found: Measurement, config: FinetuneConfig) -> None:
    """Write a PNG: sizes of differences, rounding and bias over eps, and the correlation with the slopes."""
    from matplotlib.figure import Figure

    eps = [rung.eps for rung in found.rungs]
    colours = {"two_sided": "#2563eb", "one_sided": "#d97706"}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(f"{config.model} on {config.data}, {config.method}, {found.probes} probes", fontsize=11)
    left, right = figure.subplots(1, 2)
    for kind, colour in colours.items():
        rows = [getattr(rung, kind) for rung in found.rungs]
        name = kind.replace("_", "-")
        left.plot(eps, [d.rms for d in rows], "o-", color=colour, label=f"{name} differences")
        left.plot(eps, [d.bias for d in rows], "--", color=colour, label=f"bias of {name} ones")
        right.plot(eps, [d.correlation for d in rows], "o-", color=colour, label=name)
        right.axvline(found.recommended[name], color=colour, linewidth=1, linestyle=":")
    errors = [rung.error for rung in found.rungs]
    left.plot(eps, errors, "-", color="#6b7280", linewidth=2, label="rounding")
    left.set_ylabel("RMS (nats)")
    left.set_yscale("log")
    left.set_ylim(bottom=min(errors) / 10)
    right.set_ylabel("correlation with the slopes")
    right.set_ylim(-0.05, 1.05)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("eps")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
