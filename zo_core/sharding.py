"""Sharded weights (DTensor: FSDP2, tensor parallelism): which elements of the whole tensor a process has."""

import sys
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def is_sharded(p: Tensor) -> bool:
    """Whether p is a DTensor."""
    module = sys.modules.get(
        "torch.distributed.tensor"
    )  # a slow import, which whoever has made a DTensor has done already
    return module is not None and isinstance(p, module.DTensor)


def local(p: Tensor) -> Tensor:
    """The memory of p in this process: p itself, or a view of a DTensor's shard."""
    if not is_sharded(p):
        return p
    with torch.no_grad():
        return p.to_local()  # type: ignore[attr-defined, no-any-return]


def like(p: Tensor, shard: Tensor) -> Tensor:
    """A DTensor that is sharded as p is, of which this is the part in this process."""
    mesh, kinds = p.device_mesh, p.placements  # type: ignore[attr-defined]
    kind = sys.modules["torch.distributed.tensor"].DTensor
    found: Tensor = kind.from_local(shard, mesh, kinds, run_check=False, shape=p.shape, stride=p.stride())
    return found


def place(p: Tensor) -> str:
    """Which part of a tensor ``local(p)`` is, the same for all tensors that are cut alike; "" of a whole one."""
    if not is_sharded(p):
        return ""
    mesh = p.device_mesh  # type: ignore[attr-defined]
    return f"{p.placements} of {tuple(p.shape)} at {mesh.get_coordinate()} in {tuple(mesh.shape)}"  # type: ignore[attr-defined]


class Runs(NamedTuple):
    """The elements that a process has of a tensor, in the order of its memory: ranges of one length in the whole one."""

    length: int
    starts: list[int]


def runs_of(name: str, p: Tensor) -> Runs:
    """Where the elements of ``local(p)`` are. ValueError if p is neither whole nor split along dimensions, or not contiguous."""
    mine = local(p)
    if not mine.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous shard, got strides {mine.stride()} of shape {tuple(mine.shape)}"
        )
    if not is_sharded(p):
        return Runs(p.numel(), [0])
    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    shape, offset = list(p.shape), [0] * p.dim()
    strided = [type(x).__name__ == "_StridedShard" for x in placements]
    # strided ones split what the others left, the last one first
    order = [i for i, late in enumerate(strided) if not late] + [i for i, late in enumerate(strided) if late][::-1]
    for i in order:
        x = placements[i]
        if strided[i] or x.is_shard():
            size = -(-shape[x.dim] // mesh.size(i))
            first = min(size * mesh.get_coordinate()[i], shape[x.dim])
            offset[x.dim] += first
            shape[x.dim] = min(size, shape[x.dim] - first)
        elif not x.is_replicate():
            raise ValueError(f"{name}: expected a DTensor that is sharded or replicated, got {x}: redistribute it")
    if tuple(shape) != tuple(mine.shape) and prod(shape) + mine.numel():
        raise ValueError(f"{name}: expected a shard of shape {tuple(shape)} for {placements}, got {tuple(mine.shape)}")
    if not prod(shape):
        return Runs(0, [0])
    split = max((d for d in range(p.dim()) if shape[d] != p.shape[d]), default=0)  # dimensions behind it are whole
    starts = torch.zeros((), dtype=torch.int64)
    for d in range(split):
        starts = starts.unsqueeze(-1) + torch.arange(offset[d], offset[d] + shape[d]) * prod(p.shape[d + 1 :])
    first = offset[split] * prod(p.shape[split + 1 :]) if shape else 0
    return Runs(prod(shape[split:]), (starts.reshape(-1) + first).tolist())


class Pieces:
    """``torch.ops.zo_core.update_`` of T shards: a call's tensors are their runs, each with its offset in the whole."""

    def __init__(self, runs: Sequence[Runs], columns: Sequence[int], device: torch.device) -> None:
        """``columns``: the last dimensions of the whole tensors, 0 of a vector, which factored noise goes by."""
        self.runs = runs
        self.widths = list(columns)
        self.columns = [n for n, r in zip(columns, runs, strict=True) for _ in r.starts]
        self.tensor_ids = [i for i, r in enumerate(runs) for _ in r.starts]
        self.offsets = [start for r in runs for start in r.starts]
        self.owners = torch.tensor(self.tensor_ids, device=device)

    def places(self, i: int, first: int, last: int) -> list[slice]:
        """Where the elements ``first`` to ``last`` of the whole tensor i are in the memory of its shard, as far as they are here."""
        length, starts = self.runs[i]
        spans = [(n * length - start, start, start + length) for n, start in enumerate(starts)]
        return [slice(max(a, first) + at, min(b, last) + at) for at, a, b in spans if max(a, first) < min(b, last)]

    def split(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The runs of each of T tensors; empty ones where a tensor is empty, as a residual may be."""
        pairs = zip(tensors, self.runs, strict=True)
        return [x for t, r in pairs for x in (torch.split(t.view(-1), r.length) if t.numel() else [t] * len(r.starts))]

    def update_(
        self, weights: Sequence[Tensor], hessians: Sequence[Tensor], *, streams: Tensor, coeffs: Tensor,
        counters: Tensor, residuals: Sequence[Tensor] | None, seed: int, distribution: str, rank: int,
        update: Tensor | None, **each: Tensor | None,
    ) -> None:  # fmt: skip
        """Arguments as of the op, for T tensors; ``each`` are those whose last dimension is T."""
        counts = counters.new_zeros(1 + len(self.offsets))
        more: dict[str, Any] = {k: x if x is None else x[..., self.owners] for k, x in each.items()}
        torch.ops.zo_core.update_(
            self.split(weights), self.split(hessians) if hessians else [], self.tensor_ids, self.offsets, streams,
            coeffs[:, self.owners], counters=counts, residuals=self.split(residuals) if residuals else None, seed=seed,
            distribution=distribution, rank=rank, columns=self.columns, update=update, **more,
        )  # fmt: skip
        counters[0] += counts[0]
        counters[1:].index_add_(0, self.owners, counts[1:])


def units(module: nn.Module | None) -> list[Any]:
    """The parts of a module that FSDP2 gathers."""
    return [m for m in module.modules() if hasattr(m, "reshard")] if module is not None else []


def reshard(units: Sequence[Any]) -> None:
    """Free gathered weights, so that the next forward gathers them anew: FSDP2 keeps those of its root."""
    for unit in units:
        unit.reshard()
