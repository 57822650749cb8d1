"""AdaMeZO: Adam-style zeroth-order steps without tensors of moments (2026, arXiv:2605.00650)."""

import math
from typing import Any, ClassVar, Unpack

from torch import Tensor

from .mezo import MeZO
from .options import Options, Params, Shared


class AdaMeZO(MeZO):
    """MeZO over the root of a second moment; both moments are made of the scalars and the noise of the last ``window`` steps.

    With g_i and z_i those of i steps ago, i = 0 .. h-1, and h = ``window``,

        m = sum_i momentum^i g_i z_i,    v = sum_i beta2^i g_i^2 z_i^2,
        theta <- theta - lr (m / (sqrt(v) + 1e-5) + weight_decay theta),

    without correction of the bias, as released. ``lr`` is about the size of a step in each coordinate, as Adam's. Of n probes
    a step, each counts with its share g / n in both sums. A step takes 2n evaluations and returns the mean of their losses.

    z is Gaussian, as published. Where z^2 is 1 (random signs, and factored noise of rank 1) v is one number for all elements
    of a tensor: the step is then MeZO's with momentum, over the size of its last gradients.

    Args:
        params: as in ``ZOOptimizer``, and so are all other arguments.
        lr: learning rate.
        beta2: decay of the second moment, in [0, 1); that of the first is ``momentum``, here 0.7.
        options: of ``ZOOptimizer``.

    Raises:
        ValueError: also for factored noise of a rank above 1, whose squares are neither 1 nor made by the pass.
    """

    _default: ClassVar[dict[str, Any]] = {**MeZO._default, "momentum": 0.7}
    beta2 = Shared(0.0, math.nextafter(1.0, 0.0))

    def __init__(self, params: Params, *, lr: float | Tensor, beta2: float = 0.9, **options: Unpack[Options]) -> None:
        if (rank := options.get("rank", 1)) != 1:
            raise ValueError(
                f"rank: expected 1, got {rank!r}: AdaMeZO's second moment takes Gaussian noise, or noise whose square is 1"
            )
        super().__init__(params, lr=lr, method={"beta2": beta2}, **options)
