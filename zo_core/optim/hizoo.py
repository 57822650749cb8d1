"""HiZOO: Hessian-informed zeroth-order optimization (Zhao et al., 2024, arXiv:2402.15173, algorithm 1)."""

from typing import Any, ClassVar, Unpack

from torch import Tensor

from ..estimators import Estimate, Losses, second_order
from .base import ZOOptimizer
from .options import Options, Params, Shared


class HiZOO(ZOOptimizer):
    """MeZO in the metric of a diagonal Hessian H, which it learns from the curvature along its probes.

    With l+-  = l(theta +- eps H^-1/2 z), D = l+ + l- - 2 l(theta) and a = ``smoothing``,

        H     <- clamp((1 - a) H + a |D| / (2 eps^2) H z^2),                 H = 1 at first
        theta <- theta - lr ((l+ - l-) / (2 eps) H^-1/2 z + weight_decay theta),   with the new H

    averaged over ``probes``. H is the inverse of the paper's Sigma, in float32, in ``state_dict``. It learns from z^2, so
    that probes should be Gaussian. A step takes 1 + 2n evaluations and returns l(theta).

    Args:
        params: as in ``ZOOptimizer``, and so are all other arguments.
        lr: learning rate.
        smoothing: a, in [0, 1]; 0 leaves H at 1, which is MeZO.
        options: of ``ZOOptimizer``. ``hessian="factored"`` is HiZOO-L: H of a matrix is the product of a row and a
            column factor (d_out + d_in numbers for d_out x d_in, as Adafactor keeps its second moments).
    """

    _default: ClassVar[dict[str, Any]] = {**ZOOptimizer._default, "hessian": "diagonal"}
    _measures_curvature = True
    smoothing = Shared(0.0, 1.0)

    def __init__(
        self, params: Params, *, lr: float | Tensor, smoothing: float = 1e-6, **options: Unpack[Options]
    ) -> None:
        super().__init__(params, lr=lr, method={"smoothing": smoothing}, **options)

    def estimate(self, losses: Losses) -> Estimate:
        """Projected gradients, and a |D| / (2 eps^2) for H (equations 4 and 5 of the paper)."""
        probes = self.draw(self.probes)
        clean, gradients, curvatures = second_order(losses, probes, self.eps)
        n = len(probes)
        return Estimate(probes, gradients / n, clean.mean(), self.smoothing / (2 * n) * curvatures)
