"""The configuration of a fine-tuning run. Each field is a checked value, an option of the command line, and its help."""

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
    """A method of the command line."""

    optimizer: str  # a class in zo_core
    fixed: dict[str, Any]  # options of that class that make it this method
    defaults: dict[str, Any]  # options that users may change


_MEZO = {"lr": 3e-5, "probes": 1, "distribution": "rademacher", "eval_every": 100}
_HIZOO = {"lr": 3e-5, "probes": 1, "distribution": "gaussian", "eval_every": 60, "smoothing": 1e-6}
_FZOO = {"lr": 2.5e-3, "probes": 8, "distribution": "factored", "eval_every": 30}
_MEAZO = {"lr": 6e-4, "probes": 1, "distribution": "rademacher", "eval_every": 100, "beta": 0.99}
_BSZO = {"lr": 6e-5, "probes": 2, "distribution": "gaussian", "eval_every": 60}
_SPSA = {"lr": 4e-4, "probes": 4, "distribution": "rademacher", "eval_every": 20, "alpha": 0.1}
_ADAMEZO = {
    "lr": 2e-4, "probes": 1, "distribution": "gaussian", "eval_every": 100, "momentum": 0.7, "beta2": 0.9,
}  # fmt: skip
METHODS = {
    "mezo": Method("MeZO", {}, _MEZO),
    "lezo": Method("LeZO", {}, {**_MEZO, "lr": 1e-4, "rho": 0.75}),
    "hizoo": Method("HiZOO", {"hessian": "diagonal"}, _HIZOO),
    "hizoo-l": Method("HiZOO", {"hessian": "factored"}, _HIZOO),
    "fzoo": Method("FZOO", {}, _FZOO),
    "fzoo-r": Method("FZOO", {"reuse": True}, {**_FZOO, "lr": 3e-3, "probes": 4}),
    "spsa": Method("SPSA", {}, _SPSA),
    "adamezo": Method("AdaMeZO", {}, _ADAMEZO),
    "meazo": Method("MEAZO", {}, _MEAZO),
    "bszo": Method("BSZO", {}, _BSZO),
}

OF_SOME = ("smoothing", "alpha", "beta", "beta2")  # options that only the methods with a default for them have


def _defaults(option: str) -> str:
    """The default of an option in each method, for the option's help."""
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
    """Check a list of texts "VALUE=WORD", which `label_words` divides when it knows the data; an empty list becomes None."""
    if not isinstance(value, list | tuple):
        return value
    if wrong := [item for item in value if "=" not in item]:
        raise ValueError(f"expected VALUE=WORD, such as 'neg= terrible', got {wrong[0]!r}")
    return list(value) or None


def _label_options(labels: Mapping[str, str] | list[str] | None) -> list[str]:
    """Label words as texts "VALUE=WORD", in order."""
    return sorted(map("=".join, labels.items()) if isinstance(labels, Mapping) else labels or [])


def _option(default: Any, group: str, about: str, **limits: Any) -> Any:
    """A field that is also an option of the command line, under the heading ``group``; ``about`` is its help."""
    return Field(default, description=about, json_schema_extra={"group": group}, **limits)


