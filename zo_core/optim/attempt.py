"""All of a step or nothing: what the evaluations change is put back, unless the step has been done."""

from typing import Any

import torch

from .. import sharding
from ..closure import forget_casts
from ..engines.base import uninterrupted
from ..weights import versions_of
from .points import StepLosses
from .tensors import Tensors


class Attempt:
    """The evaluations of a step, or of a trial, which is no step. On leaving it everything is as before unless ``done`` is set.

    That is the weights, the numbers of streams and the counters of the optimizer, torch's generators and the module's buffers. The
    in-place engine goes back to the weights by arithmetic, which rounds.

    Args:
        optimizer: whose weights are evaluated.
        losses: what evaluates them.
        exact: also with the in-place engine the weights are to be the same to the bit; takes a copy of them in the host's memory.
    """

    def __init__(self, optimizer: Tensors, losses: StepLosses, exact: bool) -> None:
        self.optimizer, self.losses, self.engine = optimizer, losses, losses.engine
        self.rows, self.done = self.engine.rows, False
        own: dict[str, Any] = optimizer._own
        self.before = [(own[name], own[name].clone()) for name in ("stream", "counters")]
        if exact and self.engine.writes_weights:
            kept = (*self.engine.space.tensors, *self.engine.space.residuals)
            self.before += [(t.detach(), t.detach().to("cpu", copy=True)) for t in kept]

    def __enter__(self) -> StepLosses:
        """What evaluates the losses."""
        self.optimizer._stepping = True  # the last thing, so that no signal comes between this and the block
        return self.losses

    def __exit__(self, *_: object) -> None:
        """Put back what has to be; a signal that was held back until the step was done changes nothing."""
        optimizer = self.optimizer
        try:
            if not self.done:
                with uninterrupted(), torch.no_grad():
                    self.engine.restore()
                    self.engine.rows = self.rows
                    for tensor, value in self.before:
                        tensor.copy_(value)
                    self.losses.evaluation.rewind()
                    self.losses.evaluation.buffers.put_back()
        finally:
            optimizer._stepping = False
            forget_casts()
            sharding.reshard(optimizer._units)
            optimizer._versions = versions_of(optimizer._tensors())
