"""Momentum without a tensor of the weights' size: the noise of past steps is made again, only coefficients are kept.

A step's estimate, sum_k c_k z_k over n probes, is n numbers and n stream numbers. So the momentum of the last h steps,

    m = sum over i = 0 .. h-1 of beta^i * (the estimate of i steps ago),

is a sum over h n streams, which the one pass of the update makes as it makes a sum over n. AdaMeZO's second moment is such a
sum too, of the squares of coefficients and of noise. A step that was skipped counts, with coefficients of zero.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ..estimators import Estimate
from ..record import Past


@lru_cache(64)
def _powers(beta: float, counts: tuple[int, ...], device: torch.device) -> Tensor:
    """beta^i of each probe, float32: of steps with so many probes each, the last of which is this one, i = 0."""
    last = len(counts) - 1
    return torch.tensor(
        [beta ** (last - step) for step, n in enumerate(counts) for _ in range(n)], dtype=torch.float32, device=device
    )


def with_past(found: Estimate, past: Past, momentum: float, beta2: float | None) -> Estimate:
    """An estimate that goes along the probes of earlier steps as well, oldest first.

    Args:
        found: this step's estimate.
        past: the steps before it that count.
        momentum: beta, by whose powers their coefficients are multiplied.
        beta2: the same for their squares, which weigh z^2 in the second moment; None for none.
    """
    if not past.steps and beta2 is None:
        return found
    counts = (*(n for n, _ in past.steps), len(found.probes))
    every = torch.cat((past.coeffs, found.coeffs.float()))
    curvature = found.curvature
    if curvature is not None:  # a Hessian learns from the probes of this step alone
        curvature = torch.cat((curvature.new_zeros(len(past.coeffs)), curvature))
    return found._replace(
        probes=[*torch.split(past.streams, 1), *found.probes],
        coeffs=every * _powers(momentum, counts, every.device),
        curvature=curvature,
        squares=None if beta2 is None else every.square() * _powers(beta2, counts, every.device),
    )
