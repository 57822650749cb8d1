"""The options of optimizers, and the checks of their values."""

import operator
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from .. import layers, scaling
from ..bindings import ops
from ..distributed import Parallel
from ..engines import ENGINES
from ..kernels.reference import DISTRIBUTIONS
from ..scales import Scales

Params = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class Options(TypedDict, total=False):
    """The options that all methods take, beside ``params``, ``lr`` and options of their own; see ``ZOOptimizer``."""

    eps: float
    weight_decay: float
    probes: int | None
    seed: int
    distribution: str | None
    rank: int
    rho: float | None
    blocks: layers.Blocks | None
    hessian: str | None
    momentum: float | None
    window: int | None
    stochastic_rounding: bool
    residual: int | None
    engine: str | None
    points_at_once: int | None
    module: nn.Module | None
    processes: Parallel | None
    scales: Scales | None
    normalize_scales: bool


class Shared:
    """An option that all groups share, a number in a range; it may be set anew between steps, in ``param_groups[0]``."""

    def __init__(self, least: float, most: float, kind: type = Real) -> None:
        self.least, self.most, self.kind = least, most, kind

    def __set_name__(self, owner: type, name: str) -> None:
        """Take the attribute's name."""
        self.name = name

    def __get__(self, optimizer: Any, owner: type) -> Any:
        """The number; this object where there is no optimizer."""
        return self if optimizer is None else optimizer.param_groups[0][self.name]

    def check(self, value: object) -> None:
        """ValueError, TypeError unless it is such a number."""
        if isinstance(value, Real) and not isinstance(value, self.kind):
            raise ValueError(f"{self.name}: expected an integer, got {value!r}")
        _in_range(self.name, value, self.least, self.most)


def check_choices(
    *,
    seed: int,
    distribution: str,
    rank: int,
    residual: int | None,
    engine: str | None,
    points_at_once: int | None,
    hessian: str | None,
    curvature: bool,
) -> None:
    """ValueError unless each of these options is one of its choices; ``curvature``: whether the method measures it."""
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution: expected one of {list(DISTRIBUTIONS)}, got {distribution!r}")
    if not isinstance(rank, Integral):
        raise TypeError(f"rank: expected an integer, got {rank!r}")
    ops.check_rank(distribution, int(rank))
    if residual not in (None, 8, 16):
        raise ValueError(f"residual: expected None, 8 or 16 bits, got {residual!r}")
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"engine: expected one of {list(ENGINES)} or None, got {engine!r}")
    if points_at_once is not None and (type(points_at_once) is not int or points_at_once < 1):
        raise ValueError(f"points_at_once: expected a positive integer or None, got {points_at_once!r}")
    if hessian is not None and (hessian not in scaling.KINDS or not curvature):
        which = list(scaling.KINDS) if curvature else "none, as this method measures no curvature"
        raise ValueError(f"hessian: expected {which}, got {hessian!r}; HiZOO and SPSA take one")
    if hessian is not None and distribution == "factored":
        raise ValueError(
            f"distribution: expected 'gaussian' with hessian {hessian!r}, got 'factored': a Hessian learns from z^2, which is 1 "
            "for every element of factored noise of rank 1, as it is of signs"
        )
    try:
        ops.signed64(operator.index(seed))
    except TypeError:
        raise TypeError(f"seed: expected an integer from 0 to 2^64 - 1, got {seed!r}") from None


def named_params(params: Params) -> Any:
    """The parameters in a form that torch's optimizers take. TypeError for those that they would misread."""
    if isinstance(params, str | Mapping) or not isinstance(params, Iterable | nn.Module):
        raise TypeError(
            f"params: expected a module, tensors, (name, tensor) pairs or a list of groups, got a {type(params).__name__}: of a "
            "dict by names pass its items(), of one group a list of it"
        )
    if isinstance(params, nn.Module):
        return [{"params": list(params.named_parameters()), "decay_vectors": False}]
    return params


def check_group(group: Mapping[str, Any], shared: Sequence[Shared]) -> None:
    """ValueError, TypeError unless the numbers of a group are in their ranges."""
    rate = group["lr"]
    if isinstance(rate, Tensor) and rate.numel() == 1:
        rate = 0.0 if rate.is_cuda else rate.item()  # do not wait for the GPU: a rate that is not finite skips the step
    _in_range("lr", rate)
    _in_range("weight_decay", group["weight_decay"])
    for option in shared:
        option.check(group[option.name])


def rates_of(groups: Sequence[Mapping[str, Any]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Learning rate and lr * weight_decay of each tensor, float32 (T,)."""
    rates = []
    for group in groups:
        lr, wd = group["lr"], group["weight_decay"]
        rates += [(lr, lr * wd if group["decay_vectors"] or p.ndim > 1 else 0.0) for p in group["params"]]
    if any(isinstance(lr, Tensor) for lr, _ in rates):
        columns = [[torch.as_tensor(x, device=device).reshape(()) for x in c] for c in zip(*rates, strict=True)]
        return torch.stack(columns[0]).float(), torch.stack(columns[1]).float()
    both = torch.tensor(rates, dtype=torch.float32, device=device)
    return both[:, 0], both[:, 1]


def _in_range(name: str, value: object, least: float = 0.0, most: float = sys.float_info.max) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not least <= float(value) <= most:
        bounds = f"of at least {least:g}" if most == sys.float_info.max else f"from {least:g} to {most:g}"
        raise ValueError(f"{name}: expected a finite number {bounds}, got {value}")
