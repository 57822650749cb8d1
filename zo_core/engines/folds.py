"""What ``torch.vmap`` lacks: attention for a batch of points, as one call with a larger batch.

torch has no rule for its CPU kernel of attention, and calls it once for each point. Its rules for CUDA kernels fail where
examples have masks of their own, as padded ones do, that are the same at all points.
"""

import warnings
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

KERNELS = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


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


def attention_of(kernel: Any) -> Any:
    """The rule of a kernel of attention for batched tensors: points and examples are one dimension to it."""
    names = [argument.name for argument in kernel._schema.arguments]

    def rule(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        given = dict(zip(names, args, strict=False)) | kwargs
        tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        level = max(_functorch.maybe_get_level(x) for x in tensors.values())
        raw = {name: points_first(x, level) for name, x in tensors.items()}
        points, examples = next(len(x) for x in raw.values() if x is not None), tensors["query"].shape[0]
        if given.get("dropout_p"):
            raise RuntimeError("torch.vmap: dropout inside of this kernel of attention would differ among points")
        for name, x in tensors.items():
            each = raw[name]
            if name in ("query", "key", "value"):
                given[name] = (x.expand(points, *x.shape) if each is None else each).flatten(0, 1)
            else:
                given[name] = _mask(x, each, points, examples)

        def unfolded(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.dim() or len(x) != points * examples:
                return x  # as the seed of dropout
            return batched(x.view(points, examples, *x.shape[1:]), level)

        return tuple(map(unfolded, kernel(**given)))

    return rule


def _mask(x: Tensor, raw: Tensor | None, points: int, examples: int) -> Tensor:
    """A mask for points and examples as one dimension. It is copied only where it differs among examples or points."""
    if raw is None and x.dim() < 4:
        return x  # of the last dimensions, for all
    if raw is None and (x.shape[0] == 1 or x.stride(0) == 0):
        return x[:1].expand(points * examples, *x.shape[1:])
    raw = x.expand(points, *x.shape) if raw is None else raw
    raw = raw.reshape(points, *(1,) * (5 - raw.dim()), *raw.shape[1:])
    heads = raw.shape[2]
    one = raw[:, :, :1] if raw.stride(2) == 0 else raw
    one = one.expand(points, examples, *one.shape[2:]).flatten(0, 1)
    columns = one.shape[-1]
    padded = one.new_empty(*one.shape[:-1], -(-columns // 16) * 16)  # rows begin where CUDA kernels can load 128 bits
    return padded[..., :columns].copy_(one).expand(-1, heads, -1, -1)


@cache
def fold_attention() -> Any:
    """Give torch the rules, for the rest of the process."""
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name in KERNELS:
            rule = attention_of(getattr(torch.ops.aten, name).default)
            library.impl(name, rule, "FuncTorchBatched")  # type: ignore[no-untyped-call]
    return library
