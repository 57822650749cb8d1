"""What defines a fine-tuning run: each field is a checked value, a command line option and its help."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from torch import nn

import zo_core
from zo_core.integrations.assets import names
from zo_core.integrations.errors import RunError
from zo_core.kernels.reference import MAX_RANK


class Method(NamedTuple):
    """A method on the command line: its optimizer, what makes it this one, and the options it starts from."""

    optimizer: str  # a class in zo_core
    fixed: dict[str, Any]
    defaults: dict[str, Any]


_MEZO = {"lr": 3e-5, "probes": 1, "distribution": "rademacher", "eval_every": 100}
_HIZOO = {"lr": 3e-5, "probes": 1, "distribution": "gaussian", "eval_every": 60, "smoothing": 1e-6}
_FZOO = {"lr": 2e-3, "probes": 8, "distribution": "rademacher", "eval_every": 20}
_SPSA = {"lr": 4e-4, "probes": 4, "distribution": "rademacher", "eval_every": 20, "alpha": 0.1}
METHODS = {
    "mezo": Method("MeZO", {}, _MEZO),
    "lezo": Method("LeZO", {}, {**_MEZO, "rho": 0.75}),
    "hizoo": Method("HiZOO", {"hessian": "diagonal"}, _HIZOO),
    "hizoo-l": Method("HiZOO", {"hessian": "factored"}, _HIZOO),
    "fzoo": Method("FZOO", {}, _FZOO),
    "fzoo-r": Method("FZOO", {"reuse": True}, {**_FZOO, "probes": 4}),
    "spsa": Method("SPSA", {}, _SPSA),
}


def _defaults(option: str) -> str:
    """The methods' defaults of an option, for its help."""
    values: dict[Any, list[str]] = {}
    for name, method in METHODS.items():
        if option in method.defaults:
            values.setdefault(method.defaults[option], []).append(name)
    return "; ".join(f"{value} for {', '.join(methods)}" for value, methods in values.items())


def parse_duration(value: Any) -> Any:
    """Seconds from "90s", "8m", "2h", "1h30m" or a number of seconds; other types pass unchanged.

    Raises:
        ValueError: a string that is none of these.

    """
    if not isinstance(value, str):
        return value
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"(?:{number}h)?(?:{number}m)?(?:{number}s?)?", value.strip().lower())
    if not match or not value.strip():
        raise ValueError(f"expected a time such as 90s, 8m, 2h or 1h30m, got {value!r}")
    return sum(float(part) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True) if part)


def _check_labels(value: Any) -> Any:
    """A list of "VALUE=WORD" as it is: the data tells where VALUE ends (`label_words`). None for an empty one."""
    if not isinstance(value, list | tuple):
        return value
    if wrong := [item for item in value if "=" not in item]:
        raise ValueError(f"expected VALUE=WORD, such as 'neg= terrible', got {wrong[0]!r}")
    return list(value) or None


def _label_options(labels: Mapping[str, str] | list[str] | None) -> list[str]:
    """Label words as a command line has them."""
    return sorted(map("=".join, labels.items()) if isinstance(labels, Mapping) else labels or [])


def _option(default: Any, group: str, about: str, **limits: Any) -> Any:
    """A field that is also a command line option, under a heading."""
    return Field(default, description=about, json_schema_extra={"group": group}, **limits)


