"""MEAZO: a step size that adapts by one number (Dbouk et al., 2026, arXiv:2605.03869)."""

from typing import Unpack

import torch
from torch import Tensor

from ..estimators import Estimate, Losses, both_sides, running_mean
from .base import ZOOptimizer
from .options import Options, Params, Shared


class MEAZO(ZOOptimizer):
    """theta <- theta - lr / (sqrt(v / (1 - beta^t)) + zeta) 1/n sum_k g_k z_k - lr weight_decay theta.

    v <- beta v + (1 - beta) (1/n sum_k g_k)^2 in step t = 1, 2, ..., v = 0 at first, with g_k = (l+ - l-) / (2 eps) as in
    ``MeZO``. So a step has about the length lr in each coordinate whatever the scale of the losses, as in Adam, whose second
    moment this is for all weights together. (Moments of single coordinates were found to bring nothing here, as each of them
    sees little but noise.) v and 1 - beta^t are all the state there is. A step takes 2n evaluations and returns the mean of their losses.

    Args:
        params: as in ``ZOOptimizer``, and so are all other arguments.
        lr: learning rate.
        beta: how much of v is kept, in [0, 1).
        zeta: added to the root.
        options: of ``ZOOptimizer``.
    """

    beta, zeta = Shared(0.0, 1 - 2**-20), Shared(0.0, 1e30)

    def __init__(
        self, params: Params, *, lr: float | Tensor, beta: float = 0.99, zeta: float = 1e-8, **options: Unpack[Options]
    ) -> None:
        super().__init__(params, lr=lr, method={"beta": beta, "zeta": zeta}, **options)

    def estimate(self, losses: Losses) -> Estimate:
        """Central differences over the root of the second moment of their mean."""
        probes = self.draw(self.probes)
        plus, minus = both_sides(losses, probes, self.eps)
        gradients = (plus - minus) / (2 * self.eps)
        moment, carry = running_mean(self.carry, gradients.mean().square(), self.beta)
        divisor = moment.sqrt() + self.zeta
        return Estimate(probes, gradients / (len(probes) * divisor), torch.cat((plus, minus)).mean(), carry=carry)
