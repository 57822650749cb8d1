"""What methods make of losses: where a step evaluates, and the numbers that come of it."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .space import Probe

Losses = Callable[[Sequence[tuple[float, Probe | None]]], Tensor]
"""losses([(c, probe), ...]) is the loss at theta + c z(probe) for each point, (n,); (0.0, None) is theta itself."""


class Estimate(NamedTuple):
    """Where a step goes: theta <- theta - lr sum_k coeffs[k] z_k, and H <- (1 - a + sum_k curvature[k] z_k^2) H."""

    probes: list[Probe]
    coeffs: Tensor  # (K,)
    loss: Tensor  # of the step, 0-dimensional
    curvature: Tensor | None = None  # (K,); only Hessian scaling asks for it
    carry: Tensor | None = None  # (n,), what the next step is to find in ``self.carry``


def carried(before: Tensor, now: Tensor | None, moved: Tensor | bool) -> Tensor:
    """What the step after one finds in ``self.carry``: of a step that did not move the weights, what there was before."""
    if now is None:
        return before
    return torch.where(torch.as_tensor(moved), now, before if len(before) == len(now) else now * math.nan)


def both_sides(losses: Losses, probes: Sequence[Probe], eps: float, clean: bool = False) -> tuple[Tensor, ...]:
    """Losses l+ and l- at theta + eps z_k and theta - eps z_k, (n,) each; before them l0 at theta, (), if clean."""
    points: list[tuple[float, Probe | None]] = [(c, probe) for probe in probes for c in (eps, -eps)]
    found = losses([(0.0, None), *points] if clean else points)
    plus, minus = found[int(clean) :].view(-1, 2).unbind(1)
    return (found[0], plus, minus) if clean else (plus, minus)


def one_side(losses: Losses, probes: Sequence[Probe], eps: float) -> tuple[Tensor, Tensor]:
    """Losses l0 at theta, (), and l_k at theta + eps z_k, (n,)."""
    found = losses([(0.0, None), *((eps, probe) for probe in probes)])
    return found[0], found[1:]


def second_order(losses: Losses, probes: Sequence[Probe], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """l0, the projected gradients (l+ - l-) / (2 eps) and curvatures |l+ + l- - 2 l0| / eps^2 along n probes, (n,)."""
    clean, plus, minus = both_sides(losses, probes, eps, clean=True)
    return clean, (plus - minus) / (2 * eps), (plus + minus - 2 * clean).abs() / eps**2
