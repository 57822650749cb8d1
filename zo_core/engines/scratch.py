"""Scratch memory of the shadow engine, in which perturbed copies lie one after the other."""

from collections.abc import Callable, Iterable, Sequence
from sys import getrefcount
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..weights import ParamSpace, Probe

Key = tuple[int, torch.dtype]  # a tensor's number, and the dtype its copy has
Make = Callable[[Sequence[Tensor], Probe, Tensor, Tensor], None]  # see ``ParamSpace.perturb``
_ALIGNMENT = 64
_MOST = 1024  # layouts of a slot that are remembered


def _traces(tensors: Iterable[Tensor]) -> list[tuple[Any, ...]]:
    """What shows that somebody keeps a tensor (references from Python, from C++) or has changed it."""
    return [
        (getrefcount(t), t._use_count(), t.data_ptr(), t.requires_grad, t.grad is None, t._backward_hooks is None)  # type: ignore[attr-defined]
        for t in tensors
    ]


def aligned(nbytes: int) -> int:
    """What so many bytes take up."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class Layout(NamedTuple):
    """Tensors in a slot, and the pass that writes them."""

    where: list[int]  # their sources are
    copies: dict[Key, Tensor]
    own: dict[int, Tensor]  # those of the dtypes of their sources
    make: Make  # what writes ``copies``
    lent: dict[int, Tensor]  # ``own`` as parameters, once they were asked for
    traces: list[tuple[Any, ...]]  # of ``lent``, when nobody else has it


NOTHING = Layout([], {}, {}, lambda *_: None, {}, [])


class Slot:
    """Scratch memory that is handed out in tensors; free again when none of them, nor a view of one, is alive."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._storage = self.bytes.untyped_storage()._cdata
        self._layouts: dict[tuple[Key, ...], Layout] = {}
        self.content = NOTHING  # or one of the layouts, when it has been written
        self.version = 0  # of the memory, when it had been written
        self.placed = False  # whether modules have what is lent
        self.ahead: tuple[Probe, float, Layout] | None = None  # content of the evaluation that comes next
        self._own = self._users()

    def _users(self) -> int:
        return int(torch._C._storage_Use_Count(self._storage))

    def free(self) -> bool:
        """Whether nobody else has a tensor in it."""
        return self._users() == self._own

    def view(self, at: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor from byte ``at`` on."""
        with torch.inference_mode(False):
            return self.bytes[at : at + shape.numel() * dtype.itemsize].view(dtype).view(shape).detach()

    def layout(self, keys: tuple[Key, ...], space: ParamSpace, sources: list[Tensor]) -> Layout:
        """Tensors for these keys, in the shapes of their sources, one after the other; made anew if sources have moved."""
        where, found = [t.data_ptr() for t in sources], self._layouts.get(keys)
        if found is None or found.where != where:
            if found is not None or len(self._layouts) >= _MOST:  # or no order of reading repeats
                self.forget()
            copies, at, others = dict[Key, Tensor](), 0, self._users() - self._own
            for key, source in zip(keys, sources, strict=True):
                copies[key] = self.view(at, source.shape, key[1])
                at += aligned(copies[key].nbytes)
            own = {i: copies[i, t.dtype] for (i, dtype), t in zip(keys, sources, strict=True) if dtype == t.dtype}
            make = space.perturb([i for i, _ in keys], sources, list(copies.values()))
            found = self._layouts[keys] = Layout(where, copies, own, make, {}, [])
            self._own = self._users() - others
        return found

    def lend(self, owners: Sequence[Tensor]) -> dict[int, Tensor]:
        """The content that has its sources' dtypes, as parameters with their owners' attributes."""
        lent = self.content.lent
        if not lent:
            for i, copy in self.content.own.items():
                lent[i] = Tensor._make_subclass(nn.Parameter, copy, True)
                lent[i].__dict__ = owners[i].__dict__
            self.content.traces[:] = _traces(lent.values())
            self._own += len(lent)
        return lent

    def take_back(self) -> None:
        """What was lent serves again, unless somebody keeps it or has changed it."""
        lent = self.content.lent
        if _traces(lent.values()) != self.content.traces:
            self._own -= len(lent)
            lent.clear()

    def forget(self) -> None:
        """What was laid out."""
        others = self._users() - self._own
        self._layouts, self.content, self.ahead = {}, NOTHING, None
        self._own = self._users() - others
