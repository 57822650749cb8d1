"""What ``torch.vmap`` lacks: attention on the CPU for a batch of points, as one call with a larger batch.

torch has no rule for its CPU kernel of attention, and calls it once for each point.
"""

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def points_first(x: Tensor, level: int) -> Tensor | None:
    """What is behind a tensor that is batched at this level of ``torch.vmap``, points first; None if it is not."""
    if _functorch.maybe_get_level(x) != level:
        return None
    raw: Tensor = _functorch.get_unwrapped(x)
    return raw.movedim(dim, 0) if (dim := _functorch.maybe_get_bdim(x)) else raw


def batched(x: Tensor, level: int) -> Tensor:
    """A tensor whose first dimension is that of the points, as functions at this level of ``torch.vmap`` see it."""
    return _functorch._add_batch_dim(x, 0, level)


def unseen() -> AbstractContextManager[Any]:
    """A block whose functions ``torch.vmap`` does not see: they get no tensor that is batched, and each costs half of its time."""
    return torch._C._DisableFuncTorch()


def _attention(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, *,
    attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The kernel for batched tensors: points and examples are one dimension to it."""
    given = [x for x in (query, key, value, attn_mask) if x is not None]
    level = max(_functorch.maybe_get_level(x) for x in given)
    unwrapped = [(x, points_first(x, level)) for x in given]
    points = next(len(raw) for _, raw in unwrapped if raw is not None)
    examples = query.shape[0]
    folded = []
    for x, raw in unwrapped:
        if x is attn_mask and raw is None and (x.dim() < 4 or x.shape[0] == 1):
            folded.append(x)  # one mask for all
            continue
        raw = x.expand(points, *x.shape) if raw is None else raw
        if x is attn_mask:
            raw = raw.reshape(points, *(1,) * (5 - raw.dim()), *raw.shape[1:])
            raw = raw.expand(points, examples, *raw.shape[2:])
        folded.append(raw.flatten(0, 1))
    mask = folded[3] if attn_mask is not None else None
    found = _ATTENTION(*folded[:3], dropout_p, is_causal, attn_mask=mask, scale=scale)
    return tuple(batched(x.unflatten(0, (points, examples)), level) for x in found)


@cache
def fold_attention() -> Any:
    """Give torch the rule, for the rest of the process."""
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl(_ATTENTION.name().removeprefix("aten::"), _attention, "FuncTorchBatched")  # type: ignore[no-untyped-call]
    return library
