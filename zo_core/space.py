"""The trainable tensors of an optimizer as one space: names, ids in the noise, and the passes over them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .bindings import ops

Probe = Tensor  # int64 (1,): a stream number, on the device of the weights; a probe is known by its identity


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of these names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass
class ParamSpace:
    """T tensors, numbered in order, and the noise that runs through them."""

    names: list[str]
    tensors: list[Tensor]
    seed: int
    distribution: str
    counters: Tensor  # int64 (1 + T,): no-op passes, saturated elements of each tensor
    residuals: list[Tensor] = field(default_factory=list)  # low-order bits of 16-bit tensors, or empty

    def update_(
        self, probes: Sequence[Probe], coeffs: Tensor, decay: Tensor | None = None, update: Tensor | None = None
    ) -> None:
        """Theta <- round((1 - decay) theta + sum_k coeffs[k] z_k), one fused pass over all tensors, in place.

        Args:
            probes: K streams.
            coeffs: float32 (K, T).
            decay: float32 (T,).
            update: stream of the stochastic rounding of 16-bit tensors; None rounds to nearest.
        """
        torch.ops.zo_core.update_(
            self.tensors,
            [],
            list(range(len(self.tensors))),
            [],
            torch.cat(list(probes)) if probes else torch.empty(0, dtype=torch.int64, device=coeffs.device),
            coeffs,
            counters=self.counters,
            decay=decay,
            update=update,
            residuals=self.residuals or None,
            **self._noise(),
        )

    def perturb(
        self, which: Sequence[int], sources: list[Tensor], out: list[Tensor], probe: Probe, coeffs: Tensor,
        counters: Tensor,
    ) -> None:  # fmt: skip
        """Out <- round(theta + coeffs z(probe)), of n of the tensors, which are only read.

        Args:
            which: their numbers.
            sources: their values (``tensors``, under whatever name).
            out: n tensors of their shapes, of any of the three dtypes.
            probe: the stream.
            coeffs: float32 (1, n).
            counters: int64 (1 + n,).
        """
        residuals = [self.residuals[i] for i in which] if self.residuals else []
        ops.backend_for(probe.device).run_pass(  # what torch.ops.zo_core.perturb calls when it has checked all of this
            sources, out, [], which, [], probe, coeffs, counters=counters, residuals=residuals, seed=self.seed,
            distribution=self.distribution,
        )  # fmt: skip

    def perturb_rows(
        self, i: int, source: Tensor, rows: Tensor, out: Tensor, probe: Probe, coeffs: Tensor, counters: Tensor
    ) -> None:
        """As ``perturb``, of the rows (int64, (n,)) of one matrix, into the n rows of ``out``; rows are not checked."""
        residual = self.residuals[i] if self.residuals and self.residuals[i].numel() else None
        torch.ops.zo_core.perturb_rows(
            source, rows, out, i, 0, probe, coeffs, counters=counters, residual=residual, **self._noise()
        )

    def full(self, c: float, leave_out: Collection[int] = ()) -> Tensor:
        """A row of coefficients: c for every tensor but those left out, float32 (1, T)."""
        row = torch.full((1, len(self.tensors)), c, dtype=torch.float32, device=self.counters.device)
        if leave_out:
            row[0, list(leave_out)] = 0.0
        return row

    def _noise(self) -> dict[str, Any]:
        return {"seed": ops.signed64(self.seed), "distribution": self.distribution}
