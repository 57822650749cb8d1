"""The baselines: what published MeZO and FZOO do to the weights, operation by operation, with the same torch calls.

MeZO (Malladi et al., 2023): a fresh normal tensor in the weights' dtype from the global generator, scaled, added,
for three perturbations; drawn once more for the update. FZOO: the same with random signs, one update a probe.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def normal(p: Tensor) -> Tensor:
    """Z as MeZO makes it."""
    return torch.normal(mean=0, std=1, size=p.size(), device=p.device, dtype=p.dtype)


def signs(p: Tensor) -> Tensor:
    """Z as FZOO makes it."""
    return torch.randint(0, 2, size=p.size(), device=p.device, dtype=p.dtype) * 2 - 1


DRAW = {"gaussian": normal, "rademacher": signs}


def reseed(seed: int) -> None:
    """The published way replays noise through the global generator."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)


def perturb(
    params: Iterable[Tensor], seed: int, scale: float, eps: float, draw: Callable[[Tensor], Tensor] = normal
) -> None:
    """Theta <- theta + scale * z * eps, each tensor replaced by a new one."""
    reseed(seed)
    for p in params:
        p.data = p.data + scale * draw(p) * eps


def update(
    params: Iterable[Tensor],
    seed: int,
    lr: float,
    g: float,
    draw: Callable[[Tensor], Tensor] = normal,
    decay: float = 0.0,
) -> None:
    """Theta <- theta - lr * (g * z + decay * theta)."""
    reseed(seed)
    for p in params:
        z = draw(p)
        p.data = p.data - lr * (g * z + decay * p.data) if p.ndim > 1 else p.data - lr * (g * z)


def mezo_step(params: list[Tensor], loss: Callable[[], Tensor], seed: int, lr: float, eps: float) -> float:
    """One step: perturb, forward, perturb back through zero, forward, restore, update."""
    perturb(params, seed, 1, eps)
    first = loss()
    perturb(params, seed, -2, eps)
    g = ((first - loss()) / (2 * eps)).item()
    perturb(params, seed, 1, eps)
    update(params, seed, lr, g)
    return float(first)
