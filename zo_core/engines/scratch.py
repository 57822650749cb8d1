"""Scratch memory of the shadow engine: buffers that hold the perturbed copies of a group of tensors."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..weights import ParamSpace, laid_out

Key = tuple[int, torch.dtype]  # a tensor's number, and the dtype its copy has
_ALIGNMENT = 64


class Layout(NamedTuple):
    """Copies in a buffer, and the pass that writes them."""

    places: list[
        tuple[int, torch.Size, tuple[int, ...]]
    ]  # addresses, shapes and strides of the weights they are copies of
    copies: dict[Key, Tensor]
    make: Callable[..., None]  # see ``ParamSpace.perturb``


class Buffer:
    """Memory that is given out in tensors."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.layouts: dict[Hashable, Layout] = {}  # by group
        self.group: Hashable = None  # the one whose copies are in it
        self._own = self._sharing()
        self._version = 0

    def _sharing(self) -> int:
        """The number of tensors that share this memory. torch counts them: views and the graphs of autograd have such."""
        return int(torch._C._storage_Use_Count(self.bytes.untyped_storage()._cdata))

    def in_use(self) -> bool:
        """Whether a tensor of this buffer is still in use elsewhere, so that it must not be overwritten."""
        return self._sharing() > self._own

    def lay_out(
        self,
        group: Hashable,
        keys: Sequence[Key],
        sources: Sequence[Tensor],
        space: ParamSpace,
        lead: tuple[int, ...] = (),
    ) -> Layout:
        """Tensors for these keys, in the shapes of their sources: those of the last time, unless the weights have moved.

        ``lead``: dimensions before those of the source, where there is a copy for each point of a group.
        """
        places, found = [(t.data_ptr(), t.shape, t.stride()) for t in sources], self.layouts.get(group)
        if found is None or found.places != places or [*found.copies] != keys:
            copies, at = dict[Key, Tensor](), 0
            found = None
            self.layouts.pop(group, None)  # whose tensors must not be counted below
            with torch.inference_mode(False):
                for key, source in zip(keys, sources, strict=True):
                    end = at + math.prod(lead) * source.numel() * key[1].itemsize
                    copies[key] = laid_out(self.bytes[at:end].view(key[1]), source, lead).detach()
                    at += aligned(end - at)
            perturb = space.perturb_points if lead else space.perturb
            make = perturb([i for i, _ in keys], sources, [*copies.values()])
            found = self.layouts[group] = Layout(places, copies, make)
            self._own = self._sharing()
        return found

    def filled(self, group: Hashable) -> None:
        """Note that the buffer now holds the copies of this group."""
        self.group, self._version = group, self.bytes._version

    def written(self) -> bool:
        """Whether a tensor in this buffer has been written since then."""
        return self.group is not None and self.bytes._version != self._version


def aligned(nbytes: int) -> int:
    """This number of bytes, rounded up to the alignment."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class Scratch:
    """One or two buffers, each as large as the largest group; more memory only while somebody keeps copies.

    On a GPU, where a group is a part of a layer, two of them take turns: parts are not always read one after the other. A CPU
    finds the one buffer in its cache.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.turns = device, 2 if device.type == "cuda" else 1
        self.buffers: list[Buffer] = []  # the one that was filled last is last
        self.peak = 0  # bytes, the most so far

    def take(self, nbytes: int) -> Buffer:
        """The buffer whose turn it is, with room for this; empty, and marked as the last one."""
        free = [b for b in self.buffers if not b.in_use()]
        taken = next((b for b in free if b.bytes.nbytes >= nbytes), None) if len(self.buffers) >= self.turns else None
        if taken is not None:
            self.buffers.remove(taken)
        else:
            if len(self.buffers) == 2 or (free and len(self.buffers) == self.turns):  # a larger one takes its place
                self.buffers.remove([*free, *self.buffers][0])  # its memory goes with its last tensor
            del free  # before there is a larger one
            taken = Buffer(nbytes, self.device)
            self.peak = max(self.peak, nbytes + sum(b.bytes.nbytes for b in self.buffers))
        self.buffers.append(taken)
        taken.group = None
        return taken

    def empty(self) -> None:
        """Forget which groups the buffers hold."""
        for buffer in self.buffers:
            buffer.group = None

    def holding(self, group: Hashable) -> Buffer | None:
        """The buffer that has a group's copies."""
        for buffer in reversed(self.buffers):
            if buffer.group == group:
                return buffer
        return None