class FinetuneConfig(BaseModel):
    """Everything that defines a run. Each field is an option of `zo-core finetune`.

    Raises:
        pydantic.ValidationError: a value out of range or an unknown field.

    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = _option("smollm2", "Model", f"Name ({', '.join(names('model'))}), local folder or hub id.")
    dtype: Literal["float32", "bfloat16", "float16"] = _option("float32", "Model", "Type of the weights.")
    autocast: bool | None = _option(
        None, "Model", "Run forwards in bfloat16 over float32 weights. Without: where that is faster here."
    )
    device: str = _option("auto", "Model", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")
    eval_batch_size: int = _option(32, "Model", "Examples a forward in evaluations.", ge=1)

    data: str = _option("reviews", "Data", f"Name ({', '.join(names('dataset'))}), or a .csv, .tsv or .jsonl file.")
    text_column: str = _option("text", "Data", "Column with the text.")
    label_column: str = _option("label", "Data", "Column with the label.")
    template: str = _option(
        "Review: {text}\nSentiment:", "Data", "Prompt around the text; ends where the label word begins."
    )
    labels: Annotated[dict[str, str] | list[str] | None, BeforeValidator(_check_labels)] = _option(
        None,
        "Data",
        "Word for a label value, as VALUE=WORD; once for each. Without: the value after a space.",
    )
    max_length: int = _option(256, "Data", "Longest prompt in tokens; a longer one keeps its end.", ge=8)
    validation_size: float = _option(0.05, "Data", "Validation part: a count, or a fraction below 1.", gt=0)
    test_size: float = _option(0.2, "Data", "Test part: a count, or a fraction below 1.", gt=0)
    split_seed: int = _option(0, "Data", "Seed of the division into parts.", ge=0, lt=2**63)

    method: Literal["mezo", "lezo", "hizoo", "hizoo-l", "fzoo", "fzoo-r", "spsa"] = _option(
        "fzoo", "Method", "Zeroth-order method."
    )
    lr: float = _option(None, "Method", f"Learning rate. Without: {_defaults('lr')}.", gt=0)
    schedule: Literal["constant", "linear", "cosine"] = _option("linear", "Method", "How the learning rate falls.")
    warmup: float = _option(0.0, "Method", "Fraction of the run over which the learning rate rises.", ge=0, lt=1)
    eps: float = _option(1e-3, "Method", "Size of a perturbation.", gt=0)
    weight_decay: float = _option(0.0, "Method", "Weight decay.", ge=0)
    probes: int = _option(None, "Method", f"Random directions a step. Without: {_defaults('probes')}.", ge=1)
    distribution: Literal["gaussian", "rademacher", "factored"] = _option(
        None, "Method", f"What directions are drawn from. Without: {_defaults('distribution')}."
    )
    rank: int = _option(1, "Method", "Products of signs that a factored direction sums.", ge=1, le=MAX_RANK)
    rho: float = _option(0.0, "Method", "Fraction of the blocks that a step leaves out; 0.75 for lezo.", ge=0, lt=1)
    smoothing: float | None = _option(None, "Method", f"Of the Hessian ({_defaults('smoothing')}).", ge=0, le=1)
    alpha: float | None = _option(None, "Method", f"Power of the curvature ({_defaults('alpha')}).", ge=0, le=1)
    residual: Literal["none", "8", "16"] = _option(
        "8", "Method", "Low-order bits kept beside each 16-bit weight, so that small updates arrive."
    )
    engine: Literal["shadow", "grouped", "inplace"] = _option(
        "shadow",
        "Method",
        "How weights are perturbed: as they are read, for one point or for all of a step at once (docs/engines.md), or in place.",
    )
    points_at_once: int | None = _option(
        None,
        "Method",
        "Points that the grouped engine evaluates at once. Without: as many as pay and fit in memory.",
        ge=1,
    )
    batch_size: int = _option(16, "Method", "Examples a forward.", ge=1)
    dropout: bool = _option(False, "Method", "Train with the model's dropout.")
    seed: int = _option(0, "Method", "Seed of directions and data order.", ge=0, lt=2**63)

    steps: int | None = _option(None, "Run", "Stop after so many steps.", ge=1)
    time_budget: Annotated[float | None, BeforeValidator(parse_duration)] = _option(
        None, "Run", "Stop after so much training time: 90s, 8m, 2h. 8m if no --steps either.", gt=0
    )
    eval_every: int = _option(None, "Run", f"Steps between validations. Without: {_defaults('eval_every')}.", ge=1)
    save_every: float = _option(5.0, "Run", "Minutes between checkpoints.", ge=0)
    keep_best: bool = _option(True, "Run", "Save and test the weights with the best validation accuracy, not the last.")
    output: Path = _option(Path("runs/finetune"), "Run", "Folder of the run.")

    @field_validator("model", "data")
    @classmethod
    def _absolute(cls, value: str) -> str:
        """A local path in full, so that a run can be resumed and evaluated from anywhere."""
        path = Path(value).expanduser()
        known = value in names("model") or value in names("dataset")
        return str(path.resolve()) if not known and path.exists() else value

    @field_validator("validation_size", "test_size")
    @classmethod
    def _whole(cls, value: float) -> float:
        if value > 1 and value % 1:
            raise ValueError("expected a whole number of examples, or a fraction below 1")
        return value

    @model_validator(mode="before")
    @classmethod
    def _methods_own(cls, values: Any) -> Any:
        """What is not given is as the method has it."""
        if not isinstance(values, Mapping):
            return values
        chosen = values.get("method", cls.model_fields["method"].default)
        if (method := METHODS.get(chosen)) is None:
            return values
        for name in ("smoothing", "alpha"):
            if values.get(name) is not None and name not in method.defaults:
                takers = [m for m, known in METHODS.items() if name in known.defaults]
                raise ValueError(f"{name} is an option of {', '.join(takers)}; {chosen} has none")
        return {**values, **{k: v for k, v in method.defaults.items() if values.get(k) is None}}

    @model_validator(mode="before")
    @classmethod
    def _budget(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("steps") is None and values.get("time_budget") is None:
            return {**values, "time_budget": "8m"}
        return values

    def optimizer(self, model: nn.Module) -> zo_core.ZOOptimizer:
        """The method over the trainable parameters of a model; RunError where it does not take an option."""
        method = METHODS[self.method]
        own = {name: getattr(self, name) for name in ("smoothing", "alpha") if name in method.defaults}
        try:
            optimizer: zo_core.ZOOptimizer = getattr(zo_core, method.optimizer)(
                model,
                lr=self.lr,
                eps=self.eps,
                weight_decay=self.weight_decay,
                probes=self.probes,
                seed=self.seed,
                distribution=self.distribution,
                rank=self.rank,
                rho=self.rho,
                residual=None if self.residual == "none" else int(self.residual),
                engine=self.engine,
                points_at_once=self.points_at_once,
                **method.fixed,
                **own,
            )
        except (ValueError, TypeError) as error:
            raise RunError(f"--method {self.method}: {error}") from error
        return optimizer

    def command(self) -> str:
        """The `zo-core finetune` that makes this run; only its output is left out."""
        default = dict(FinetuneConfig(method=self.method, steps=self.steps))
        default |= dict.fromkeys(("method", "lr", "eps", "steps", "output"))  # which are always said
        words = ["zo-core", "finetune"]
        for name, value in dict(self, output=None).items():
            flag = f"--{name.replace('_', '-')}"
            if value is None or value == default[name]:
                continue
            if name == "labels":
                words += [word for item in _label_options(value) for word in ("--label", item)]
            elif isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            else:
                words += [flag, str(value).replace("\n", "\\n")]
        return shlex.join(words)

    def progress(self, step: int, seconds: float) -> float:
        """Fraction of the run that is over: the larger of steps and time."""
        return max(step / (self.steps or math.inf), seconds / (self.time_budget or math.inf))

    def lr_at(self, progress: float) -> float:
        """Learning rate at a fraction of the run: linear warmup, then the schedule."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        rest = min(1.0, (progress - self.warmup) / (1 - self.warmup))
        falls = {"constant": 1.0, "linear": 1 - rest, "cosine": (1 + math.cos(math.pi * rest)) / 2}
        return self.lr * falls[self.schedule]


