"""The command line: `zo-core finetune`, `sweep`, `probe`, `evaluate`, `replay` and `doctor`.

The options of the first four are made from the fields of `FinetuneConfig`, with their names, types, defaults and help.
"""

import inspect
import json
import os
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

try:
    import typer
    from pydantic import ValidationError
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"zo-core needs {error.name}: pip install 'zo_core[train]'") from error

from zo_core.integrations.config import FinetuneConfig, resumed_config, stored_config
from zo_core.integrations.errors import RunError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
out, err = Console(), Console(stderr=True)


# ---- options from the configuration ----------------------------------------------------------------------


def _parameters(groups: Sequence[str]) -> Iterator[inspect.Parameter]:
    """A typer option for each field of `FinetuneConfig` in these groups."""
    for name, field in FinetuneConfig.model_fields.items():
        extra: Any = field.json_schema_extra
        if extra["group"] not in groups:
            continue
        kind, shown = field.annotation, field.default
        if get_origin(kind) is types.UnionType:
            kind = next(arg for arg in get_args(kind) if arg is not type(None))
        flags = [f"--{name.replace('_', '-')}"]
        if name == "output":
            flags.append("-o")
        elif name == "labels":
            kind, flags = list[str], ["--label"]
        elif name == "time_budget":
            kind = str
        elif kind is bool:
            flags = [f"{flags[0]}/--no-{flags[0][2:]}"]
        option = typer.Option(
            *flags, help=field.description, rich_help_panel=extra["group"], show_default=shown is not None
        )
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=shown, annotation=Annotated[kind, option])


def _with_options(*groups: str, without: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of these groups in place of its `**options`, where it finds those that the user gave."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        added = [parameter for parameter in _parameters(groups) if parameter.name != without]

        def run(ctx: typer.Context, **values: Any) -> None:
            for name in [parameter.name for parameter in added]:
                source = ctx.get_parameter_source(name)
                if source is None or source.name != "COMMANDLINE":
                    del values[name]
            if "template" in values:  # in which \\n is two characters on the command line
                values["template"] = values["template"].replace("\\n", "\n")
            with _readable_errors():
                command(ctx, **values)

        first = [p for p in own if p.default is p.empty and p.kind != p.VAR_KEYWORD]
        last = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.default is not p.empty]
        signature = inspect.Signature([*first, *added, *last])
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = signature  # type: ignore[attr-defined]
        return run

    return decorate


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Turn a mistake of the user into a line and exit code 2, and a run stopped by a signal into 128 + its number."""
    from zo_core.integrations.assets import AssetError
    from zo_core.integrations.finetune import RunInterrupted
    from zo_core.integrations.tasks import TaskError

    try:
        yield
    except ValidationError as error:
        for problem in error.errors():
            message = problem["msg"].removeprefix("Value error, ")
            if not problem["loc"]:  # it concerns several options
                _complain(message)
                continue
            name = "label" if problem["loc"] == ("labels",) else "-".join(map(str, problem["loc"]))
            _complain(f"--{name.replace('_', '-')}: {message}, got {problem['input']!r}")
        raise typer.Exit(2) from None
    except (RunError, AssetError, TaskError) as error:
        _complain(str(error))
        raise typer.Exit(2) from None
    except RunInterrupted as stopped:
        err.print(f"saved; go on with\n  {stopped}", highlight=False, soft_wrap=True, markup=False)
        raise typer.Exit(128 + stopped.signum) from None
    except KeyboardInterrupt:
        err.print("aborted", style="yellow")
        raise typer.Exit(130) from None


def _complain(message: str) -> None:
    err.print("[bold red]error[/] ", end="")
    err.print(message, highlight=False, markup=False, soft_wrap=True)


# ---- commands --------------------------------------------------------------------------------------------


@app.callback()
def main_options() -> None:
    """Fine-tune language models with forward passes only (zeroth-order methods).

    [bold]Examples[/]

      zo-core finetune --time-budget 20m --output runs/reviews   # fetches a small model and reviews

      zo-core evaluate runs/reviews

      zo-core doctor
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # messages of libraries would mix with ours
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")  # no messages about retries; a final failure is an error here


