"""What methods compute from losses: the points where a step evaluates, and the coefficients that follow from the losses."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .weights import Point, Probe, Update


class Losses(Protocol):
    """What a step evaluates: the loss at theta + c z(probe) for a point (c, probe); (0.0, None) is theta itself."""

    spread: bool  # whether each probe has a closure of its own, not one for all

    def __call__(self, sets: Sequence[Sequence[Point]]) -> Tensor:
        """Losses at sets of as many points each, (sets, points): one set for each closure."""
        ...


class Estimate(NamedTuple):
    """Where a step goes: theta <- theta - lr sum_k coeffs[k] z_k, and H <- (1 - a + sum_k curvature[k] z_k^2) H."""

    probes: list[Probe]
    coeffs: Tensor  # (K,)
    loss: Tensor  # of the step, 0-dimensional
    curvature: Tensor | None = None  # (K,); only Hessian scaling asks for it
    carry: Tensor | None = None  # (n,), what the next step is to find in ``self.carry``
    squares: Tensor | None = None  # (K,), with them each element is divided by sqrt(sum_k squares[k] z_k^2) + 1e-5


def update_of(
    found: Estimate, lr: Tensor, decay: Tensor, scales: Tensor, applied: Tensor, smoothing: float | None
) -> Update:
    """Theta <- (1 - decay) theta - lr sum_k coeffs[k] sigma z_k, or nothing if the loss or another number is not finite.

    Args:
        found: where the step goes.
        lr: float32 (T,), learning rate of each tensor.
        decay: float32 (T,), learning rate times weight decay.
        scales: float32 (1, T), sigma of each tensor; 0 where the step does not move it.
        applied: bool (K, T), whether each probe was applied to each tensor.
        smoothing: of the Hessian, or None for no Hessian.
    """
    rows, numbers = {"coeffs": found.coeffs.float().unsqueeze(1) * -lr * scales}, {"decay": decay}
    if smoothing is not None and found.curvature is not None:
        rows["curvature"] = found.curvature.float().unsqueeze(1)
        numbers["smoothing"] = torch.full_like(decay, smoothing)
    if found.squares is not None:
        rows["squares"] = found.squares.unsqueeze(1)
    every = [found.loss, *rows.values(), *numbers.values()]
    usable = torch.stack([x.isfinite().all() for x in every]).all()
    moves = usable & (scales != 0)
    rows = {name: torch.where(moves & applied, x, 0.0) for name, x in rows.items()}
    return Update(usable, **rows, **{name: torch.where(moves[0], x, 0.0) for name, x in numbers.items()})


def both_sides(losses: Losses, probes: Sequence[Probe], eps: float) -> tuple[Tensor, Tensor]:
    """Losses l+ and l- at theta + eps z_k and theta - eps z_k, (n,) each."""
    plus, minus = _along(losses, probes, eps, -eps)
    return plus, minus


def one_side(losses: Losses, probes: Sequence[Probe], eps: float) -> tuple[Tensor, Tensor]:
    """l0 at theta, and l_k at theta + eps z_k, (n,); l0 is (1,), or (n,) where each probe has a closure of its own."""
    clean, side = _along(losses, probes, eps, clean=True)
    return clean, side


def second_order(losses: Losses, probes: Sequence[Probe], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """l0 as of ``one_side``; projected gradients (l+ - l-) / (2 eps) and curvatures |l+ + l- - 2 l0| / eps^2, (n,)."""
    clean, plus, minus = _along(losses, probes, eps, -eps, clean=True)
    return clean, (plus - minus) / (2 * eps), (plus + minus - 2 * clean).abs() / eps**2


def kept(carry: Tensor, *start: float) -> Tensor:
    """What the last step that moved the weights left for this one, (n,), or these n numbers where there was none."""
    first = torch.tensor(start, dtype=carry.dtype, device=carry.device)
    return first if len(carry) != len(start) else torch.where(carry.isnan(), first, carry)


def running_mean(carry: Tensor, now: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The mean over steps of a number, (), in which a step counts beta times as much as the next; and what to carry for it, (2,)."""
    both = torch.stack((now, torch.ones_like(now)))
    sums = beta * kept(carry, 0.0, 0.0).to(both) + (1 - beta) * both  # of the numbers, and of their weights: 1 - beta^t
    return sums[0] / sums[1], sums


def _along(losses: Losses, probes: Sequence[Probe], *cs: float, clean: bool = False) -> tuple[Tensor, ...]:
    """Losses at theta, if clean, for each closure; at theta + c z_k for each c, (n,)."""
    first: list[Point] = [(0.0, None)] if clean else []
    sets = [[probe] for probe in probes] if losses.spread else [probes]
    found = losses([[*first, *((c, probe) for probe in some for c in cs)] for some in sets])
    sides = found[:, len(first) :].reshape(-1, len(cs)).unbind(1)
    return (found[:, 0], *sides) if clean else sides
