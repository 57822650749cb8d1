"""FZOO: fast zeroth-order optimization (Dang et al., 2025, arXiv:2506.09034, algorithm 1)."""

from numbers import Integral
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from ..estimators import Estimate, Losses, one_side, running_mean
from .base import ZOOptimizer
from .options import Options, Params, Shared


class FZOO(ZOOptimizer):
    """theta <- theta - lr / (n s) sum_i (l_i - l_0) u_i - lr weight_decay theta, with s the standard deviation of the l_i.

    l_i = l(theta + eps u_i), l_0 = l(theta), u_i random signs, i = 1..n = ``probes``. The signs of a matrix are by default products
    of signs of its rows and of its columns (``distribution="factored"``), of which the grouped engine evaluates many in one call of
    the closure; "rademacher" gives the independent signs of the paper.

    Dividing by s makes a step's length independent of the losses' scale, so ``lr`` is about the size of a step in each
    coordinate, as Adam's (the paper's is this one times eps). A step takes 1 + n evaluations and returns l_0; one whose s is
    not a positive finite number is skipped and counted. With a closure for each probe there is an l_0 of each, so 2n
    evaluations, and s is the standard deviation of the l_i - l_0,i: that of the l_i would be mostly the difference between batches.

    As each step has the same length, a batch of few examples that are all easy moves the weights as far as one whose gradient is
    large. With ``beta`` s^2 is the mean of the steps' variances, s_t^2 = (beta v + (1 - beta) var_t) / (1 - beta^t), so that steps
    are in proportion to their batches' gradients again; it is not in the paper.

    Args:
        params: as in ``ZOOptimizer``, and so are all other arguments.
        lr: learning rate.
        reuse: FZOO-R: s over this step's losses and those of the step before, so that half as many probes serve. Give all
            steps one closure, or all of them a list.
        beta: how much of the variance before a step is kept, in [0, 1); 0 is FZOO as published. Not with ``reuse``.
        options: of ``ZOOptimizer``; ``probes`` at least 2.

    Raises:
        ValueError: also for less than 2 probes, of which there is no standard deviation.
    """

    _default: ClassVar[dict[str, Any]] = {**ZOOptimizer._default, "distribution": "factored", "probes": 8}
    one_sided = True
    probes = Shared(2, 1 << 20, Integral)
    reuse, beta = Shared(0, 1, Integral), Shared(0.0, 1 - 2**-20)

    def __init__(
        self, params: Params, *, lr: float | Tensor, reuse: bool = False, beta: float = 0.0, **options: Unpack[Options]
    ) -> None:
        _check(reuse, beta)
        super().__init__(params, lr=lr, method={"reuse": int(reuse), "beta": beta}, **options)

    def estimate(self, losses: Losses) -> Estimate:
        """One-sided differences over the unbiased standard deviation of the losses (equations 3 and 4 of the paper)."""
        _check(self.reuse, self.beta)  # which may come of a state, or have been set since
        probes = self.draw(self.probes)
        clean, side = one_side(losses, probes, self.eps)
        varying = side - clean if losses.spread else side
        among = torch.cat((varying, self.carry)) if self.reuse else varying  # NaN where there was no earlier step
        known = among.isnan().logical_not().sum()
        variance, carry = (among - among.nanmean()).square().nansum() / (known - 1), varying
        if self.beta:
            variance, carry = running_mean(self.carry, variance, self.beta)
        coeffs = (side - clean) / (len(probes) * variance.sqrt())
        return Estimate(probes, coeffs, clean.mean(), carry=carry if self.reuse or self.beta else None)


def _check(reuse: float, beta: float) -> None:
    """ValueError for both options at once: each keeps something of its own for the next step."""
    if reuse and beta:
        raise ValueError(
            f"beta: expected 0 with reuse=True, which takes the step before in its own way, got {beta}: give one of the two"
        )
