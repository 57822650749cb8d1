"""The trainable tensors of an optimizer as one space: names, ids in the noise, and the passes over them."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import scaling
from .bindings import ops
from .sharding import Pieces

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
    hessian: str | None = None  # one of scaling.KINDS
    hessians: list[list[Tensor]] = field(default_factory=list)  # of each tensor, where there is one; see ``scaling``
    pieces: Pieces | None = None  # where tensors are shards of larger ones; then only ``update_`` is served

    def __post_init__(self) -> None:
        """Make what passes need of factored Hessians."""
        self._scales: dict[str, Any] = {}
        self._rescale()

    def _rescale(self) -> None:
        with torch.inference_mode(False):
            scales = scaling.of_passes(self.hessians, self.hessian) if self.hessian else {}
        for name, old in self._scales.items():  # where passes that are prepared look for them
            scales[name] = [a.copy_(b) for a, b in zip(old, scales[name], strict=True)]
        self._scales = scales

    def update_(
        self,
        probes: Sequence[Probe],
        coeffs: Tensor,
        decay: Tensor | None = None,
        update: Tensor | None = None,
        restore: Tensor | None = None,
        curvature: Tensor | None = None,
        smoothing: Tensor | None = None,
    ) -> None:
        """Theta <- round((1 - decay) (theta + s sum_k restore[k] z_k) + s' sum_k coeffs[k] z_k), one pass, in place.

        s is 1, or H^-1/2 with a Hessian, and s' comes of H' = (1 - smoothing + sum_k curvature[k] z_k^2) H.

        Args:
            probes: K streams.
            coeffs: float32 (K, T).
            decay: float32 (T,).
            update: stream of the stochastic rounding of 16-bit tensors; None rounds to nearest.
            restore: float32 (K, T).
            curvature: float32 (K, T), with a Hessian only, and with smoothing.
            smoothing: float32 (T,).
        """
        more: dict[str, Any] = {}
        if curvature is not None and self.hessian == "diagonal":
            restore = torch.zeros_like(coeffs) if restore is None else restore
            more = {"restore": restore, "curvature": curvature, "smoothing": smoothing}
        elif curvature is not None and smoothing is not None:
            learned = self._learn(probes, curvature, smoothing)  # first: what can fail must not come between passes
            if restore is not None:
                self.update_(probes, restore)
            for old, new in zip(self.hessians, learned, strict=True):
                for a, b in zip(old, new, strict=True):
                    a.copy_(b)
            self._rescale()
        elif restore is not None:
            coeffs = coeffs + (1 - decay if decay is not None else 1) * restore
        whole: dict[str, Any] = (
            {"tensor_ids": list(range(len(self.tensors))), "offsets": []} if self.pieces is None else {}
        )
        (self.pieces or torch.ops.zo_core).update_(
            self.tensors,
            **whole,
            streams=torch.cat(list(probes)) if probes else torch.empty(0, dtype=torch.int64, device=coeffs.device),
            coeffs=coeffs,
            counters=self.counters,
            decay=decay,
            update=update,
            residuals=self.residuals or None,
            **{"hessians": [], **self._scales},
            **more,
            **self._noise(),
        )

    def replay_(self, streams: Tensor, coeffs: Tensor, decay: Tensor, updates: Tensor | None) -> None:
        """S times ``update_`` without a Hessian, one step after the other, to the same bits in one pass.

        Args:
            streams: int64 (S, K).
            coeffs: float32 (S, K, T).
            decay: float32 (S, T).
            updates: int64 (S,), streams of the stochastic rounding; None rounds to nearest.
        """
        torch.ops.zo_core.replay_(
            self.tensors,
            list(range(len(self.tensors))),
            [],
            streams,
            coeffs,
            counters=self.counters,
            decay=decay,
            updates=updates,
            residuals=self.residuals or None,
            **self._noise(),
        )

    def _learn(self, probes: Sequence[Probe], curvature: Tensor, smoothing: Tensor) -> list[list[Tensor]]:
        """New factors of all tensors, which are the old ones where curvature and smoothing are zero."""
        out, device = [], curvature.device
        sizes = [
            min(t.numel(), max(scaling.BLOCK, h[-1].numel())) for t, h in zip(self.tensors, self.hessians, strict=True)
        ]
        # once for all tensors: blocks that come and go fragment the heap
        noise, total = torch.empty(2, max(sizes), dtype=torch.float32, device=device)
        one, uncounted = torch.ones(1, 1, dtype=torch.float32, device=device), self.counters.new_zeros(2)
        for i, h in enumerate(self.hessians):

            def squares(first: int, last: int, i: int = i) -> Tensor:
                """Sum_k curvature[k] z_k^2 of elements of tensor i."""
                z: Tensor = noise[: last - first]
                weighted: Tensor = total[: last - first].zero_()
                for probe, weight in zip(probes, curvature[:, i], strict=True):
                    torch.ops.zo_core.update_(
                        [z.zero_()], [], [i], [first], probe, one, counters=uncounted, **self._noise()
                    )
                    weighted.addcmul_(z.square_(), weight)
                return weighted

            out.append(scaling.factors(h, squares, smoothing[i]))
        return out

    def perturb(
        self, which: Sequence[int], sources: Sequence[Tensor], out: Sequence[Tensor], mirrors: Sequence[Tensor] = ()
    ) -> Callable[[Sequence[Tensor], Probe, Tensor, Tensor], None]:
        """Makes out <- round(theta + coeffs s z(probe)), of n of the tensors, which are only read.

        Args:
            which: their numbers.
            sources: their values (``tensors``, under whatever name).
            out: n tensors of their shapes, of any of the three dtypes.
            mirrors: n more, or none, for round(theta - coeffs s z(probe)).

        Returns:
            A function of sources, which must be where they are now, probe, coeffs, float32 (1, n), and counters,
            int64 (1 + n,).
        """
        residuals = [self.residuals[i] for i in which] if self.residuals else []
        scales = {"hessians": [], **{name: [scale[i] for i in which] for name, scale in self._scales.items()}}
        device = self.counters.device
        beside = {"tensor_ids": which, "offsets": [], "residuals": residuals, **scales}
        run = ops.prepare_perturb(device, sources, out, mirrors, **beside)

        def make(sources: Sequence[Tensor], probe: Probe, coeffs: Tensor, counters: Tensor) -> None:
            scalars = {"streams": probe, "coeffs": coeffs, "counters": counters}
            run(sources, **scalars, seed=self.seed, distribution=self.distribution)

        return make

    def perturb_rows(
        self, i: int, source: Tensor, rows: Tensor, out: Tensor, probe: Probe, coeffs: Tensor, counters: Tensor
    ) -> None:
        """As ``perturb``, of the rows (int64, (n,)) of one matrix, into the n rows of ``out``; rows are not checked."""
        residual = self.residuals[i] if self.residuals and self.residuals[i].numel() else None
        scales = {name.removesuffix("s"): scale[i] for name, scale in self._scales.items()}
        ops.backend_for(probe.device).run_rows(  # what torch.ops.zo_core.perturb_rows calls when it has checked all of this
            source, rows, out, i, 0, probe, coeffs, counters=counters, residual=residual, seed=self.seed,
            distribution=self.distribution, **scales,
        )  # fmt: skip

    def full(self, c: float, leave_out: Collection[int] = ()) -> Tensor:
        """A row of coefficients: c for every tensor but those left out, float32 (1, T)."""
        row = torch.full((1, len(self.tensors)), c, dtype=torch.float32, device=self.counters.device)
        if leave_out:
            row[0, list(leave_out)] = 0.0
        return row

    def _noise(self) -> dict[str, Any]:
        return {"seed": ops.signed64(self.seed), "distribution": self.distribution}
