"""The papers' way: the weights are written to be probed, in one fused pass where they walk to and fro."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ..space import ParamSpace, Probe
from .base import uninterrupted


class InPlaceEngine:
    """Evaluates at theta + c z by adding to theta; the way back is fused into whatever comes next.

    For closures that are arbitrary functions of the parameters. MeZO's step is three passes: to +eps z, on to
    -eps z, and restore and update together. Going back rounds, in the precision of the weights and their residuals:
    float32 returns to within an ulp, 16-bit weights without a residual drift (docs/precision.md).
    """

    def __init__(self, space: ParamSpace) -> None:
        self.space = space
        self.at: tuple[Probe, Tensor] | None = None  # theta + row z is in the weights, row of (1, T) coefficients

    def evaluate(
        self, closure: Callable[[], Tensor], c: float, probe: Probe | None, leave_out: Collection[int] = ()
    ) -> Tensor:
        """The closure's result at theta + c z(probe), z = 0 in tensors left out; at theta without a probe."""
        self._move((probe, self.space.full(c, leave_out)) if probe is not None and c != 0 else None)
        return closure()

    def restore(self) -> None:
        """Go back to theta."""
        self._move(None)

    def _move(self, to: tuple[Probe, Tensor] | None) -> None:
        steps = [(probe, sign * row) for sign, place in ((-1, self.at), (1, to)) if place for probe, row in [place]]
        if len(steps) == 2 and steps[0][0] is steps[1][0]:
            steps = [(steps[0][0], steps[0][1] + steps[1][1])]
        with uninterrupted():
            if steps:
                self.space.update_([p for p, _ in steps], torch.cat([row for _, row in steps]))
            self.at = to

    def update(self, probes: Sequence[Probe], coeffs: Tensor, decay: Tensor, update: Tensor | None) -> None:
        """Theta <- (1 - decay) theta + sum_k coeffs[k] z_k, restored and updated in one pass.

        Args:
            probes: K streams.
            coeffs: float32 (K, T).
            decay: float32 (T,).
            update: stream of the stochastic rounding, or None for nearest.
        """
        if self.at is not None:
            probe, row = self.at
            back = (decay - 1) * row
            found = [k for k, p in enumerate(probes) if p is probe]
            if found:
                coeffs = coeffs.index_add(0, torch.tensor(found, device=coeffs.device), back)
            else:
                probes, coeffs = [*probes, probe], torch.cat([coeffs, back])
        with uninterrupted():
            self.space.update_(probes, coeffs, decay, update)
            self.at = None

    def memory(self) -> dict[str, int]:
        """Nothing."""
        return {}
