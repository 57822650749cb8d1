"""1.5-SPSA: simultaneous perturbation with weights from the curvature along each probe."""

from typing import Any, ClassVar, Unpack

from torch import Tensor

from ..estimators import Estimate, Losses, second_order
from .base import ZOOptimizer
from .options import Options, Params, Shared


class SPSA(ZOOptimizer):
    """theta <- theta - lr / n sum_i w_i g_i u_i - lr weight_decay theta, w_i = 1 / max(c_i^alpha, floor).

    g_i = (l+ - l-) / (2 eps) and c_i = |l+ - 2 l_0 + l-| / eps^2 along random signs u_i, i = 1..n = ``probes``: steep
    curved directions count less. Published for few steps of many probes. A step takes 1 + 2n evaluations and
    returns l_0. ``hessian`` scales it as HiZOO's is.

    Args:
        params: as in ``ZOOptimizer``, and so are all other arguments.
        lr: learning rate.
        alpha: power of the curvature, in [0, 1]; 0 is n-SPSA with a clean loss.
        floor: lambda, least divisor.
        smoothing: as in ``HiZOO``, where ``hessian`` is given.
        options: of ``ZOOptimizer``.
    """

    _default: ClassVar[dict[str, Any]] = {**ZOOptimizer._default, "distribution": "rademacher", "probes": 8}
    _measures_curvature = True
    alpha, floor, smoothing = Shared(0.0, 1.0), Shared(1e-30, 1e30), Shared(0.0, 1.0)

    def __init__(
        self,
        params: Params,
        *,
        lr: float | Tensor,
        alpha: float = 0.1,
        floor: float = 1.0,
        smoothing: float = 1e-6,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr=lr, method={"alpha": alpha, "floor": floor, "smoothing": smoothing}, **options)

    def estimate(self, losses: Losses) -> Estimate:
        """Projected gradients, each with a weight from its curvature."""
        probes = self.draw(self.probes)
        clean, gradients, curvatures = second_order(losses, probes, self.eps)
        n, weights = len(probes), 1 / curvatures.pow(self.alpha).clamp_min(self.floor)
        return Estimate(probes, weights * gradients / n, clean.mean(), self.smoothing / (2 * n) * curvatures)