CAN_CHANGE = {"steps", "time_budget", "save_every", "output"}  # what a resumed run may set anew


def stored_config(folder: Path, given: Mapping[str, Any] | None = None) -> FinetuneConfig:
    """Configuration of the run in `folder`, with `given` fields set anew.

    Raises:
        RunError: no run there, or its config.json is not readable.
        pydantic.ValidationError: a given value is invalid.

    """
    path = folder / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        FinetuneConfig(**stored)
    except (OSError, ValueError, TypeError) as error:  # pydantic's and json's errors are ValueErrors
        why = "there is no config.json" if isinstance(error, OSError) else "its config.json is not one of a run"
        raise RunError(f"--output {str(folder)!r} holds no run to resume: {why}") from error
    return FinetuneConfig(**{**stored, **(given or {}), "output": folder})


def resumed_config(folder: Path, given: Mapping[str, Any]) -> FinetuneConfig:
    """As `stored_config`, for going on: only budgets may change, other given fields must be as before.

    Raises:
        RunError: also when a field that defines the weights differs.

    """
    before = stored_config(folder)
    same_method = given.get("method", before.method) == before.method  # another may not take the stored options
    now = stored_config(folder, given if same_method else {"method": given["method"], "smoothing": None, "alpha": None})
    for name in [name for name in (given if same_method else ["method"]) if name not in CAN_CHANGE]:
        was, got = getattr(before, name), getattr(now, name)
        if name == "labels":
            name, was, got = "label", _label_options(was), _label_options(got)
        if was != got:
            raise RunError(
                f"--{name.replace('_', '-')} was {was!r} in {str(folder)!r}, got {got!r}; a resumed run keeps it: leave it "
                "out, or choose another --output"
            )
    return now
