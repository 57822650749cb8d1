"""MeZO: memory-efficient zeroth-order SGD (Malladi et al., 2023, arXiv:2305.17333, algorithm 1)."""

import torch

from ..estimators import Estimate, Losses, both_sides
from .base import ZOOptimizer


class MeZO(ZOOptimizer):
    """theta <- theta - lr (1/n sum_k g_k z_k + weight_decay theta), g_k = (l(theta + eps z_k) - l(theta - eps z_k)) / (2 eps).

    z_k is standard normal as published, or of random signs. ``probes`` is n, published as n-SPSA. The paper's
    recipe for OPT-13B: lr 1e-6 or 1e-7, eps 1e-3, batch 16, one probe. A step takes 2n evaluations and returns
    the mean of their losses. Arguments as in ``ZOOptimizer``.
    """

    def estimate(self, losses: Losses) -> Estimate:
        """The n projected gradients by central differences (definition 1 of the paper)."""
        probes = self.draw(self.probes)
        plus, minus = both_sides(losses, probes, self.eps)
        return Estimate(probes, (plus - minus) / (2 * self.eps * len(probes)), torch.cat((plus, minus)).mean())