@app.command()
@_with_options("Model", "Data", "Method", "Run")
def finetune(
    ctx: typer.Context,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --output.", rich_help_panel="Run")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --output.", rich_help_panel="Run")
    ] = False,
    **options: Any,
) -> None:
    r"""Fine-tune a causal language model on labelled text.

    Without options: SmolLM2-135M on sentences of movie reviews, for about eight minutes.

    [bold]Examples[/]

      zo-core finetune --time-budget 20m --output runs/reviews

      zo-core finetune --model ./my-model --data mine.csv --label-column stars \
          --template 'Review: {text}\nRating:' --label '1= bad' --label '5= good'

      zo-core finetune --output runs/reviews --resume --time-budget 40m
    """
    from zo_core.integrations import finetune as runs

    if resume and overwrite:
        raise RunError("--resume and --overwrite exclude each other: choose one")
    if resume:
        config = resumed_config(Path(options.pop("output", FinetuneConfig().output)), options)
    else:
        config = FinetuneConfig(**options)
    runs.finetune(config, resume=resume, overwrite=overwrite, console=out)


@app.command()
@_with_options("Model", "Data", "Method")
def sweep(
    ctx: typer.Context,
    steps: Annotated[int, typer.Option(help="Steps of each short run.", min=4, rich_help_panel="Sweep")] = 100,
    tries: Annotated[
        int, typer.Option(help="Values of lr, and of eps, to try at most.", min=3, rich_help_panel="Sweep")
    ] = 6,
    eps_too: Annotated[
        bool, typer.Option("--eps-too/--no-eps", help="Also search for eps.", rich_help_panel="Sweep")
    ] = True,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the sweep.", rich_help_panel="Sweep")
    ] = Path("runs/sweep"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the sweep in --output and start again.", rich_help_panel="Sweep")
    ] = False,
    **options: Any,
) -> None:
    """Choose a learning rate and eps by short runs, which are compared on the validation part.

    The sweep tries learning rates half a decade apart, first around --lr and then further in the
    better direction, and after that values of eps in the same way. A run that falls behind the best
    one by two standard errors is stopped. A sweep that was stopped continues in its --output.

    [bold]Examples[/]

      zo-core sweep --method fzoo --steps 50

      zo-core sweep --method mezo --steps 200 --no-eps --model ./my-model --data mine.csv
    """
    from zo_core.integrations import sweep as sweeps

    config = FinetuneConfig(**{**options, "steps": steps, "output": output})
    sweeps.sweep(config, tries=tries, eps_too=eps_too, overwrite=overwrite, console=out)


@app.command()
@_with_options("Model", "Data", "Method")
def probe(
    ctx: typer.Context,
    draws: Annotated[int, typer.Option(help="Random directions to measure along.", min=1, rich_help_panel="Probe")] = 8,
    least: Annotated[float, typer.Option(help="Smallest eps.", min=1e-12, rich_help_panel="Probe")] = 1e-5,
    most: Annotated[float, typer.Option(help="Largest eps.", max=1e3, rich_help_panel="Probe")] = 1e-1,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw it, as a PNG or another format by the name.", rich_help_panel="Probe")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel="Probe")] = False,
    **options: Any,
) -> None:
    """Measure how large --eps should be: what differences of losses consist of, by eps.

    On the first batch of a run, for eps in half decades: the RMS of two-sided and
    one-sided differences of losses; the forward's rounding in them; their bias, from
    curvature and third order; their correlation with the slopes that they stand for;
    and how many are below the rounding. A < marks the best eps. Nothing is trained.

    [bold]Examples[/]

      zo-core probe --method mezo

      zo-core probe --model ./my-model --dtype bfloat16 --data mine.csv --plot eps.png

      zo-core probe --draws 16 --least 1e-4 --most 1e-2 --json
    """
    from zo_core.integrations import probe as probes

    config = FinetuneConfig(**{**options, "steps": 1})
    if plot is not None and not plot.absolute().parent.is_dir():
        raise RunError(f"--plot {str(plot)!r}: expected a file in a folder that exists, got none: create {plot.parent}")
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("starting", total=None)
        found = probes.probe(
            config, least=least, most=most, draws=draws, status=lambda text: bar.update(task, description=text),
            progress=lambda done, of: bar.update(task, completed=done, total=of),
        )  # fmt: skip
    if plot is not None:
        try:
            probes.plot(plot, found, config)
        except (ValueError, OSError) as error:
            raise RunError(f"--plot {str(plot)!r} cannot be written: {error}") from error
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        out.print(probes.report(found, config), highlight=False)


