"""Groups of parameters, aliases of them and compiled parts, found in the structure of a module."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..weights import ParamSpace

GROUP = 16 << 20  # bytes of parameters that are perturbed together, where a module's own are not more
_SHARE = (
    64  # on a GPU, of all parameters, where that is more: two groups are copied at a time, in 3% of the model's memory
)


def most_of(tensors: Sequence[Tensor], device: torch.device) -> int:
    """Bytes of a group. A CPU reads copies from its cache; on a GPU fewer passes cost the host less time."""
    return max(GROUP, sum(t.nbytes for t in tensors) // _SHARE) if device.type == "cuda" else GROUP


def groups(
    module: nn.Module, tensors: Sequence[Tensor], most: int, sizes: Sequence[int] | None = None
) -> list[list[int]]:
    """Numbers of the tensors in each of the largest parts of a module that have no more than ``most`` bytes of them.

    Neighbours that have no more together are one part, but not in a list of blocks, of which LeZO leaves out some. A module whose
    own parameters are more is a part by itself, and so is a tensor outside the module. ``sizes``: bytes of each tensor, where not
    all are copied.
    """
    sizes = [p.nbytes for p in tensors] if sizes is None else sizes
    left, out, room = {id(p): i for i, p in enumerate(tensors)}, list[list[int]](), 0

    def visit(m: nn.Module) -> None:
        nonlocal room
        inside = {i: None for p in m.parameters() if (i := left.get(id(p))) is not None}
        if sum(sizes[i] for i in inside) > most:
            room = 0
            for child in m.children():
                room = 0 if isinstance(m, nn.ModuleList | nn.Sequential) else room
                visit(child)
            inside = {i: None for p in m.parameters() if (i := left.get(id(p))) is not None}
        if not inside:
            return
        if (size := sum(sizes[i] for i in inside)) > room or not out:
            out.append([])
            room = max(most, size)
        room -= size
        out[-1] = sorted([*out[-1], *inside])
        for i in inside:
            del left[id(tensors[i])]

    visit(module)
    return out + [[i] for i in left.values()]


class Plan:
    """Which parameters are copied together, and how.

    Args:
        groups: numbers of the tensors in each.
        lead: dimensions of a copy before those of its tensor.
    """

    def __init__(self, groups: list[list[int]], lead: tuple[int, ...] = ()) -> None:
        self.groups, self.lead = groups, lead
        self.group_of = {i: g for g, group in enumerate(groups) for i in group}
        self.dtypes: dict[int, torch.dtype] = {}  # of the last read of each tensor that was ever read as a whole

    def known(self, group: int) -> list[tuple[int, torch.dtype]]:
        """Tensors of a group of which copies are made, and their dtypes."""
        return [(i, self.dtypes[i]) for i in self.groups[group] if i in self.dtypes]


def refuse_aliases(module: nn.Module, space: ParamSpace, numbers: dict[int, int]) -> None:
    """ValueError if the module keeps a tensor that shares memory with a parameter: a probe would not reach it."""
    spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes, n) for p, n in zip(space.tensors, space.names, strict=True))
    starts = [start for start, *_ in spans]
    for owner, m in module.named_modules():
        anew = {getattr(hook, "name", None) for hook in m._forward_pre_hooks.values()}  # as nn.utils.spectral_norm does
        for name, t in _tensors({k: v for k, v in vars(m).items() if k != "_modules" and k not in anew}):
            if (
                id(t) in numbers
                or type(t) not in (Tensor, nn.Parameter, nn.Buffer)
                or t.layout != torch.strided
                or t.is_nested
                or t.is_meta
            ):
                continue
            end = t.data_ptr() + t.element_size() * (
                1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            )
            at = bisect_left(starts, end) - 1
            if t.numel() and at >= 0 and spans[at][1] > t.data_ptr():
                raise ValueError(
                    f"module: {'.'.join(filter(None, (owner, name)))} shares its memory with {spans[at][2]}, which is trained: the "
                    "shadow engine cannot perturb what reads it. Use one parameter for both, or engine='inplace'"
                )


def _tensors(x: Any, name: str = "", depth: int = 4) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested lists, tuples, sets and dicts, and the name that the outermost dict has for each."""
    if isinstance(x, Tensor):
        yield name, x
    elif depth and isinstance(x, list | tuple | set | dict):
        for key, y in x.items() if isinstance(x, dict) else ((name, y) for y in x):
            yield from _tensors(y, str(key), depth - 1)


class Region(NamedTuple):
    """A compiled module."""

    owner: nn.Module
    name: str  # of the attribute that has
    code: Callable[..., Any]  # the compiled code
    tensors: list[int]


def compiled_regions(module: nn.Module, numbers: dict[int, int]) -> list[Region]:
    """The outermost modules that are compiled: by ``torch.compile``, ``Module.compile`` or in their ``forward`` alone."""
    found, queue = [], [module]
    while queue:
        m = queue.pop(0)
        for name in ("_compiled_call_impl", "forward"):
            code: Any = m.__dict__.get(name)
            if hasattr(code, "_torchdynamo_orig_callable"):
                inside = [i for p in m.parameters() if (i := numbers.get(id(p))) is not None]
                found.append(Region(m, name, code, inside))
                break
        else:
            queue += m.children()
    return found
