"""Zeroth-order methods in transformers' Trainer, and in what is built on it: its loop, with steps without a backward."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
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

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
    from transformers import TrainingArguments as _Arguments
else:
    _Trainer = _Arguments = object

# Learning rate and eps for MeZO as published (arXiv:2305.17333, OPT-13B), by what is trained: a PEFT type, or all weights.
# Prompt tuning was not: it gets those of prefixes.
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
    """The method and its options, for TrainingArguments and classes built on it; those of gradients are off.

    Args:
        learning_rate: None takes the published one for what is trained (``PUBLISHED``), where the method is MeZO.
        zo_method: name of an optimizer in ``zo_core``.
        eps: size of the perturbation. None: as ``learning_rate``, or the method's own default.
        probes: probes a step; None: the method's own default.
        distribution: "gaussian", "rademacher" or "factored"; None: the method's own default.
        rank: of factored probes.
        residual: bits, 8, 16 or None, that 16-bit weights keep beside them.
        engine: "shadow", "grouped" (docs/engines.md), "inplace" or None.
        zo_options: what else the method takes, as a dict or its JSON. The seed of the noise is ``seed`` unless given here.

    Raises:
        ValueError: an argument that makes no sense without gradients, an unknown method, or options that are no dict.
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
    zo_options: dict[str, Any] | str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before there is a model."""
        if isinstance(self.zo_options, str):
            with suppress(ValueError):
                self.zo_options = json.loads(self.zo_options)
        if not isinstance(self.zo_options, dict | None):
            raise ValueError(f"zo_options: expected a dict or its JSON, got {self.zo_options!r}")
        known = inspect.signature(optimizer_class(self.zo_method)).parameters
        fields = {"params", "lr", "eps", "probes", "distribution", "rank", "residual", "engine", "weight_decay"}
        if wrong := [
            name for name in self.zo_options or {} if name in fields or name not in {*known, *Options.__annotations__}
        ]:
            own = sorted({*known, *Options.__annotations__} - fields - {"options", "method"})
            raise ValueError(
                f"zo_options: expected options of {self.zo_method} that are no fields, {own}, got {wrong[0]!r}"
            )
        super().__post_init__()  # type: ignore[no-untyped-call]
        for name, why in _REFUSED.items():
            if value := getattr(self, name, None):
                raise ValueError(f"{name}: expected it to be off, got {value!r}: {why}")


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


def _step(optimizer: ZOOptimizer, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
    """A step; without a closure, as Trainer's loop calls it, nothing: ``training_step`` has made it."""
    return type(optimizer).step(optimizer, closure) if closure else None


class ZOMixin(_Trainer):
    """Before Trainer, or a class built on it, in the bases of a class: its steps are ``ZOOptimizer.step``.

    The loop, with all that hangs on it, is Trainer's. A step happens in the ``training_step`` of the last micro-batch
    of an accumulation window: each evaluation is Trainer's own ``training_step`` over all micro-batches of the
    window, without the backward, so losses are weighted as Trainer weights them. What it logs is the step's loss.
    """

    args: Any
    optimizer: Any
    _window: list[Any]  # micro-batches of this step

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's; refuses several devices in one process, and turns backward and what averages gradients off."""
        if not isinstance(self.args, ZOArguments):
            raise TypeError(f"args: expected ZOTrainingArguments, got {type(self.args).__name__}")
        super().create_accelerator_and_postprocess()
        if (n := self.args.n_gpu) > 1:
            raise ValueError(
                f"{type(self).__name__}: expected one device a process, got {n}: start a process for each (torchrun, accelerate "
                "launch), or one with CUDA_VISIBLE_DEVICES=0"
            )
        self.accelerator.backward = lambda loss, **kwargs: None
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)  # not in DDP

    def create_optimizer(self, model: Any = None) -> ZOOptimizer:
        """The method that the arguments name, over all that requires a gradient, unless an optimizer was given."""
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
            options["processes"] = Parallel() if self.accelerator.num_processes > 1 else None
            options |= args.zo_options or {}
            self.optimizer = optimizer_class(args.zo_method)(model, lr=lr, **options)
        if not isinstance(optimizer := self.zo_optimizer, ZOOptimizer):
            raise TypeError(f"optimizers: expected an optimizer of zo_core, got {type(optimizer).__name__}")
        if (n := self.accelerator.num_processes) > 1 and (
            optimizer.processes is None or optimizer.processes.grid() != (n, 1)
        ):
            raise ValueError(
                f"processes: expected zo_core.distributed.Parallel(), as each of {n} processes gets rows of its own from "
                f"Trainer, got {optimizer.processes}"
            )
        optimizer.step = MethodType(_step, optimizer)  # type: ignore[method-assign]
        return optimizer

    @property
    def zo_optimizer(self) -> ZOOptimizer:
        """The optimizer, without what accelerate puts around it."""
        return getattr(self.optimizer, "optimizer", self.optimizer)  # type: ignore[no-any-return]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        """As Trainer's; the micro-batches are kept for the step."""
        self._window, items = super().get_batch_samples(*args, **kwargs)
        return self._window, items

    def training_step(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The step, and its loss, at the window's last micro-batch; before that, zero."""
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        evaluate = super().training_step

        def closure() -> Tensor:
            losses = [evaluate(model, inputs, num_items_in_batch) for inputs in self._window]
            if losses[0].element_size() < 4:
                warn(
                    f"the model computes its loss in {losses[0].dtype}, too few digits for a difference of losses: "
                    "give compute_loss_func (docs/integrations.md)",
                )
            return torch.stack(losses).float().sum()

        return self.zo_optimizer.step(closure)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to log."""


class ZOTrainer(ZOMixin, Trainer):  # type: ignore[misc]
    """Trainer with zeroth-order steps; takes ZOTrainingArguments, and otherwise what Trainer takes."""
