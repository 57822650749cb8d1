"""Zeroth-order methods in transformers' Trainer, and in trainers built on it: their loop, with steps without a backward."""

import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import zo_core
from zo_core.bindings.warn import warn
from zo_core.distributed import Parallel
from zo_core.optim.base import ZOOptimizer
from zo_core.optim.options import Options
from zo_core.optim.points import Closure

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
    from transformers import TrainingArguments as _Arguments
else:
    _Trainer = _Arguments = object

# The published learning rate and eps of MeZO (arXiv:2305.17333, OPT-13B), by PEFT type, "" where all weights are trained.
# None were published for prompt tuning, which gets those of prefix tuning.
PUBLISHED = {"": (1e-6, 1e-3), "LORA": (1e-4, 1e-2), "PREFIX_TUNING": (1e-2, 1e-1), "PROMPT_TUNING": (1e-2, 1e-1)}
_REFUSED = {
    "gradient_checkpointing": "no backward is run, so no activations are kept",
    "activation_checkpointing": "no backward is run, so no activations are kept",
    "max_grad_norm": "there are no gradients to clip; use a smaller learning_rate",
    "fp16": "there are no gradients to scale; load the model in torch.float16, or set bf16",
    "deepspeed": "there are no gradients and no optimizer states to shard",
    "fsdp": "weights are sharded in a loop of one's own (docs/distributed.md)",
}


@dataclass
class ZOArguments(_Arguments):
    """The method and its options, for TrainingArguments and classes built on it. Options about gradients must be off.

    Args:
        learning_rate: None takes the published value for MeZO (``PUBLISHED``); other methods need a number.
        zo_method: name of an optimizer in ``zo_core``.
        eps: size of the perturbation. None takes the published value for MeZO, the method's default for others.
        probes: probes per step; None takes the method's default.
        distribution: "gaussian", "rademacher" or "factored"; None takes the method's default.
        rank: rank of factored probes.
        residual: extra bits for each 16-bit weight: 8, 16 or None.
        engine: "shadow", "grouped" (docs/engines.md), "inplace" or None; see ``ZOOptimizer``.
        spread_probes: whether the micro-batches of an accumulation window are those of the probes, one each, in place of
            one batch for all; then ``probes``, of each process, is ``gradient_accumulation_steps`` or None.
        measure_floor: whether to measure the forwards' rounding before the first step (20 evaluations), and log as
            ``below_floor`` which share of the probes' differences of losses were smaller.
        calibrate: measure a scale for each tensor's probe in this many evaluations, say 48, of the first step's batch, before that
            step; see ``zo_core.calibrate``. Scales that are known are ``scales`` of ``zo_options``.
        zo_options: other options of the method, as a dict or its JSON. The seed of the noise is ``seed`` unless given here.

    Raises:
        ValueError: an argument that makes no sense without gradients, an unknown method, or options that are not a dict.
    """

    learning_rate: float | None = None  # type: ignore[assignment]
    max_grad_norm: float = 0.0
    gradient_checkpointing: bool | None = None
    zo_method: str = "MeZO"
    eps: float | None = None
    probes: int | None = None
    distribution: str | None = None
    rank: int = 1
    residual: int | None = 8
    engine: str | None = None
    spread_probes: bool = False
    measure_floor: bool = False
    calibrate: int | None = None
    zo_options: dict[str, Any] | str | None = None

    def __post_init__(self) -> None:
        """Check the arguments, as far as that needs no model."""
        if isinstance(self.zo_options, str):
            with suppress(ValueError):
                self.zo_options = json.loads(self.zo_options)
        if not isinstance(self.zo_options, dict | None):
            raise ValueError(f"zo_options: expected a dict or its JSON, got {self.zo_options!r}")
        known = inspect.signature(optimizer_class(self.zo_method)).parameters
        fields = {"params", "lr", "eps", "probes", "distribution", "rank", "residual", "engine", "weight_decay"}
        taken = {*known, *Options.__annotations__}
        if wrong := [name for name in self.zo_options or {} if name in fields or name not in taken]:
            own = sorted(taken - fields - {"options", "method"})
            raise ValueError(
                f"zo_options: expected options of {self.zo_method} that are no fields, {own}, got {wrong[0]!r}"
            )
        if self.calibrate is not None and "scales" in (self.zo_options or {}):
            raise ValueError("calibrate: expected None, as zo_options has scales: give one of them")
        super().__post_init__()  # type: ignore[no-untyped-call]
        for name, why in _REFUSED.items():
            if value := getattr(self, name, None):
                raise ValueError(f"{name}: expected it to be off, got {value!r}: {why}")
        if self.spread_probes and self.probes not in (None, n := self.gradient_accumulation_steps):
            raise ValueError(
                f"probes: expected gradient_accumulation_steps, {n}, or None with spread_probes=True, as each micro-batch is "
                f"that of one probe, got {self.probes}"
            )


