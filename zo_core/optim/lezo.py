"""LeZO: layer-wise sparse MeZO (Wang et al., 2024, arXiv:2410.09823)."""

from typing import Any, ClassVar

from .mezo import MeZO


class LeZO(MeZO):
    """MeZO that leaves out a fraction ``rho`` of the transformer blocks, chosen anew each step.

    floor(rho n) of n blocks, uniformly without replacement, a function of seed and step; they are neither perturbed
    nor updated, and no pass touches them. All else always trains: embeddings, head, final norm. Published: rho 0.75.
    Arguments as in ``ZOOptimizer``, whose every method takes ``rho`` and ``blocks``; this one needs a module.
    """

    _default: ClassVar[dict[str, Any]] = {**MeZO._default, "rho": 0.75}