class FinetuneConfig(BaseModel):
    """The options of a run. Each field is an option of `zo-core finetune`.

    Raises:
        pydantic.ValidationError: a value out of range or an unknown field.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = _option("smollm2", "Model", f"Name ({', '.join(names('model'))}), local folder or hub id.")
    dtype: Literal["float32", "bfloat16", "float16"] = _option("float32", "Model", "Data type of the weights.")
    autocast: bool | None = _option(
        None,
        "Model",
        "Compute forwards in bfloat16 from float32 weights. Default: if a trial forward shows that it is faster.",
    )
    device: str = _option("auto", "Model", "cpu, cuda, cuda:1, ...; auto is a GPU if there is one.")
    eval_batch_size: int = _option(32, "Model", "Examples per forward in evaluations.", ge=1)

    data: str = _option("reviews", "Data", f"Name ({', '.join(names('dataset'))}), or a .csv, .tsv or .jsonl file.")
    text_column: str = _option("text", "Data", "Column with the text.")
    label_column: str = _option("label", "Data", "Column with the label.")
    template: str = _option("Review: {text}\nSentiment:", "Data", "Prompt around the text; the label word follows it.")
    labels: Annotated[dict[str, str] | list[str] | None, BeforeValidator(_check_labels)] = _option(
        None, "Data", "The word for a label value, as VALUE=WORD; repeat it for each. Default: a space and the value."
    )
    max_length: int = _option(256, "Data", "Longest prompt in tokens; longer ones lose their beginning.", ge=8)
    validation_size: float = _option(
        0.05, "Data", "Size of the validation part: a number of examples, or a fraction below 1.", gt=0
    )
    test_size: float = _option(0.2, "Data", "Size of the test part: a number of examples, or a fraction below 1.", gt=0)
    split_seed: int = _option(0, "Data", "Seed of the division of the data into parts.", ge=0, lt=2**63)

    method: Literal["mezo", "lezo", "hizoo", "hizoo-l", "fzoo", "fzoo-r", "spsa", "adamezo", "meazo", "bszo"] = _option(
        "fzoo", "Method", "Zeroth-order method."
    )
    lr: float = _option(None, "Method", f"Learning rate. Default: {_defaults('lr')}.", gt=0)
    schedule: Literal["constant", "linear", "cosine"] = _option("linear", "Method", "How the learning rate decreases.")
    warmup: float = _option(0.0, "Method", "Fraction of the run in which the learning rate rises from 0.", ge=0, lt=1)
    eps: float = _option(1e-3, "Method", "Size of a perturbation.", gt=0)
    weight_decay: float = _option(0.0, "Method", "Weight decay.", ge=0)
    probes: int = _option(None, "Method", f"Random directions (probes) per step. Default: {_defaults('probes')}.", ge=1)
    distribution: Literal["gaussian", "rademacher", "factored"] = _option(
        None, "Method", f"Distribution of the directions. Default: {_defaults('distribution')}."
    )
    rank: int = _option(
        1, "Method", "Rank of factored directions: how many products of signs they sum.", ge=1, le=MAX_RANK
    )
    rho: float = _option(
        0.0, "Method", "Fraction of the transformer blocks that a step leaves out. Default for lezo: 0.75.", ge=0, lt=1
    )
    momentum: float = _option(
        0.0,
        "Method",
        "Decay a step of the estimates of earlier steps, along which a step goes again. Default for adamezo: 0.7.",
        ge=0,
        lt=1,
    )
    window: int = _option(10, "Method", "Steps that momentum reaches back, this one included.", ge=1, le=1024)
    beta2: float | None = _option(
        None, "Method", f"Decay of the second moment. Default: {_defaults('beta2')}.", ge=0, lt=1
    )
    smoothing: float | None = _option(
        None, "Method", f"How fast the Hessian is learned. Default: {_defaults('smoothing')}.", ge=0, le=1
    )
    alpha: float | None = _option(
        None, "Method", f"Power of the curvature that a probe is divided by. Default: {_defaults('alpha')}.", ge=0, le=1
    )
    beta: float | None = _option(
        None, "Method", f"How much of the second moment a step keeps. Default: {_defaults('beta')}.", ge=0, lt=1
    )
    scales: Path | None = _option(
        None,
        "Method",
        "File of a scale for each tensor's probe, by name: zo_core.scales.save writes one, and so does a run.",
    )
    calibrate: int | None = _option(
        None, "Method", "Measure such scales in this many forwards, say 48, before the first step.", ge=14
    )
    residual: Literal["none", "8", "16"] = _option(
        "8", "Method", "Extra bits for each 16-bit weight, so that small updates are not rounded away."
    )
    engine: Literal["shadow", "grouped", "inplace"] | None = _option(
        None,
        "Method",
        "shadow perturbs copies of the weights, grouped does so at many points at once, inplace perturbs the weights themselves. "
        "Default: grouped for factored probes, else shadow.",
    )
    points_at_once: int | None = _option(
        None,
        "Method",
        "Points that the grouped engine evaluates at once. Default: as many as pay and fit in memory.",
        ge=1,
    )
    batch_size: int = _option(8, "Method", "Examples per forward; at least two of each label.", ge=1)
    group_by_length: bool = _option(
        True, "Method", "Make batches of prompts of similar lengths, which need little padding."
    )
    stratify: bool = _option(True, "Method", "Make batches in which each label has its share of the data.")
    spread: bool = _option(
        False, "Method", "Give each probe a batch of its own, of --batch-size examples, in place of one for all."
    )
    temperature: float = _option(
        1.0,
        "Method",
        "Temperature of the softmax in the loss: above 1, say 2 in a run of few steps, examples with unlikely labels weigh less; "
        "1: plain cross-entropy.",
        gt=0,
    )
    label_bias: int = _option(
        256,
        "Method",
        "Fit a bias for each label to a batch in its loss, and to this many training examples in evaluations; 0: none, as with --batch-size 1.",
        ge=0,
    )
    dropout: bool = _option(False, "Method", "Use the model's dropout in training.")
    seed: int = _option(0, "Method", "Seed of the directions and of the order of the data.", ge=0, lt=2**63)

    steps: int | None = _option(None, "Run", "Number of steps.", ge=1)
    time_budget: Annotated[float | None, BeforeValidator(parse_duration)] = _option(
        None, "Run", "Stop after this training time, such as 90s, 8m or 2h. Default without --steps: 8m.", gt=0
    )
    eval_every: int = _option(None, "Run", f"Steps between validations. Default: {_defaults('eval_every')}.", ge=1)
    save_every: float = _option(5.0, "Run", "Minutes between checkpoints.", ge=0)
    measure_floor: bool = _option(
        True,
        "Run",
        "Measure the forwards' rounding before the first step (20 forwards), and report how many differences of losses are smaller.",
    )
    keep_best: bool = _option(
        True, "Run", "Save and test the weights with the least validation loss, not the last ones."
    )
    output: Path = _option(Path("runs/finetune"), "Run", "Folder of the run.")

    @field_validator("model", "data")
    @classmethod
    def _absolute(cls, value: str) -> str:
        """Make a local path absolute, so that a run can be resumed and evaluated from any folder."""
        path = Path(value).expanduser()
        known = value in names("model") or value in names("dataset")
        return str(path.resolve()) if not known and path.exists() else value

    @field_validator("scales")
    @classmethod
    def _absolute_path(cls, value: Path | None) -> Path | None:
        return value if value is None else value.expanduser().resolve()

    @field_validator("validation_size", "test_size")
    @classmethod
    def _whole(cls, value: float) -> float:
        if value > 1 and value % 1:
            raise ValueError("expected a whole number of examples, or a fraction below 1")
        return value

    @model_validator(mode="before")
    @classmethod
    def _methods_own(cls, values: Any) -> Any:
        """Take the method's defaults for options that are not given, and refuse options that it does not have."""
        if not isinstance(values, Mapping):
            return values
        chosen = values.get("method", cls.model_fields["method"].default)
        if (method := METHODS.get(chosen)) is None:
            return values
        for name in OF_SOME:
            if values.get(name) is not None and name not in method.defaults:
                takers = [m for m, known in METHODS.items() if name in known.defaults]
                raise ValueError(f"{name} is an option of {', '.join(takers)}; {chosen} has none")
        if values.get("scales") is not None and values.get("calibrate") is not None:
            raise ValueError("scales and calibrate exclude each other: give a file of scales, or have them measured")
        return {**values, **{k: v for k, v in method.defaults.items() if values.get(k) is None}}

    @model_validator(mode="before")
    @classmethod
    def _biases_of_one(cls, values: Any) -> Any:
        """Biases that are fitted to one example explain its label whatever the weights are: then there are none."""
        if not isinstance(values, Mapping) or values.get("batch_size") != 1:
            return values
        if values.get("label_bias"):
            raise ValueError(
                "label_bias needs batches of at least 2 examples: use label_bias 0, or a larger batch_size"
            )
        return {**values, "label_bias": 0}

    @model_validator(mode="before")
    @classmethod
    def _budget(cls, values: Any) -> Any:
        """A run without steps or a time budget takes eight minutes."""
        if isinstance(values, Mapping) and values.get("steps") is None and values.get("time_budget") is None:
            return {**values, "time_budget": "8m"}
        return values

    def optimizer_class(self) -> type[zo_core.ZOOptimizer]:
        """The class of the method."""
        found: type[zo_core.ZOOptimizer] = getattr(zo_core, METHODS[self.method].optimizer)
        return found

    def optimizer(self, model: nn.Module) -> zo_core.ZOOptimizer:
        """The optimizer of the trainable parameters of a model. RunError if it refuses an option."""
        method = METHODS[self.method]
        own = ["lr", "eps", "weight_decay", "probes", "seed", "distribution", "rank", "rho", "engine", "points_at_once"]
        own += ["momentum", "window", "scales"] + [name for name in OF_SOME if name in method.defaults]
        options: dict[str, Any] = {name: getattr(self, name) for name in own}
        options["residual"] = None if self.residual == "none" else int(self.residual)
        try:
            optimizer = self.optimizer_class()(model, **options, **method.fixed)
        except (ValueError, TypeError, OSError) as error:
            raise RunError(f"--method {self.method}: {error}") from error
        return optimizer

    def command(self) -> str:
        """The command that makes this run, without its `--output`."""
        default = dict(FinetuneConfig(method=self.method, steps=self.steps))
        default |= dict.fromkeys(("method", "lr", "eps", "steps", "output"))  # always in the command
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
        """The fraction of the run that is done, by steps or by time, whichever is further."""
        return max(step / (self.steps or math.inf), seconds / (self.time_budget or math.inf))

    def lr_at(self, progress: float) -> float:
        """The learning rate when this fraction of the run is done: a linear warmup, then the schedule."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        rest = min(1.0, (progress - self.warmup) / (1 - self.warmup))
        falls = {"constant": 1.0, "linear": 1 - rest, "cosine": (1 + math.cos(math.pi * rest)) / 2}
        return self.lr * falls[self.schedule]


EARLIER: dict[str, Any] = {  # options of now, as versions without them went on
    "group_by_length": False, "label_bias": 0, "stratify": False, "temperature": 1.0,
}  # fmt: skip
CAN_CHANGE = {"steps", "time_budget", "save_every", "output"}  # options that a resumed run may change


def stored_config(folder: Path, given: Mapping[str, Any] | None = None) -> FinetuneConfig:
    """The configuration of the run in `folder`, with the `given` fields in place of the stored ones.

    Raises:
        RunError: no run there, or its config.json is not readable.
        pydantic.ValidationError: a given value is invalid.
    """
    path = folder / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored = EARLIER | stored
        FinetuneConfig(**stored)
    except (OSError, ValueError, TypeError) as error:  # pydantic's and json's errors are ValueErrors
        why = "there is no config.json" if isinstance(error, OSError) else "its config.json is not one of a run"
        raise RunError(f"--output {str(folder)!r} holds no run to resume: {why}") from error
    return FinetuneConfig(**{**stored, **(given or {}), "output": folder})


def resumed_config(folder: Path, given: Mapping[str, Any]) -> FinetuneConfig:
    """The configuration for resuming the run in `folder`: budgets may change, other given fields must be as stored.

    Raises:
        RunError: as `stored_config`, or another field differs from the stored one.
    """
    before = stored_config(folder)
    same_method = given.get("method", before.method) == before.method  # another one may refuse the stored options
    now = stored_config(folder, given if same_method else {"method": given["method"], **dict.fromkeys(OF_SOME)})
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