@dataclass
class ZOTrainingArguments(ZOArguments, TrainingArguments):  # type: ignore[misc]
    """TrainingArguments with a zeroth-order method; fields as in ``ZOArguments``."""


def optimizer_class(name: str) -> type[ZOOptimizer]:
    """The optimizer of this name in ``zo_core``; ValueError if there is none."""
    found = {n: getattr(zo_core, n) for n in zo_core.__all__ if n != "ZOOptimizer"}
    methods = {n: x for n, x in found.items() if isinstance(x, type) and issubclass(x, ZOOptimizer)}
    if name not in methods:
        raise ValueError(f"zo_method: expected one of {sorted(methods)}, got {name!r}")
    return methods[name]


def _step(optimizer: ZOOptimizer, closure: Closure | Sequence[Closure] | None = None) -> Tensor | None:
    """``optimizer.step`` for Trainer: its loop calls it without a closure, when ``training_step`` has made the step already."""
    return type(optimizer).step(optimizer, closure) if closure else None


class ZOMixin(_Trainer):
    """A base class to list before Trainer, or before a trainer built on it, so that steps are those of ``ZOOptimizer``.

    The training loop remains Trainer's. With gradient accumulation, the step is made in the ``training_step`` of the last
    micro-batch: each evaluation calls Trainer's own ``training_step`` for all micro-batches, without the backward, so losses
    are weighted as Trainer weights them. Trainer logs the step's loss.
    With ``spread_probes`` each probe is evaluated on one micro-batch, with a weight that makes the mean over the probes that loss;
    where an epoch's last window has fewer micro-batches than probes, they are used in turn.
    """

    args: Any
    optimizer: Any
    _window: list[Any]  # the micro-batches of this step

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's, without backward and without DistributedDataParallel. ValueError for several devices in one process."""
        if not isinstance(self.args, ZOArguments):
            raise TypeError(f"args: expected ZOTrainingArguments, got {type(self.args).__name__}")
        super().create_accelerator_and_postprocess()
        if (n := self.args.n_gpu) > 1:
            raise ValueError(
                f"{type(self).__name__}: expected one device a process, got {n}: start a process for each (torchrun, accelerate "
                "launch), or one with CUDA_VISIBLE_DEVICES=0"
            )
        self.accelerator.backward = lambda loss, **kwargs: None
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)  # no DDP

    def create_optimizer(self, model: Any = None) -> ZOOptimizer:
        """Make the optimizer that the arguments name, of all trainable parameters, unless one was given to the trainer."""
        if self.optimizer is None:
            args, model = self.args, self.model if model is None else model
            kinds = [config.peft_type.value for config in getattr(model, "peft_config", {}).values()] or [""]
            lr, eps = PUBLISHED.get(kinds[0], (None, None)) if args.zo_method == "MeZO" else (None, None)
            lr = lr if args.learning_rate is None else args.learning_rate
            if lr is None:
                raise ValueError(f"learning_rate: expected a number, got None; none is known for {args.zo_method} here")
            named = {name: getattr(args, name) for name in ("eps", "probes", "distribution", "rank", "engine")}
            named["eps"] = eps if args.eps is None else args.eps
            options: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
            options |= {"weight_decay": args.weight_decay, "seed": args.seed, "residual": args.residual}
            if args.spread_probes:
                options["probes"] = args.gradient_accumulation_steps * self.accelerator.num_processes
            options["processes"] = self._parallel() if self.accelerator.num_processes > 1 else None
            options |= args.zo_options or {}
            self.optimizer = optimizer_class(args.zo_method)(model, lr=lr, **options)
        if not isinstance(optimizer := self.zo_optimizer, ZOOptimizer):
            raise TypeError(f"optimizers: expected an optimizer of zo_core, got {type(optimizer).__name__}")
        n = self.accelerator.num_processes
        grid = (1, n) if self.args.spread_probes else (n, 1)
        if n > 1 and (optimizer.processes is None or optimizer.processes.grid() != grid):
            raise ValueError(
                f"processes: expected zo_core.distributed.Parallel(data={grid[0]}), as each of {n} processes gets rows of its own from "
                f"Trainer, got {optimizer.processes}"
            )
        if self.args.spread_probes and optimizer.probes != (most := self.args.gradient_accumulation_steps * n):
            raise ValueError(
                f"probes: expected {most} with spread_probes=True, one for each of the gradient_accumulation_steps of each "
                f"process, got {optimizer.probes}"
            )
        optimizer.step = MethodType(_step, optimizer)  # type: ignore[method-assign]
        return optimizer

    def _parallel(self) -> Parallel:
        """How processes share a step: each has rows of its own, of all probes, or with ``spread_probes`` of its own."""
        return Parallel(data=1) if self.args.spread_probes else Parallel()

    @property
    def zo_optimizer(self) -> ZOOptimizer:
        """The optimizer, without the wrapper of accelerate."""
        return getattr(self.optimizer, "optimizer", self.optimizer)  # type: ignore[no-any-return]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        """As Trainer's; it also keeps the micro-batches for the step."""
        self._window, items = super().get_batch_samples(*args, **kwargs)
        return self._window, items

    def training_step(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Make the step at the last micro-batch and return its loss; before that, return zero."""
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        evaluate, window = super().training_step, self._window

        def loss_of(some: Sequence[Any], weight: float = 1.0) -> Tensor:
            losses = [evaluate(model, inputs, num_items_in_batch) for inputs in some]
            if losses[0].element_size() < 4:
                warn(
                    f"the model computes its loss in {losses[0].dtype}, too few digits for a difference of losses: "
                    "give compute_loss_func (docs/integrations.md)",
                )
            return torch.stack(losses).float().sum() * weight

        closure: Closure | list[Closure] = partial(loss_of, window)
        if self.args.spread_probes:
            n, m = self.args.gradient_accumulation_steps, len(window)  # m < n at the end of an epoch
            weights = [n / len(range(k % m, n, m)) for k in range(n)]  # their mean is then Trainer's loss of the window
            closure = [partial(loss_of, [window[k % m]], weights[k]) for k in range(n)]
        optimizer = self.zo_optimizer
        if self.args.calibrate and not optimizer._steps:
            zo_core.calibrate(optimizer, closure, self.args.calibrate)
        if self.args.measure_floor and optimizer.noise_floor is None:
            self._measure_floor(partial(loss_of, window))
        return optimizer.step(closure)

    def _measure_floor(self, closure: Closure) -> None:
        """Measure the forwards' rounding error around eps."""
        optimizer = self.zo_optimizer
        try:
            ladder = [optimizer.eps * 10 ** (half / 2) for half in range(-1, 3)]
            optimizer.noise_floor = zo_core.measure(optimizer, closure, eps=ladder, probes=2).at(optimizer.eps).error
        except ValueError as error:
            warn(f"measure_floor: {error}")
            optimizer.noise_floor = 0.0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with the numbers of steps that were skipped and whose losses were all the same, and ``below_floor``."""
        if "loss" in logs and isinstance(optimizer := self.zo_optimizer, ZOOptimizer):
            logs |= {"skipped": optimizer.skipped, "flat": optimizer.flat}
            below, probes = optimizer.below_floor
            if probes:
                logs["below_floor"] = below / probes
        super().log(logs, *args, **kwargs)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> None:
        """None: there are no gradients."""


class ZOTrainer(ZOMixin, Trainer):  # type: ignore[misc]
    """Trainer with zeroth-order steps; takes ZOTrainingArguments, and otherwise what Trainer takes."""
