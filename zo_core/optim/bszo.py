"""BSZO: Bayesian subspace zeroth-order optimization (Feng and Huang, 2026, arXiv:2601.01452)."""

from numbers import Integral
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from ..estimators import Estimate, Losses, kept, one_side
from .base import ZOOptimizer
from .options import Options, Params, Shared


class BSZO(ZOOptimizer):
    """theta <- theta - lr sum_k m_k z_k - lr weight_decay theta, with m the posterior mean of the slopes along the probes z_k.

    Slopes are a priori independent, N(0, ``prior``^2), and y_k = (l(theta + eps z_k) - l_0) / eps is the k-th with an error of
    variance r. The n = ``probes`` observations are taken in one after the other, and then ``repeats`` times once more that of the
    probe whose slope is the least certain. Each is a step of Kalman's filter, with p_k the variance of the k-th slope:

        r <- (1 - alpha) r + alpha (y_k - m_k)^2,       at least (noise / 10)^2
        m_k <- m_k + p_k / (p_k + r) (y_k - m_k),       p_k <- p_k r / (p_k + r)

    m = 0 and p = prior^2 at the start of each step, whereas r, ``noise``^2 at first, goes from step to step: where observations
    vary much, steps become small. Published: 2 probes, 1 repeat, eps 1e-4. A step takes 1 + n evaluations, or 2n with a closure
    for each probe, and returns l_0.

    Args:
        params: as in ``ZOOptimizer``, and so are all other arguments.
        lr: learning rate.
        prior: standard deviation of slopes; 0, as in the released code, is the root of the number of millions of weights.
        noise: standard deviation of an observation at first; 0 as for ``prior``.
        alpha: how fast r follows the observations, in [0, 1].
        repeats: how many observations are taken in twice.
        options: of ``ZOOptimizer``.
    """

    _default: ClassVar[dict[str, Any]] = {**ZOOptimizer._default, "probes": 2}
    one_sided = True
    prior, noise, alpha = Shared(0.0, 1e15), Shared(0.0, 1e15), Shared(0.0, 1.0)
    repeats = Shared(0, 1 << 20, Integral)

    def __init__(
        self,
        params: Params,
        *,
        lr: float | Tensor,
        prior: float = 0.0,
        noise: float = 0.0,
        alpha: float = 0.1,
        repeats: int = 1,
        **options: Unpack[Options],
    ) -> None:
        method = {"prior": prior, "noise": noise, "alpha": alpha, "repeats": repeats}
        super().__init__(params, lr=lr, method=method, **options)

    def estimate(self, losses: Losses) -> Estimate:
        """Kalman's filter over one-sided differences, whose observations are each along one probe."""
        probes = self.draw(self.probes)
        clean, side = one_side(losses, probes, self.eps)
        observed = (side - clean) / self.eps
        of_size = (sum(p.numel() for p in self._parameters()) / 1e6) ** 0.5
        prior, noise = self.prior or of_size, self.noise or of_size
        mean, variance = torch.zeros_like(observed), torch.full_like(observed, prior**2)
        error = kept(self.carry, noise**2).to(observed)[0]  # r, before it is made large enough
        numbers = torch.arange(len(probes), device=observed.device)
        for i in range(len(probes) + self.repeats):
            here = numbers == (i if i < len(probes) else variance.argmax())
            surprise = torch.where(here, observed - mean, 0.0)
            error = (1 - self.alpha) * error + self.alpha * surprise.square().sum()
            r = error.clamp_min((noise / 10) ** 2)
            mean = mean + variance / (variance + r) * surprise
            variance = torch.where(here, variance * r / (variance + r), variance)
        return Estimate(probes, mean, clean.mean(), carry=error.unsqueeze(0))
