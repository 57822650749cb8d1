"""The `zo-core sweep` command: choose a learning rate and eps by short runs, which are compared on the validation part.

Zeroth-order methods are sensitive to both, and the right values depend on the model, the data, the method and the number
of steps. A run that falls far behind the best one is stopped early.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from zo_core.integrations.config import EARLIER, FinetuneConfig
from zo_core.integrations.errors import RunError
from zo_core.integrations.files import own_folder, write_json
from zo_core.integrations.session import Session, prepare

QUARTERS = 4  # parts of a run, after each of which it is compared with the best run so far
STANDARD_ERRORS = 2.0  # a run is stopped when its loss is this many standard errors above that of the best run


def ladder(loss: Callable[[float], float], start: float, factor: float = 10**0.5, most: int = 6) -> dict[float, float]:
    """Search for the value of least loss among ``start * factor**n``: the neighbours of ``start``, then the better direction.

    Args:
        loss: the loss of a value; one that is not finite counts as infinite.
        start: the first value.
        factor: the ratio of neighbouring values.
        most: how many values to try at most, at least 3.

    Returns:
        The loss of each value, in the order tried. Both neighbours of the best value are worse, unless ``most`` ended the search.
    """
    found: dict[int, float] = {}

    def value(rung: int) -> float:
        return float(f"{start * factor**rung:.2g}")

    def at(rung: int) -> None:
        found[rung] = got if math.isfinite(got := loss(value(rung))) else math.inf

    for rung in (0, -1, 1):
        at(rung)
    while len(found) < most:
        best = min(found, key=lambda rung: found[rung])
        if best not in (min(found), max(found)):
            break
        at(best + 1 if best == max(found) else best - 1)
    return {value(rung): got for rung, got in found.items()}


def behind(losses: torch.Tensor, best: torch.Tensor) -> float:
    """How many standard errors these losses, (n,), are above the best ones for the same examples; inf if any is not finite."""
    difference = losses - best
    if not bool(difference.isfinite().all()):
        return math.inf
    error = float(difference.std()) / math.sqrt(len(difference))
    return float(difference.mean()) / error if error else 0.0


class Trial(BaseModel):
    """A short run, as stored in `sweep.json`."""

    lr: float
    eps: float
    loss: float | None  # on the validation part; None if the run was stopped or its loss was not finite
    at_quarters: list[float]
    end: str


class Kept(BaseModel):
    """What `sweep.json` must contain for a sweep to continue."""

    config: dict[str, Any]
    trials: list[Trial] = []
    best: list[list[float]] = []  # validation losses of the best finished trial, after each quarter


def read_sweep(path: Path) -> Kept | None:
    """The content of `sweep.json`. None if the file does not exist, RunError if a sweep did not write it."""
    if not path.exists():
        return None
    try:
        return Kept.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{str(path)!r} is not what a sweep wrote; choose another --output, or --overwrite it"
        ) from error


class Sweep:
    """The trials of a sweep. Each starts from the same weights, and is stored in `sweep.json` when it is done."""

    def __init__(self, session: Session, console: Console) -> None:
        self.session, self.console, self.path = session, console, session.config.output / "sweep.json"
        self.start = {name: t.clone() for name, t in session.model.state_dict().items()}
        config = session.config
        optimizer = config.optimizer(session.model)  # raises if the method refuses an option, before the first trial
        if config.calibrate:
            session.calibrate(optimizer, config.calibrate)
        self.scales = optimizer.scales
        about = config.model_dump(mode="json", exclude={"output"})
        about["data_sha256"] = session.facts["sha256"]
        self.kept = read_sweep(self.path) or Kept(config=about)
        before = EARLIER | self.kept.config
        if differ := [name for name in about | before if about.get(name) != before.get(name)]:
            raise RunError(
                f"--output {str(config.output)!r} holds a sweep of other options ({', '.join(differ)}); choose another "
                "folder, or --overwrite it"
            )

    def trial(self, lr: float, eps: float) -> float:
        """The final validation loss of a short run, which is looked up if it was made before; infinite if it was stopped."""
        found = next((t for t in self.kept.trials if (t.lr, t.eps) == (lr, eps)), None)
        if found is None:
            seen, end = self.train(self.session.config.model_copy(update={"lr": lr, "eps": eps}))
            means = [float(losses.mean()) for losses in seen]
            found = Trial(lr=lr, eps=eps, loss=means[-1] if end == "finished" else None, at_quarters=means, end=end)
            finished = [t.loss for t in self.kept.trials if t.loss is not None]
            if found.loss is not None and found.loss < min(finished, default=math.inf):
                self.kept.best = [losses.tolist() for losses in seen]
            self.kept.trials.append(found)
            write_json(self.path, self.kept.model_dump())
            said = end if found.loss is None else f"validation loss {found.loss:.4f}"
            self.console.print(f"lr {lr:g}, eps {eps:g}: {said}")
        return math.inf if found.loss is None else found.loss

    def train(self, config: FinetuneConfig) -> tuple[list[torch.Tensor], str]:
        """Make a short run. Returns the validation losses (n,) after each of its quarters, and how it ended."""
        best = [torch.tensor(losses) for losses in self.kept.best]
        steps, session = config.steps or 0, self.session
        ends, seen = [math.ceil(steps * (q + 1) / QUARTERS) for q in range(QUARTERS)], list[torch.Tensor]()
        session.model.load_state_dict(self.start)
        try:
            optimizer = config.optimizer(session.model)
        except RunError as error:  # the value is out of the method's range
            return seen, str(error)
        optimizer.scales = self.scales
        with Progress(console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(f"lr {config.lr:g}, eps {config.eps:g}", total=steps)
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = config.lr_at(step / steps)
                closures = session.closures_of(step)
                optimizer.step(closures if session.config.spread else closures[0])
                bar.advance(task)
                for _ in range(ends.count(step + 1)):
                    seen.append(session.evaluate("validation").losses)
                    if not bool(seen[-1].isfinite().all()):
                        return seen, "not finite"
                    early = best and len(seen) < QUARTERS
                    if early and behind(seen[-1], best[len(seen) - 1]) > STANDARD_ERRORS:
                        return seen, f"stopped at step {step + 1}"
        return seen, "finished"


def sweep(
    config: FinetuneConfig, *, tries: int = 6, eps_too: bool = True, overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Find the best lr among values half a decade apart around `config.lr`, then likewise eps around `config.eps`.

    Args:
        config: its `steps` are those of a trial. `output` is the sweep's folder; a sweep that was stopped continues there.
        tries: how many values of each to try at most; at least 3.
        eps_too: whether to search for eps.
        overwrite: delete the sweep in the folder.
        console: where progress is shown; None shows nothing.

    Returns:
        A dict of lr, eps, their validation loss, the loss before training, and all trials.

    Raises:
        RunError: the folder holds another sweep, no steps were given, or no trial had a finite loss at its end.
        AssetError, TaskError: see `prepare`.
    """
    if config.steps is None:
        raise RunError("--steps: a sweep needs the number of steps of a trial, say 100")
    if tries < 3:
        raise RunError(f"--tries: expected at least 3, got {tries}")
    console = console or Console(quiet=True)
    with own_folder(config.output):
        if overwrite:
            (config.output / "sweep.json").unlink(missing_ok=True)
        kept = read_sweep(config.output / "sweep.json")
        if kept is not None and config.autocast is None:  # do not time it again, which may give another answer
            config = config.model_copy(update={"autocast": kept.config.get("autocast")})
        with console.status("starting") as status:
            session = prepare(config, lambda text: status.update(text))
        trials = Sweep(session, console)
        before = session.evaluate("validation").loss
        console.print(f"before: validation loss {before:.4f}, {len(session.parts['validation'])} examples")
        losses = ladder(lambda lr: trials.trial(lr, config.eps), config.lr, most=tries)
        lr, eps = min(losses, key=lambda x: losses[x]), config.eps
        if eps_too:
            losses = ladder(lambda eps: trials.trial(lr, eps), config.eps, most=tries)
            eps = min(losses, key=lambda x: losses[x])
        best = min(losses.values())
        if not math.isfinite(best):
            raise RunError(f"no learning rate around --lr {config.lr:g} ended well; try another --lr or more --steps")
        result = {**trials.kept.model_dump(), "before": before, "lr": lr, "eps": eps, "loss": best}
        write_json(trials.path, result)
        _plot(config.output / "sweep.png", result, config.method)
        found = config.model_copy(update={"lr": lr, "eps": eps, "autocast": session.config.autocast})
        _show(console, result, found)
        return result


def _show(console: Console, result: dict[str, Any], config: FinetuneConfig) -> None:
    table = Table("lr", "eps", "validation loss", "", title=f"{config.method}, {config.steps} steps a trial")
    for t in sorted(result["trials"], key=lambda t: (t["eps"], t["lr"])):
        mark = "best" if (t["lr"], t["eps"]) == (result["lr"], result["eps"]) else t["end"] * (t["loss"] is None)
        table.add_row(f"{t['lr']:g}", f"{t['eps']:g}", "-" if t["loss"] is None else f"{t['loss']:.4f}", mark)
    console.print(table)
    console.print(f"go on with\n  {config.command()}", highlight=False, soft_wrap=True, markup=False)


def _plot(path: Path, result: dict[str, Any], title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="tight")
    axes = figure.subplots()
    for eps in sorted({t["eps"] for t in result["trials"]}):
        points = sorted((t["lr"], t["loss"]) for t in result["trials"] if t["eps"] == eps and t["loss"] is not None)
        axes.plot(*zip(*points, strict=True), "o-", label=f"eps {eps:g}") if points else None
    axes.axhline(result["before"], color="#9ca3af", linestyle="--", linewidth=1, label="before")
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss", title=title)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
