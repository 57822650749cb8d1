"""The small kernel before each pass: it looks at all scalars, so that the host need not wait for them."""

import torch
from torch import Tensor

import triton
import triton.language as tl

from .launch import kernel, launch

_BLOCK = tl.constexpr(512)  # tensors at a time


@triton.jit
def _add(at, mask, finite, work):
    """``finite`` and ``work``, with a block of scalars more: whether all are finite, and whether one is not zero."""
    x = tl.load(at, mask=mask, other=0.0)
    return finite & (tl.abs(x) < float("inf")), work | (x != 0)


@kernel(warps=4)
def gate_kernel(
    coeffs, restore, curvature, decay, smoothing, go, counters, n_tensors, n_streams, moves, decays, updates, moments
):
    """go[0]: all scalars are finite. go[1 + i]: the pass has work for tensor i. One program; counts a void pass."""
    finite = tl.full((_BLOCK,), 1, tl.int1)
    for first in range(0, n_tensors, _BLOCK):
        column = first + tl.arange(0, _BLOCK)
        mask = column < n_tensors
        work = tl.zeros((_BLOCK,), tl.int32) != moves
        for k in range(n_streams):
            at = k * n_tensors + column
            finite, work = _add(coeffs + at, mask, finite, work)
            if updates != 0:
                finite, work = _add(restore + at, mask, finite, work)
                finite, work = _add(curvature + at, mask, finite, work)
            if moments != 0:
                finite, _ = _add(curvature + at, mask, finite, work)
        if decays != 0:
            finite, work = _add(decay + column, mask, finite, work)
        if updates != 0:
            finite, work = _add(smoothing + column, mask, finite, work)
        tl.store(go + 1 + column, work.to(tl.int32), mask=mask)
    all_finite = tl.min(finite.to(tl.int32), axis=0)
    tl.store(go, all_finite)
    if all_finite == 0:
        tl.atomic_add(counters, tl.full((), 1, tl.int64))


def gate(
    coeffs: Tensor, counters: Tensor, *, moves: bool, decay: Tensor | None = None, restore: Tensor | None = None,
    curvature: Tensor | None = None, smoothing: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The flags, int32 (1 + T,), that programs of a pass read first.

    ``moves``: it writes all tensors, even with scalars of 0. ``curvature`` without ``restore``: weights of a second moment.
    """
    k, count = coeffs.shape
    go = torch.empty(1 + count, dtype=torch.int32, device=coeffs.device)
    unread = coeffs
    launch(
        gate_kernel, 1, coeffs=coeffs, restore=unread if restore is None else restore,
        curvature=unread if curvature is None else curvature, decay=unread if decay is None else decay,
        smoothing=unread if smoothing is None else smoothing, go=go, counters=counters, n_tensors=count, n_streams=k,
        moves=int(moves), decays=int(decay is not None), updates=int(restore is not None),
        moments=int(curvature is not None and restore is None),
    )  # fmt: skip
    return go
