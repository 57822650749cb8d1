"""Fine-tune a causal language model on labelled text with forward passes only.

`finetune(FinetuneConfig(...))` is the `zo-core finetune` command. A run has a folder of its own:

    config.json     its options
    metrics.jsonl   a line for each step and for each evaluation
    journal.zoj     what `zo-core replay` needs to compute the weights of any step again
    scales.json     the scale of each tensor's probe, where the run has some
    checkpoint/     what --resume starts from: state.pt (optimizer, counters) and the weights that it names
    model/          the tuned model and its tokenizer, as transformers saves them
    summary.json    the results          plot.png   loss and accuracy over the run

All that a step needs is a function of the seed and the step's number, so a resumed run has the same weights, bit for
bit, as one that was never stopped. (The learning rate of a schedule is an exception if the budget is a time, as it then
depends on the clock, or if the run is resumed with another budget.)
"""

import datetime
import json
import math
import os
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

import zo_core
from zo_core import Journal, JournalError
from zo_core.floor import error_at_eps
from zo_core.integrations import report, tasks
from zo_core.integrations.config import FinetuneConfig, stored_config
from zo_core.integrations.errors import RunError, first_line
from zo_core.integrations.files import LOCK, own_folder, saving, write_json, write_tensors
from zo_core.integrations.session import Session, prepare
from zo_core.integrations.tasks import Evaluation

SKIPS_IN_A_ROW = 20  # steps with a non-finite loss after which a run gives up
OUR_FILES = (
    "config.json",
    "metrics.jsonl",
    "journal.zoj",
    "scales.json",
    "summary.json",
    "plot.png",
    "checkpoint",
    "model",
)


class RunInterrupted(Exception):
    """A signal has asked the run to stop, and its state is saved. The message is the command that resumes it."""

    def __init__(self, signum: int, command: str) -> None:
        super().__init__(command)
        self.signum = signum


# ---- the run's folder ------------------------------------------------------------------------------------


@dataclass
class State:
    """The counters and results of a run so far, as a checkpoint has them."""

    step: int = 0
    seconds: float = 0.0  # of training; evaluations and checkpoints do not count
    evaluation_seconds: float = 0.0
    forwards: int = 0  # of training
    validated: int = -1  # the last step that was validated
    best_step: int | None = None
    best_loss: float = math.inf  # of the validation part
    before: dict[str, Any] | None = None  # results on the test part before the first step
    before_correct: list[bool] = field(default_factory=list)
    biases_alone: dict[str, Any] | None = None  # then, with fitted label biases
    metrics_bytes: int = 0
    floor: float | None = None  # rounding error of a difference of two losses; NaN where it could not be measured
    data: str = ""  # SHA-256 of the encoded data; "" in checkpoints of older versions, which have none


def _check_free(folder: Path, overwrite: bool) -> None:
    """RunError unless `folder` is empty, or holds a run that may be overwritten."""
    if not any(path.name != LOCK for path in folder.iterdir()):
        return
    try:
        stored_config(folder)
    except RunError as error:
        raise RunError(f"--output {str(folder)!r} has files that are not a run's; choose another folder") from error
    if not overwrite:
        raise RunError(
            f"--output {str(folder)!r} already holds a run; --resume goes on with it, --overwrite replaces it"
        )


