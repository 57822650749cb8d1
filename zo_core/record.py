"""The data of a step: the optimizer makes it, the journal writes it, and the processes of a run compare it.

This file imports none of them, so that imports go one way.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # of trained tensors


class TensorInfo(NamedTuple):
    """A trained tensor; ``rates`` is the number of its kind: tensors of one kind have the same learning rate and decay."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    rates: int


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The properties of an optimizer that are the same for all its steps."""

    method: str
    seed: int
    distribution: str
    rank: int = 1  # of factored noise
    residual: int  # bits, 0 for none
    hessian: str  # one of scaling.KINDS, "" for none
    engine: str
    tensors: tuple[TensorInfo, ...]
    padding: tuple[tuple[int, int], ...] = ()  # numbers of tensors, and of each the row that no step changes
    scales: tuple[float, ...] = ()  # of each tensor's probe; none where all are 1

    @property
    def rates(self) -> list[int]:
        """For each kind of tensor, the number of the first tensor of that kind."""
        numbers = [t.rates for t in self.tensors]
        return [numbers.index(kind) for kind in range(1 + max(numbers))]


class Record(NamedTuple):
    """One step: theta <- (1 - decay) theta - lr sum_k coeffs[k] sigma z(stream + k), with lr and decay of each tensor's group.

    ``step`` counts from 0, skipped steps too, and is the stream of the stochastic rounding. A step that did not move the
    weights (a loss was not finite) is a record like any other, with whatever numbers there were.
    """

    step: int
    stream: int
    coeffs: np.ndarray  # float32 (K,)
    lr: np.ndarray  # float32, one a kind of rates
    decay: np.ndarray  # float32, lr times weight decay
    moved: bool
    stochastic: bool
    loss: float
    left_out: frozenset[int] = frozenset()  # numbers of tensors that the step left out
    curvature: np.ndarray | None = None  # float32 (K,), of methods that scale by a Hessian
    smoothing: float = 0.0  # float32, with curvature
    carry: np.ndarray | None = None  # float32 or float64 (n,), what the method keeps for its next step
    past: int = 0  # how many of the probes, the first ones, are those of the steps before
    squares: np.ndarray | None = None  # float32 (K,), weights of z_k^2 in the second moment, of methods that have one


class Past(NamedTuple):
    """The probes of the last steps, oldest first, which a later step goes along again (optim/momentum.py)."""

    streams: Tensor  # int64 (P,)
    coeffs: Tensor  # float32 (P,), of -lr when they were new; zero of a step that did not move the weights
    steps: list[tuple[int, list[int]]]  # of each step: how many probes it had, and the tensors it left out

    @classmethod
    def none(cls, device: torch.device) -> "Past":
        """Before the first step."""
        return cls(torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, device=device), [])

    def last(self, steps: int) -> "Past":
        """The last so many steps."""
        kept = self.steps[-steps:] if steps > 0 else []
        first = len(self.coeffs) - sum(n for n, _ in kept)
        return Past(self.streams[first:], self.coeffs[first:], kept)

    def then(self, streams: Tensor, coeffs: Tensor, moved: Tensor | bool, left_out: Collection[int]) -> "Past":
        """And a step with these probes."""
        coeffs = torch.where(torch.as_tensor(moved), coeffs.float(), 0.0)
        step = (len(coeffs), sorted(left_out))
        return Past(torch.cat((self.streams, streams)), torch.cat((self.coeffs, coeffs)), [*self.steps, step])

    def without(self, tensors: Collection[int]) -> "Past":
        """As if these tensors, of which there are none yet, had been left out."""
        return self._replace(steps=[(n, [*left_out, *tensors]) for n, left_out in self.steps])

    def applied(self, more: int, tensors: int) -> Tensor:
        """Bool (P + more, T): whether a probe was applied to a tensor in its step; of ``more`` probes behind these it is true.

        The losses of a step say nothing about what it left out, so that no later step may move that along its probes.
        """
        mask = torch.ones(len(self.coeffs) + more, tensors, dtype=torch.bool, device=self.coeffs.device)
        first = 0
        for n, left_out in self.steps:
            if left_out:
                mask[first : first + n, left_out] = False
            first += n
        return mask


class Progress(NamedTuple):
    """The counters of a run after some of its steps, and what the last of them left for the next one."""

    stream: int  # of the next probe
    updates: int
    skipped: int
    carry: Tensor
    past: Past


class Snapshot(NamedTuple):
    """Values that must be the same in all processes of a run, between two steps."""

    facts: dict[str, Any]  # options and state, by the name that an error gives them
    names: list[str]  # of the tensors
    weights: list[tuple[int, int]]  # of each tensor: which of its elements are here, and a checksum of them


def carried(before: Tensor, now: Tensor | None, moved: Tensor | bool) -> Tensor:
    """The ``optimizer.carry`` after a step: what its estimate left (``now``), or ``before`` if it did not move the weights."""
    if now is None:
        return before
    return torch.where(torch.as_tensor(moved), now, before if len(before) == len(now) else now * math.nan)
