"""HiZOO's metric: a diagonal Hessian H of each tensor, by which noise is scaled, s = H^-1/2.

A tensor's H is a list of float32 tensors: [H] in its shape, or, factored, [r, c] with H_ij = r_i c_j / mean(r).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .bindings.ops import HESSIAN_RANGE

KINDS = ("diagonal", "factored")
BLOCK = 1 << 20  # weights whose noise is made at once, for the means over rows and columns


def shapes_of(p: Tensor, kind: str) -> list[tuple[int, ...]]:
    """Shapes of the H of a tensor: its own, or those of row and column factors (of its first dimension, and of all others)."""
    return [(p.shape[0],), (p[0].numel(),)] if kind == "factored" and p.dim() > 1 and p.numel() else [tuple(p.shape)]


def identity(p: Tensor, kind: str) -> list[Tensor]:
    """H = 1 of a tensor."""
    return [torch.ones(shape, dtype=torch.float32, device=p.device) for shape in shapes_of(p, kind)]


def of_passes(hessians: Sequence[list[Tensor]], kind: str) -> dict[str, Any]:
    """The arguments by which ``torch.ops.zo_core`` scales the noise of these tensors."""
    if kind == "diagonal":
        return {"hessians": [h[0] for h in hessians]}
    rows = [h[0].div(h[0].mean()) if len(h) > 1 else h[0].reshape(-1) for h in hessians]
    return {
        "row_scales": [r.clamp(*HESSIAN_RANGE).rsqrt() for r in rows],
        "column_scales": [h[1].rsqrt() if len(h) > 1 else h[0].new_empty(0) for h in hessians],
    }


def factors(h: list[Tensor], squares: Callable[[int, int], Tensor], smoothing: Tensor) -> list[Tensor]:
    """The factors of (1 - smoothing + sum_k curvature[k] z_k^2) H: its means over rows and over columns.

    Args:
        h: [r, c], or [H] of a vector.
        squares: squares(first, last) is sum_k curvature[k] z_k^2 of the elements first to last, flat, (last - first,); of a
            matrix at most max(BLOCK, one row) at once.
        smoothing: 0-dimensional.
    """
    if len(h) == 1:
        change = 1 - smoothing + squares(0, h[0].numel())
        return [(h[0] * change.view_as(h[0])).clamp(*HESSIAN_RANGE)]
    r, c = h
    relative, n = r / r.mean(), c.numel()
    over_rows, over_columns = torch.empty_like(r), torch.zeros_like(c)
    for first in range(0, len(r), step := max(1, BLOCK // n)):
        part = slice(first, min(first + step, len(r)))
        z2 = squares(part.start * n, part.stop * n).view(-1, n)
        over_rows[part] = z2 @ c / n
        over_columns += relative[part] @ z2
    return [
        ((1 - smoothing) * r + relative * over_rows).clamp(*HESSIAN_RANGE),
        ((1 - smoothing) * c + c * over_columns / len(r)).clamp(*HESSIAN_RANGE),
    ]