def _clear(folder: Path) -> None:
    """Remove an earlier run's files."""
    for name in OUR_FILES:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def read_metrics(folder: Path, size: int | None = None) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, or those in its first `size` bytes. RunError if they are not there or damaged."""
    path = folder / "metrics.jsonl"
    try:
        data = path.read_bytes()[:size]
        if size is not None and len(data) < size:
            raise ValueError(f"it has {len(data)} bytes, not {size}")
        return [{"kind": line["kind"], **line} for line in map(json.loads, data.splitlines())]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise RunError(f"{str(path)!r} is not as a run wrote it: {error}; --overwrite starts the run again") from error


class Run:
    """A run: its session, optimizer, state and folder. It writes nothing before `open`."""

    def __init__(self, session: Session, console: Console) -> None:
        config = session.config
        self.session, self.config, self.console = session, config, console
        self.state, self.signum = State(data=session.facts["sha256"]), 0
        self.folder, self.checkpoint = config.output, config.output / "checkpoint"
        self.optimizer = config.optimizer(session.model)
        self.below = (0, 0)  # ``below_floor`` of the optimizer after the last step
        if config.dropout:  # only dropout uses torch's global generator, whose state is in checkpoints for that reason
            torch.set_rng_state(torch.Generator().manual_seed(config.seed).get_state())

    # -- saving

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint: first the weights, then the state, which names their file, so that each state has its weights."""
        self.checkpoint.mkdir(exist_ok=True)
        self.metrics.flush()
        os.fsync(self.metrics.fileno())
        if self.optimizer.journal is not None:  # it must not end before the step of a checkpoint
            self.optimizer.journal.sync()
        self.state.metrics_bytes = self.metrics.tell()
        if best:
            self.state.best_step = self.state.step
        write_tensors(self._weights(self.state.step), self.session.model.state_dict())
        kept = {"state": asdict(self.state), "optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state()}
        write_tensors(self.checkpoint / "state.pt", kept)
        named = {self._weights(step) for step in (self.state.step, self.state.best_step) if step is not None}
        for path in self.checkpoint.glob("weights-*"):
            if path not in named:
                path.unlink()
        self.saved_at = time.monotonic()

    def _weights(self, step: int) -> Path:
        return self.checkpoint / f"weights-{step}.pt"

    def load_weights(self, step: int) -> None:
        """Load the weights that were saved at `step` into the model."""
        weights = torch.load(self._weights(step), map_location=self.session.scorer.device, weights_only=True)
        self.session.model.load_state_dict(weights)

    def open(self, resume: bool) -> None:
        """Create the files of the folder, or load its checkpoint and remove the metrics that were written after it.

        Raises:
            RunError: the checkpoint or the metrics cannot be read, or the data has changed.
        """
        if resume:
            self._load_checkpoint()
            read_metrics(self.folder, self.state.metrics_bytes)
        elif self.config.calibrate:
            self._calibrate(self.config.calibrate)
        self.optimizer.journal = self._journal()  # before all other files, as it fails if another run has it open
        write_json(self.folder / "config.json", self.config.model_dump(mode="json", exclude={"output"}))
        if set(self.optimizer.scales.values()) != {1.0}:
            zo_core.scales.save(self.optimizer.scales, self.folder / "scales.json")
        self.metrics = open(self.folder / "metrics.jsonl", "ab")  # noqa: SIM115 - open for the whole run
        self.metrics.truncate(self.state.metrics_bytes)
        self.metrics.seek(0, os.SEEK_END)
        self.saved_at = time.monotonic()

    def _calibrate(self, evaluations: int) -> None:
        """Measure scales, before there is a journal, which begins with them. It counts as training."""
        start = time.perf_counter()
        found = self.session.calibrate(self.optimizer, evaluations)
        self.state.forwards += found.evaluations
        self.state.seconds += time.perf_counter() - start
        self.console.print(report.scales_table(found))

    def _load_checkpoint(self) -> None:
        try:
            kept = torch.load(self.checkpoint / "state.pt", weights_only=True)
            best = kept["state"].pop("best", None)  # accuracy and minus the loss, of versions that chose by accuracy
            if best and best[0] >= 0:
                kept["state"]["best_loss"] = -best[1]
            self.state = State(**kept["state"])
            self.load_weights(self.state.step)
            self.optimizer.load_state_dict(kept["optimizer"])
        except Exception as error:
            raise RunError(
                f"checkpoint in {str(self.checkpoint)!r} cannot be read: {first_line(error)}; "
                "--overwrite starts the run again"
            ) from error
        if self.state.data not in ("", self.session.facts["sha256"]):
            raise RunError(
                f"--data {self.config.data!r} or the tokenizer of --model {self.config.model!r} is not as it was in "
                f"{str(self.folder)!r}: put them back, or choose another --output"
            )
        if self.config.dropout:
            torch.set_rng_state(kept["rng"])

    def _journal(self) -> Journal | None:
        """The run's journal, at the step of the checkpoint; None for a run that has lost its journal."""
        path = self.folder / "journal.zoj"
        try:
            if path.exists():
                return Journal.resume(path, self.optimizer)
            if not self.state.step:
                return Journal.create(path, self.optimizer)
        except JournalError as error:
            raise RunError(
                f"{error}; if no other run is at work here, remove {str(path)!r} to go on without a journal"
            ) from error
        self.console.print(
            f"{path} is missing: going on without a journal, zo-core replay cannot make this run", style="yellow",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        return None

    def log(self, kind: str, **values: Any) -> None:
        """Add a line to metrics.jsonl; a value that is not finite becomes null."""
        state = self.state
        counts = {"step": state.step, "forwards": state.forwards, "seconds": round(state.seconds, 3)}
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.metrics.write((json.dumps({"kind": kind, **counts, **plain}) + "\n").encode())
        self.metrics.flush()

    # -- stopping

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """While the block runs, a first Ctrl-C (or SIGTERM) asks the run to stop, and a second one aborts it at once."""

        def ask(signum: int, frame: Any) -> None:
            if self.signum:
                raise KeyboardInterrupt
            self.signum = signum
            self.console.print("\nstopping after this step; again to abort without saving", style="yellow")

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        previous = [signal.signal(signum, ask) for signum in signals]
        try:
            yield
        finally:
            for signum, handler in zip(signals, previous, strict=True):
                signal.signal(signum, handler)

    def check(self, n: int = 0) -> None:
        """RunInterrupted if the run was asked to stop. `tasks.evaluate` calls it with a number of examples, which is not used."""
        if self.signum:
            raise RunInterrupted(self.signum, resume_command(self.folder))

    # -- working

    def evaluate(self, part: str, note: str, *, fit: bool = True) -> Evaluation:
        """Evaluate one part of the data, log the result and show it in a line that begins with `note`; ``fit`` label biases before."""
        start, session = time.perf_counter(), self.session
        found = session.evaluate(part, self.check, fit=fit)
        took = time.perf_counter() - start
        self.state.evaluation_seconds += took
        values = found.report()
        self.log("evaluation", split=part, evaluation_seconds=round(took, 3), **values)
        low, high = values["interval"]
        self.console.print(
            f"[bold]{note}[/]: {part} accuracy [bold]{found.accuracy:.4f}[/] "
            f"[dim](95% {low:.4f} to {high:.4f}, n {found.n}, loss {found.loss:.4f}, {took:.1f} s)[/]",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        return found

    def evaluate_before(self) -> None:
        """Evaluate the test part before training: the model as it is, and from the same logits with fitted label biases."""
        scorer, state, biases = self.session.scorer, self.state, self.session.scorer.biases
        self.session.fit_label_biases(self.check)
        fitted, scorer.biases = scorer.biases, biases
        found = self.evaluate("test", "before", fit=False)
        if self.config.label_bias:
            alone = replace(found, logits=found.logits + (fitted - biases).cpu())
            state.biases_alone = alone.report()
            self.console.print(
                f"with label biases: test accuracy {alone.accuracy:.4f}, loss {alone.loss:.4f}", highlight=False
            )
        state.before, state.before_correct = found.report(), found.correct.tolist()

    def validate(self) -> None:
        """Evaluate the validation part, and save the weights if they are the best so far."""
        found = self.evaluate("validation", f"step {self.state.step}")
        self.state.validated = self.state.step
        if self.config.keep_best and found.loss < self.state.best_loss:
            self.state.best_loss = found.loss
            self.save(best=True)

    def step(self) -> float:
        """One optimizer step; returns its loss."""
        config, state = self.config, self.state
        start, evaluations, flat = time.perf_counter(), self.optimizer.evaluations, self.optimizer.flat
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(config.progress(state.step, state.seconds))
        lr = self.optimizer.param_groups[0]["lr"]
        closures = self.session.closures_of(state.step)
        self.session.model.train(config.dropout)
        loss = float(self.optimizer.step(closures if config.spread else closures[0]))
        took = time.perf_counter() - start
        state.step += 1
        state.seconds += took
        state.forwards += self.optimizer.evaluations - evaluations
        counts: dict[str, Any] = {"skipped": self.optimizer.skipped, "flat": self.optimizer.flat > flat}
        if self.optimizer.noise_floor is not None:
            counts["below_floor"] = self._share_below()
        self.log("step", loss=loss, lr=lr, **counts)
        return loss

    def _share_below(self) -> float:
        """The share of the last step's probes whose difference of losses is smaller than the forwards' rounding error."""
        below, probes = self.optimizer.below_floor
        new = below - self.below[0], probes - self.below[1]
        self.below = below, probes
        return new[0] / max(1, new[1])

    def measure_floor(self) -> None:
        """Measure the forwards' rounding error around eps, once in a run."""
        if self.state.floor is None:
            self.session.model.train(self.config.dropout)
            try:
                closure = self.session.loss_of(0)
                self.state.floor = error_at_eps(self.optimizer, closure, progress=lambda *_: self.check())
            except ValueError:  # losses that are constant or not finite, of which the steps tell
                self.state.floor = math.nan
        self.optimizer.noise_floor = None if math.isnan(self.state.floor) else self.state.floor

    def train(self) -> None:
        """Make steps and validate until the budget is used up.

        Raises:
            RunError: the losses of many steps in a row were not finite.
            RunInterrupted: a signal has asked the run to stop.
        """
        config, state, optimizer = self.config, self.state, self.optimizer
        losses, bad = [], 0
        if config.measure_floor and config.progress(state.step, state.seconds) < 1:
            self.measure_floor()
        with _progress(self.console) as bar:
            task = bar.add_task("", total=1.0, step="-", loss="-", best="-", rate="-", left="-")
            while True:
                done = config.progress(state.step, state.seconds) >= 1
                if state.validated != state.step and (done or state.step % config.eval_every == 0):
                    self.validate()
                if done:
                    return
                skipped = optimizer.skipped
                losses.append(self.step())
                bad = bad + 1 if optimizer.skipped > skipped else 0
                if bad == min(SKIPS_IN_A_ROW, config.steps or SKIPS_IN_A_ROW):
                    raise RunError(
                        f"{bad} steps in a row were skipped, their loss was not finite: use a smaller --lr "
                        f"or --eps, or --dtype float32 (now {config.dtype}); the last checkpoint is kept"
                    )
                bar.update(
                    task,
                    completed=config.progress(state.step, state.seconds),
                    step=f"{state.step}/{config.steps}" if config.steps else str(state.step),
                    loss=f"{report.smooth(losses[-200:])[-1]:.4f}",
                    best=f"{state.best_loss:.4f}" if config.keep_best else "-",
                    rate=f"{state.step / state.seconds:.2f}",
                    left=report.clock(self._seconds_left()),
                )
                self.check()
                if time.monotonic() - self.saved_at >= 60 * config.save_every:
                    self.save()

    def _seconds_left(self) -> float:
        steps, budget = self.config.steps or math.inf, self.config.time_budget or math.inf
        return min((steps - self.state.step) * self.state.seconds / self.state.step, budget - self.state.seconds)

    def finish(self) -> dict[str, Any]:
        """Test the chosen weights, save them as transformers does, and write summary and plot."""
        config, state, session, model = self.config, self.state, self.session, self.session.model
        chosen = state.step if state.best_step is None else state.best_step
        if chosen != state.step:
            self.load_weights(chosen)
        after = self.evaluate("test", f"after (weights of step {chosen})")
        scratch = self.folder / "model.part"
        shutil.rmtree(scratch, ignore_errors=True)
        with saving():
            model.save_pretrained(scratch)
            if config.label_bias:
                _keep_biases(scratch / "generation_config.json", session.scorer)
            session.tokenizer.save_pretrained(scratch)
        shutil.rmtree(self.folder / "model", ignore_errors=True)  # only now that the new one is complete
        scratch.rename(self.folder / "model")
        lines = read_metrics(self.folder)
        steps = [line for line in lines if line["kind"] == "step"]
        evaluations = [line for line in lines if line["kind"] == "evaluation"]
        losses = [line["loss"] for line in steps]
        before, parameters = torch.tensor(state.before_correct), list(model.parameters())
        biases = dict(zip(config.labels or (), session.scorer.biases.tolist(), strict=True))
        summary = {
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "model": {
                "name": config.model, "class": type(model).__name__, "parameters": sum(map(torch.numel, parameters)),
                "trainable": sum(p.numel() for p in parameters if p.requires_grad), "dtype": config.dtype,
                "autocast": config.autocast,
            },
            "data": session.facts,
            "method": config.method,
            "config": config.model_dump(mode="json", exclude={"output"}),
            "steps": state.step,
            "skipped_steps": self.optimizer.skipped,
            "flat_steps": sum(line.get("flat", False) for line in steps),
            "floor": {"error": self.optimizer.noise_floor, "below": _mean([line.get("below_floor") for line in steps])},
            "forwards": state.forwards,
            "selected_step": chosen,
            "selected_by": "validation loss" if config.keep_best else "last step",
            "label_bias": biases if any(biases.values()) else {},
            "test": {
                "before": state.before, "biases_alone": state.biases_alone, "after": after.report(),
                "change": tasks.paired_difference(before, after.correct),
            },
            "validation": [line for line in evaluations if line["split"] == "validation"],
            "train_loss": {"first": _mean(losses[:20]), "last": _mean(losses[-20:]), "steps_averaged": min(20, len(steps))},
            "seconds": {
                "training": state.seconds, "evaluation": state.evaluation_seconds, "step": state.seconds / max(1, state.step)
            },
            "saturated": self.optimizer.saturated,
            "memory_bytes": self.optimizer.memory(),
            "peak_rss_bytes": report.peak_rss(),
            "versions": report.versions(),
            "machine": report.machine(),
            "backend": zo_core.backend_info(),
        }  # fmt: skip
        write_json(self.folder / "summary.json", summary)
        title = f"{config.model} on {config.data}, {config.method}, lr {config.lr:g}, eps {config.eps:g}"
        report.plot(self.folder / "plot.png", steps, evaluations, title)
        return summary


def resume_command(folder: Path) -> str:
    """The command that resumes the run in `folder`."""
    return f"zo-core finetune --output {shlex.quote(str(folder))} --resume"


def finished(config: FinetuneConfig) -> dict[str, Any] | None:
    """The summary of the run in `config.output`, if that run has used up its budget and written one."""
    try:
        kept = torch.load(config.output / "checkpoint" / "state.pt", weights_only=True)["state"]
        summary: dict[str, Any] = json.loads((config.output / "summary.json").read_text(encoding="utf-8"))
        over, same = config.progress(kept["step"], kept["seconds"]) >= 1, summary["steps"] == kept["step"]
    except Exception:  # a damaged file is reported when the run needs it
        return None
    return summary if over and same else None


def _progress(console: Console) -> Progress:
    text = (
        "{task.percentage:3.0f}%  step {task.fields[step]}  loss {task.fields[loss]}  "
        "best validation loss {task.fields[best]}  {task.fields[rate]} steps/s  {task.fields[left]} left"
    )
    columns = BarColumn(bar_width=24), TextColumn(text)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _keep_biases(path: Path, scorer: tasks.Scorer) -> None:
    """Put label biases into a generation config: transformers adds them to the logits when the model generates. Others stay."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    labels = [[token] for token in scorer.label_tokens.tolist()]
    others = [entry for entry in kept.get("sequence_bias") or [] if entry[0] not in labels]
    biases = list(zip(labels, scorer.biases.tolist(), strict=True))
    write_json(path, {**kept, "sequence_bias": others + biases})


def _mean(values: list[float | None]) -> float | None:
    finite = [value for value in values if value is not None]
    return sum(finite) / len(finite) if finite else None


# ---- entry points ----------------------------------------------------------------------------------------


def finetune(
    config: FinetuneConfig, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Start or resume a fine-tuning run and return its summary, as in summary.json.

    Args:
        config: the run.
        resume: continue from the checkpoint in `config.output`; `config` is then that of `resumed_config`.
        overwrite: replace the run in `config.output`, if there is one.
        console: where progress is shown; None shows nothing.

    Raises:
        AssetError, TaskError: see `prepare`.
        RunError: the run cannot start or continue.
        RunInterrupted: a signal has stopped the run; it is saved and can be resumed.
    """
    console = console or Console(quiet=True)
    if resume and not (config.output / "checkpoint" / "state.pt").exists():
        raise RunError(
            f"--output {str(config.output)!r} has no checkpoint to go on from; --overwrite starts the run again"
        )
    with own_folder(config.output):
        if not resume:
            _check_free(config.output, overwrite)
        elif (summary := finished(config)) is not None:
            console.print("this run is finished; give it more --steps or --time-budget to go on", style="yellow")
            return summary
        with console.status("starting") as status:
            session = prepare(config, lambda text: status.update(text))
        run = Run(session, console)
        if not resume:
            _clear(config.output)
        run.open(resume)
        with run.metrics, run.stoppable():
            try:
                if run.state.before is None:
                    run.evaluate_before()
                run.train()
            except RunInterrupted:
                run.save()
                raise
            run.save()
            if run.optimizer.journal is not None:
                run.optimizer.journal.close()
            summary = run.finish()
    console.print(report.summary_table(summary))
    console.print(f"written to {config.output}", highlight=False)
    return summary
