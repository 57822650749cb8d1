"""`zo-core probe`: how large eps should be for a model, a batch and a method, as a table, a plot or JSON."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Group
from rich.table import Table

import zo_core
from zo_core.floor import Differences, Measurement
from zo_core.integrations.config import FinetuneConfig
from zo_core.integrations.errors import RunError
from zo_core.integrations.session import prepare

KINDS = ("two-sided", "one-sided")


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
    """The table, and what it says for the method."""
    own, spread = sides(config), {"justify": "right", "no_wrap": True}
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("\neps", **spread)
    table.add_column("\nrounding", **spread)
    for kind in KINDS:
        for name in (f"{kind}\nRMS", "\nbias", "\ncorr.", "\nbelow"):
            table.add_column(name, style="" if kind == own else "dim", **spread)
    for rung in found.rungs:
        cells = [f"{rung.eps:.1e}", f"{rung.error:.1e}"]
        for kind in KINDS:
            d: Differences = getattr(rung, kind.replace("-", "_"))
            mark = "<" if rung.eps == found.recommended[kind] else " "
            cells += [f"{d.rms:.1e}", f"{d.bias:.1e}", f"{d.correlation:.3f}{mark}", f"{d.below:.0%}"]
        table.add_row(*cells)
    best, (low, high), here = found.recommended[own], found.good[own], found.at(config.eps)
    agree: float = getattr(here, own.replace("-", "_")).correlation
    lines = [
        f"\n{config.model} on {config.data}: loss {found.loss:.4f}, {found.probes} probes",
        f"{config.method} takes {own} differences: --eps {best:.2g} is the best for it, {low:.2g} to {high:.2g} are about as good",
        f"at --eps {config.eps:g} their correlation with the slopes is {agree:.3f}: a step makes {max(0.0, agree) ** 2:.0%} of the "
        "progress of one with exact slopes",
    ]
    if best in (found.rungs[0].eps, found.rungs[-1].eps) and low != high:
        lines.append("the best is at the end of what was measured: --least and --most widen that")
    return Group(table, *lines)


def plot(path: Path, found: Measurement, config: FinetuneConfig) -> None:
    """Write a PNG: sizes of differences, rounding and bias over eps, and the correlation with the slopes."""
    from matplotlib.figure import Figure

    eps = [rung.eps for rung in found.rungs]
    colours = dict(zip(KINDS, ("#2563eb", "#d97706"), strict=True))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(f"{config.model} on {config.data}, {config.method}, {found.probes} probes", fontsize=11)
    left, right = figure.subplots(1, 2)
    for kind, colour in colours.items():
        rows = [getattr(rung, kind.replace("-", "_")) for rung in found.rungs]
        left.plot(eps, [d.rms for d in rows], "o-", color=colour, label=f"{kind} differences")
        left.plot(eps, [d.bias for d in rows], "--", color=colour, label=f"bias of {kind} ones")
        right.plot(eps, [d.correlation for d in rows], "o-", color=colour, label=kind)
        right.axvline(found.recommended[kind], color=colour, linewidth=1, linestyle=":")
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