@app.command()
@_with_options("Model", "Data", without="model")
def evaluate(
    ctx: typer.Context,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Run folder, model folder, name or hub id.")],
    part: Annotated[str, typer.Option(help="Part of the data: train, validation, test or all.")] = "test",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **options: Any,
) -> None:
    """Measure the accuracy and loss of a model, or of a finished run, on labelled text.

    TARGET is the folder of a run, whose model, data and options are then the defaults,
    the folder of a model, the name of a model, or a hub id.

    [bold]Examples[/]

      zo-core evaluate runs/reviews

      zo-core evaluate smollm2 --data mine.csv --part all --json
    """
    from zo_core.integrations.session import evaluate as measure

    if part not in (known := ("train", "validation", "test", "all")):
        raise RunError(f"--part: expected one of {', '.join(known)}, got {part!r}")
    if run := _run_folder(Path(target).expanduser()):
        config = stored_config(run, {**options, "model": str(run / "model")})
    else:
        config = FinetuneConfig(**{**options, "model": target})
    with err.status("starting") as status:
        found = measure(config, part, lambda text: status.update(text))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    low, high = found["interval"]
    table = Table(title=f"{target} on {found['data']}", show_header=False)
    table.add_row("part", f"{part}, {found['n']} examples")
    table.add_row("accuracy", f"[bold]{found['accuracy']:.4f}[/]  (95%: {low:.4f} to {high:.4f})")
    table.add_row("loss", f"{found['loss']:.4f}")
    table.add_row("seconds", f"{found['seconds']:.1f}")
    out.print(table)


@app.command()
def replay(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that the run started with.")],
    journal: Annotated[Path, typer.Argument(metavar="JOURNAL", help="The run's folder, or its journal.zoj.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Where the result is written.")],
    step: Annotated[int | None, typer.Option(help="Number of steps to make. Default: all.")] = None,
) -> None:
    """Compute the weights of a run again, from the model it started with and its journal.

    BASE is that model: a folder, a name, a hub id, or a .safetensors file. JOURNAL is
    the run's folder or its journal.zoj. OUT, a new folder (a .safetensors file if BASE is
    one), gets the model as it was after the last step, or after --step steps. The label
    biases of the run's model come with it where JOURNAL is the folder of a finished run
    and the step is that of its model (selected_step in summary.json).

    [bold]Examples[/]

      zo-core replay smollm2 runs/reviews tuned

      zo-core replay base.safetensors journal.zoj tuned.safetensors --step 400
    """
    with _readable_errors(), Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        from zo_core.integrations.replay import replay_model

        task = bar.add_task("starting", total=None)
        made = replay_model(
            base, journal, output, step=step, status=lambda text: bar.update(task, description=text),
            progress=lambda done, steps: bar.update(task, description="replaying", completed=done, total=steps),
        )  # fmt: skip
    out.print(f"step {made['steps']} of {made['of']} written to {output}", highlight=False, soft_wrap=True)
    if made["dropped"]:
        out.print(f"{made['dropped']} bytes at the journal's end are no whole record and were left out", style="yellow")


def _run_folder(target: Path) -> Path | None:
    """The folder of the finished run that `target` is, or whose `model` folder it is; None if it is neither."""
    for run in (target, target.parent):
        if target in (run, run / "model") and (run / "model").is_dir():
            with suppress(RunError):
                stored_config(run)
                return run
    return None


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what zo_core found on this machine, and what to do about what is missing.

    The exit code is 0 if everything that is needed was found, even if something makes it slow, and else 1.

    [bold]Examples[/]

      zo-core doctor

      zo-core doctor --json
    """
    from zo_core.integrations.report import diagnose

    findings = diagnose()
    usable = all(finding["state"] != "missing" for finding in findings)
    if as_json:
        typer.echo(json.dumps({"usable": usable, "findings": findings}, indent=2))
    else:
        table = Table("", "what", "found", "what to do", title="zo-core doctor")
        marks = {"ok": "[green]ok[/]", "slow": "[yellow]slow[/]", "missing": "[red]missing[/]"}
        for finding in findings:
            table.add_row(marks[finding["state"]], finding["what"], finding["found"], finding["advice"])
        out.print(table)
    raise typer.Exit(0 if usable else 1)


if __name__ == "__main__":
    app()
