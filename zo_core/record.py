"""The plain data of a step: the optimizer fills it, the journal writes it, the processes compare it.

It imports none of them, so that imports go one way.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # of trained tensors


class TensorInfo(NamedTuple):
    """A trained tensor; ``rates`` says which of a record's pairs of learning rate and decay are its own."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    rates: int


class Identity(NamedTuple):
    """What an optimizer is from its first step to its last."""

    method: str
    seed: int
    distribution: str
    rank: int  # of factored noise, 1 of other
    residual: int  # bits, 0 for none
    hessian: str  # one of scaling.KINDS, "" for none
    engine: str
    tensors: tuple[TensorInfo, ...]

    @property
    def rates(self) -> list[int]:
        """For each kind of rates, the number of the first tensor that has them."""
        numbers = [t.rates for t in self.tensors]
        return [numbers.index(kind) for kind in range(1 + max(numbers))]


class Record(NamedTuple):
    """One step: theta <- (1 - decay) theta - lr sum_k coeffs[k] z(stream + k), with lr and decay of each tensor's group.

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


class Progress(NamedTuple):
    """Where a run stands after some of its steps."""

    stream: int  # of the next probe
    updates: int
    skipped: int
    carry: Tensor


class Snapshot(NamedTuple):
    """What must be the same in all processes of a run, between two steps."""

    facts: dict[str, Any]  # options and state, by the name that an error gives them
    names: list[str]  # of the tensors
    weights: list[tuple[int, int]]  # of each: which of its elements are here, and a checksum of them


def carried(before: Tensor, now: Tensor | None, moved: Tensor | bool) -> Tensor:
    """What the step after one finds in ``optimizer.carry``: of a step that did not move the weights, what there was before."""
    if now is None:
        return before
    return torch.where(torch.as_tensor(moved), now, before if len(before) == len(now) else now * math.nan)
