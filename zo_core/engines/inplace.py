"""The published way: a probe is added to the weights; from one probe to the next is a single pass over them."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ..weights import ParamSpace, Probe, Update
from .base import Engine, uninterrupted


class InPlaceEngine(Engine):
    """Evaluates at theta + c z by adding to theta; the way back is fused into whatever comes next.

    For closures that are arbitrary functions of the parameters. MeZO's step is three passes: to +eps z, on to
    -eps z, and restore and update together. Going back rounds, in the precision of the weights and their residuals:
    float32 returns to within an ulp, 16-bit weights without a residual drift (docs/precision.md).
    """

    writes_weights = True

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
        """Give the weights their values theta again."""
        self._move(None)

    def _move(self, to: tuple[Probe, Tensor] | None) -> None:
        steps = [(probe, sign * row) for sign, place in ((-1, self.at), (1, to)) if place for probe, row in [place]]
        if len(steps) == 2 and steps[0][0] is steps[1][0]:
            steps = [(steps[0][0], steps[0][1] + steps[1][1])]
        with uninterrupted():
            if steps:
                self.space.update_([p for p, _ in steps], torch.cat([row for _, row in steps]))
            self.at = to

    def update(self, probes: Sequence[Probe], update: Update, rounding: Tensor | None) -> None:
        """Restore theta and move it in one pass, with ``squares`` in two."""
        coeffs, curvature = update.coeffs, update.curvature
        if update.squares is not None:  # they scale all noise of a pass, and theta + c z was made without a scale
            self.restore()
        back: Tensor | None = None
        if self.at is not None:
            probe, row = self.at
            if not any(p is probe for p in probes):
                nothing = torch.zeros_like(row)
                probes, coeffs = [*probes, probe], torch.cat([coeffs, nothing])
                curvature = torch.cat([curvature, nothing]) if curvature is not None else None
            back = torch.zeros_like(coeffs)
            back[next(k for k, p in enumerate(probes) if p is probe)] = -row[0]
        with uninterrupted():
            self.space.update_(
                probes, coeffs, update.decay, rounding, back, curvature, update.smoothing, update.squares
            )
            self.at = None

    def memory(self) -> dict[str, int]:
        """Nothing: the engine needs no memory beside the weights."""
        return {}
