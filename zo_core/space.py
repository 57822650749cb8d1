"""The trainable tensors of an optimizer as one space: names, ids in the noise, and the pass over all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bindings import ops

Probe = Tensor  # int64 (1,): a stream number, on the device of the weights; a probe is known by its identity


@dataclass
class ParamSpace:
    """T tensors, numbered in order, and the noise that runs through them."""

    names: list[str]
    tensors: list[Tensor]
    seed: int
    distribution: str
    counters: Tensor  # int64 (2,): no-op passes, saturated elements

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
            seed=ops.signed64(self.seed),
            distribution=self.distribution,
            counters=self.counters,
            decay=decay,
            update=update,
        )

    def full(self, c: float) -> Tensor:
        """A row of coefficients: c for every tensor, float32 (1, T)."""
        return torch.full((1, len(self.tensors)), c, device=self.counters.device)
